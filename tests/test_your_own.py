"""docs/your_own.md: the method and the attack from recipe to report on two processes, the model, the data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import robustmoe as rm
from forks import fork_pair
from robustmoe import records, spec
from robustmoe.attacks import PGD, linf
from robustmoe.cli import main
from robustmoe.noise import Noise

PAGE = (Path(__file__).parents[1] / "docs" / "your_own.md").read_text(encoding="utf-8")
FILES = {
    code.partition("\n")[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
RECIPE = """
model = "ensemble(linear, experts=2, router=linear)"
data = "digits"
method = "my_method.py:pairing(my_attack.py:Corners(linf(0.1), draws=2), beta=1)"
epochs = 1
batch_size = 128
max_steps = 3
val_limit = 32
threads = 1
device = "cpu"
attacks = ["my_attack.py:Corners(linf(0.1), draws=3)"]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path


def test_each_example_is_a_file_of_less_than_twenty_lines() -> None:
    assert list(FILES) == ["my_attack.py", "my_method.py", "my_model.py", "my_data.py"]
    assert all(len([line for line in code.splitlines() if line]) < 20 for code in FILES.values())


def worker(folder: str) -> int:
    """What each of two processes does."""
    os.chdir(folder)
    torch.set_num_threads(1)
    trained = main(["train", "mine.toml", "--out", "both"])
    return trained or main(["evaluate", "both", "--limit", "12", "--curve", "none", "--batch-size", "4"])


def test_the_method_and_the_attack_from_recipe_to_report_on_two_processes(here: Path) -> None:
    pair = fork_pair("test_your_own:worker", str(here), output=here / "said")
    assert [child.wait() for child in pair] == [0, 0], [child.output.read_text() for child in pair]
    assert main(["train", "mine.toml", "--out", "one"]) == 0
    assert main(["evaluate", "one", "--limit", "12", "--curve", "none"]) == 0
    two, alone = (rm.load_model(run) for run in ("both", "one"))
    for a, b in zip(two.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    config = json.loads(Path("both/config.json").read_text())
    assert config["processes"] == 2
    assert config["files"] == spec.files("my_method.py:pairing", "my_attack.py:Corners")
    rows = [records.read(records.rows_files(run)[0]) for run in ("both", "one")]
    assert {row.header.attack for row in rows} == {"my_attack.py:Corners(linf(0.1), draws=3)"}
    assert [row.index for row in rows[0].rows] == [row.index for row in rows[1].rows]
    assert main(["report", "both", "one"]) == 0
    assert "my_method.py:pairing" in Path("report.html").read_text()


def test_the_method_is_what_its_sentence_says(
    images: Callable[..., torch.Tensor], labels: Callable[[int], torch.Tensor]
) -> None:
    """In numpy, image by image: -log p_y(x') + beta * sum of (z(x) - z(x'))^2."""
    model, x, y = rm.build_model("linear", 4, (3, 8, 8)).train(), images(5), labels(5)
    method = spec.build("my_method.py:pairing(pgd(linf(0.1), steps=3), beta=2)", "method")
    noise = Noise.of(torch.arange(5), 3)
    given = method.phases[0].loss(model, x, y, noise)
    assert given.pair is not None
    with torch.no_grad():
        clean, attacked = (model(each).double().numpy() for each in (x, given.pair.x_adv))
    total = 0.0
    for z, z_adv, label in zip(clean, attacked, y.tolist()):
        total += np.log(np.exp(z_adv - z_adv[label]).sum()) + 2 * ((z - z_adv) ** 2).sum()
    assert float(given.value.detach()) == pytest.approx(total / 5, rel=1e-5)
    assert int(given.correct) == int((attacked.argmax(1) == y.numpy()).sum())
    assert method.attack == PGD(linf(0.1), steps=3)


def test_the_attack_takes_the_worst_of_its_points(images: Callable[..., torch.Tensor]) -> None:
    model, x, y = rm.build_model("linear", 4, (3, 8, 8)), images(6), torch.arange(6) % 4
    few, many = (rm.build_attack(f"my_attack.py:Corners(linf(0.1), draws={n})")(model, x, y) for n in (1, 9))
    losses = [torch.nn.functional.cross_entropy(model(each), y, reduction="none") for each in (few, many)]
    assert bool((losses[1] >= losses[0]).all())
    assert bool((losses[1] > losses[0]).any())
    assert float((many - x).abs().max()) <= 0.1 + 1e-6


def test_the_model_and_the_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 6), dtype=np.uint8), np.arange(40) % 2
    np.savez(here / "photos.npz", x=x, y=y, x_test=x[:8], y_test=y[:8])
    own = ["--model", "my_model.py:make_model(filters=2)", "--data", "my_data.py:photos"]
    train = ["train", "mine.toml", *own, "--method", "standard", "--batch-size", "8", "--max-steps", "1"]
    assert main([*train, "--out", "run"]) == 0
    assert next(rm.load_model("run").parameters()).shape == (2, 3, 3, 3)
    assert main(["evaluate", *own, "--attack", "fgsm(linf(0.1))", "--curve", "none", "--device", "cpu"]) == 0
    header = records.read(records.rows_files("runs/my-model-make-model-filters-2")[0]).header
    assert (header.n, header.classes) == (8, ["cat", "dog"])
    assert header.files == spec.files("my_model.py:make_model", "my_data.py:photos")
