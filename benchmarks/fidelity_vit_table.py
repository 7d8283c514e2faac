"""How near V-MoE's nets are to ours on the golden cases that benchmarks/fidelity_vit.py wrote, with the GELU that they
have and with the other: docs/results/fidelity_vit.json, which docs/vit_moe.md tells.

    python benchmarks/fidelity_vit_table.py     # seconds; nothing of their code is needed
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from results import RESULTS, described, write
from robustmoe.models import Output, build_model
from robustmoe.weights import LAYOUTS
from robustmoe.weights.fitting import fits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden_weights import FOLDER, Case, read_case


def answer(case: Case, spec: str) -> Output:
    model = build_model(spec, case.num_classes, case.image_shape, *case.inputs)
    weights = {name: torch.from_numpy(value) for name, value in case.tensors().items()}
    model.load_state_dict(dict(fits({"": weights}, model, {case.layout: LAYOUTS[case.layout]})[0].given), strict=False)
    with torch.no_grad():
        return model.run(torch.from_numpy(case.images()))


def main() -> None:
    numbers = {}
    for path in sorted(FOLDER.glob("v*.json")):
        case = read_case(path)
        theirs, ours = torch.tensor(case.logits), answer(case, case.model)
        exact = answer(case, case.model.replace("gelu=tanh", "gelu=exact")).logits
        same = 0
        for router, experts in case.routes.items():
            routing = ours.trace[router]
            chosen = np.sort(np.where(routing.weight != 0, routing.index, -1), axis=-1)
            same += int((chosen == np.sort(np.asarray(experts), axis=-1)).all())
        numbers[path.stem] = {
            "model": case.model,
            "source": case.source,
            "difference": float((ours.logits - theirs).abs().max()),
            "exact_gelu": float((exact - theirs).abs().max()),
            "deviation": float(theirs.std()),
            "routers": len(case.routes),
            "same_routes": same,
            "dropped": float(np.mean([(np.asarray(each) < 0).mean() for each in case.routes.values() or [[0]]])),
        }
    about = described("python benchmarks/fidelity_vit_table.py", seeds="20, of every net")
    write(RESULTS / "fidelity_vit.json", about, numbers)


if __name__ == "__main__":
    main()
