"""Nets of other code and ours, from the same weights: the answers that the other code gave (see
`benchmarks/fidelity.py`) against ours, through the layout that imports such weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from golden_weights import FOLDER, read_case
from robustmoe.models import build_model
from robustmoe.weights import LAYOUTS
from robustmoe.weights.fitting import fits

CASES = sorted(FOLDER.glob("*.json"))
ALLOWED = 1e-4
"""Of the logits' deviation."""


def test_there_are_cases_of_every_layout() -> None:
    assert {read_case(path).layout for path in CASES} == set(LAYOUTS) - {"own", "network"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_ours_answers_as_the_other_code_did_and_the_way_back_gives_their_tensors(path: Path) -> None:
    """On one network, since building it and drawing its weights is most of the work."""
    case = read_case(path)
    mean, std = case.inputs
    model = build_model(case.model, case.num_classes, case.image_shape, mean, std, seed=1)
    weights = {name: torch.from_numpy(value) for name, value in case.tensors().items()}
    fit = fits({"": weights}, model, {case.layout: LAYOUTS[case.layout]})[0]
    assert fit.whole, fit.problems()
    stay = [name for name in model.state_dict() if name not in fit.given]
    assert all("normalise." in name or name.endswith("num_batches_tracked") for name in stay), stay
    for pair in LAYOUTS[case.layout].pairs(model):
        given = [weights[name] for name in pair.theirs if name in weights]
        if len(given) == len(pair.theirs):
            back = pair.write(list(pair.read(given)))
            assert all(torch.equal(one, other) for one, other in zip(back, given, strict=True)), pair.theirs
    model.load_state_dict(dict(fit.given), strict=False)
    images = torch.from_numpy(case.images())
    if case.double:
        model, images = model.double(), images.double()
    with torch.no_grad():
        output = model.run(images)
    expected = torch.tensor(case.logits, dtype=torch.float64)
    assert (output.logits - expected).abs().max() <= ALLOWED * expected.std()
    for router, experts in case.routes.items():
        routing = output.trace[router]
        chosen = np.sort(np.where(routing.weight != 0, routing.index, -1), axis=-1)
        assert (chosen == np.sort(np.asarray(experts), axis=-1)).all(), router
