"""Our models in foolbox's and ART's hands, and RobustBench's `benchmark` with our AutoAttack."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustmoe import interop, records
from robustmoe.attacks import PGD, linf
from robustmoe.errors import UserError
from robustmoe.evaluation import evaluate
from robustmoe.models import RoutedModel
from robustmoe.records import Check, Checks, Evaluation

N, WRONG = 12, 3

# ------------------------------------------------------------------------------------------------ foolbox and ART


@pytest.mark.crosscheck
def test_foolbox_attacks_what_we_hand_it(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    foolbox = pytest.importorskip("foolbox", reason="needs foolbox: run `make crosscheck`")
    model, x = tiny("ensemble_soft").train(), images(6)
    wrapped = interop.as_foolbox(model)
    assert not model.training
    y = wrapped(x).argmax(1)
    assert torch.equal(y, model(x).argmax(1)), "the same logits, so no second normalisation"
    attack = foolbox.attacks.LinfPGD(steps=7, abs_stepsize=2 / 255, random_start=False)
    theirs = attack(wrapped, x, y, epsilons=8 / 255)[1]
    ours = PGD(linf(8 / 255), steps=7, step_size=2 / 255, start="clean", keep="last")(model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.crosscheck
def test_foolbox_takes_a_plain_function(images: Callable[..., Tensor]) -> None:
    pytest.importorskip("foolbox", reason="needs foolbox: run `make crosscheck`")
    wrapped = interop.as_foolbox(lambda x: x.flatten(1)[:, :4], device="cpu")
    assert wrapped.bounds == (0, 1)
    assert torch.equal(wrapped(images(2)), images(2).flatten(1)[:, :4])


@pytest.mark.crosscheck
def test_art_attacks_what_we_hand_it(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """ART 1.20.1's one step of eps from the clean image, on its own labels, is our FGSM's sign step."""
    reason = "needs ART: pip install adversarial-robustness-toolbox packaging"
    evasion = pytest.importorskip("art.attacks.evasion", reason=reason)
    model, x = tiny("dense").train(), images(6)
    wrapped = interop.as_art(model, 4, (3, 8, 8))
    logits = wrapped.predict(x.numpy())
    np.testing.assert_allclose(logits, model.eval()(x).detach().numpy(), rtol=0, atol=1e-6)
    y = torch.from_numpy(logits.argmax(1))
    theirs = evasion.FastGradientMethod(wrapped, eps=8 / 255).generate(x.numpy(), y.numpy())
    ours = PGD(linf(8 / 255), steps=1, start="clean", keep="last")(model, x, y)
    assert np.abs(theirs - ours.numpy()).max() <= 1e-6


@pytest.mark.parametrize(
    "module, convert, message",
    [
        ("foolbox", lambda m: interop.as_foolbox(m), "foolbox cannot be imported here .*: pip install foolbox$"),
        (
            "art.estimators.classification",
            lambda m: interop.as_art(m, 4, (3, 8, 8)),
            "ART cannot be imported here .*: pip install adversarial-robustness-toolbox packaging$",
        ),
    ],
)
def test_a_missing_peer_is_one_line(
    module: str, convert: Callable[[nn.Module], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what an import of it then finds: nothing
    with pytest.raises(UserError, match=message) as error:
        convert(nn.Flatten())
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ RobustBench

THEIRS = (
    "model, n_examples=10000, dataset='cifar10', threat_model='Linf', to_disk=False, model_name=None, "
    "data_dir='./data', corruptions_data_dir=None, device=None, batch_size=32, eps=None, log_path=None, "
    "preprocessing=None, aa_state_path=None"
)
"""RobustBench at 78fcc9e, robustbench/eval.py (defaults that are enums there are their values)."""

KEYS = (
    "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported "
    "autoattack_acc external unreliable footnote"
)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """CIFAR-10's parquet layout under data/, with 12 test images of noise; gives a random linear model that is right
    on 9 of them. With 3,072 pixels, its margins move by far more than they are under 8/255.
    """
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    levels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8)
    y = model(levels.float() / 255).argmax(1)
    y[:WRONG] = (y[:WRONG] + 1) % 10
    cells = []
    for image in levels:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": "x.png"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "data").mkdir()
    train = [*y.tolist(), *range(10)]  # every class has to be there, for the split
    for split, pictures, labels in (("train", (cells * 2)[: N + 10], train), ("test", cells, y.tolist())):
        table = pa.table({"img": pa.array(pictures, kind), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return model


def test_the_arguments_are_robustbenchs() -> None:
    found = inspect.signature(interop.benchmark).parameters.values()
    text = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found)
    assert text == THEIRS


def test_benchmark_measures_writes_and_resumes(
    cifar: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar.train()
    entry = tmp_path / "model_info/cifar10/Linf/Noise2026Linear.json"
    entry.parent.mkdir(parents=True)
    entry.write_text('{"link": null, "venue": "Unpublished", "clean_acc": "99", "corruptions_acc": null}')
    found = interop.benchmark(
        cifar, model_name="Noise2026Linear", to_disk=True, aa_state_path="state", log_path="logs/aa.txt"
    )
    assert found == (0.75, 0.0), "right on 9 of 12, and nothing holds"
    assert cifar.training
    written = json.loads(entry.read_text())
    assert list(written)[: len(KEYS.split())] == KEYS.split()
    assert written["clean_acc"] == "75.0"
    assert written["autoattack_acc"] == "0.0"
    assert written["eps"] == "8/255"
    assert written["dataset"] == "cifar10"
    assert written["unreliable"] is False
    assert written["venue"] == "Unpublished", "filled in by hand, and kept"
    assert (tmp_path / "logs/aa.txt").read_text().splitlines()[:2] == [
        "initial accuracy: 75.00%",
        "robust accuracy after APGD-CE: 0.00%",
    ]
    assert "do not quote" not in capsys.readouterr().err
    (rows,) = [file for file in (tmp_path / "state").glob("*.jsonl") if "examples" not in file.name]
    before = rows.read_bytes()
    assert interop.benchmark(cifar, aa_state_path="state", model_name="Noise2026Linear") == found
    assert rows.read_bytes() == before, "nothing is done twice"


def test_a_failed_check_is_said(cifar: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounded inputs have no gradient: check G1 fails."""
    assert interop.benchmark(lambda x: cifar((x * 4).round() / 4), n_examples=2, batch_size=2, eps=1e-3)
    assert re.search("do not quote this number: G1", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset": "cifar1O"}, r"unknown dataset 'cifar1O'; did you mean 'cifar10' or 'cifar100'\?"),
        ({"threat_model": "linf"}, r"unknown threat_model 'linf'; did you mean 'Linf'\? known: L2, Linf"),
        ({"threat_model": "corruptions"}, "benchmark evaluates no corruptions; expected threat_model 'Linf' or 'L2'"),
        ({"dataset": "cifar100", "threat_model": "L2"}, "no L2 leaderboard of cifar100, so eps has no default"),
        ({"eps": 8.0}, r"write 8/255, not 8"),
        ({"preprocessing": "Crop288"}, "benchmark takes no preprocessing"),
        ({"corruptions_data_dir": "x"}, "benchmark evaluates no corruptions; leave corruptions_data_dir out"),
        ({"to_disk": True}, "to_disk needs the model_name"),
        ({"to_disk": True, "model_name": "x", "dataset": "imagenet"}, "to_disk is refused for imagenet"),
        ({"device": ["cpu", "cpu"]}, "benchmark takes one model and one device"),
        ({"model": [nn.Flatten()]}, "benchmark takes one model and one device"),
        ({"data_dir": "nowhere"}, "there is no data_dir 'nowhere'; give the folder of the data set, or data_dir=None"),
        ({"data_dir": None, "dataset": "imagenet"}, "imagenet cannot be downloaded; give data_dir"),
        ({"aa_state_path": "file"}, "aa_state_path is a folder of rows here; 'file' is a file"),
    ],
)
def test_what_benchmark_refuses(
    arguments: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message) as error:
        interop.benchmark(**{"model": nn.Flatten(), **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": 3, "model": "resnet18"}',
        b'{"clean_acc": "99"}',
        b'{"link": null, "authors": null}',
        b"{}",
        b"[1]",
        b"no JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"",
    ],
)
def test_another_file_is_neither_written_over_nor_found_out_about_too_late(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes before the data set is opened and the model asked, and the file stays as it was."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model_info/cifar10/Linf/config.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)

    def asked(x: Tensor) -> Tensor:
        raise AssertionError("the attack has begun")

    with pytest.raises(UserError, match=r"Linf/config.json: .*; move it away, or give another model_name") as error:
        interop.benchmark(asked, to_disk=True, model_name="config", data_dir=".")
    assert "\n" not in str(error.value)
    assert file.read_bytes() == content
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


# ------------------------------------------------------------------------------------------------ entries


@pytest.fixture
def run(cifar: nn.Module, tmp_path: Path) -> list[Evaluation]:
    """AutoAttack standard and PGD on 12 images; the rows then say that 6 and 5 of the 9 right ones hold."""
    interop.benchmark(cifar, aa_state_path="rows")
    from robustmoe.data import cifar10

    evaluate(cifar, cifar10("data"), attacks=["pgd(linf(8/255), steps=1)"], out="rows", device="cpu")
    files = sorted(file for file in (tmp_path / "rows").glob("*.jsonl") if "examples" not in file.name)
    read = [records.read(file) for file in files]
    pgd = "pgd(linf(8/255), steps=1, keep=first)"
    assert [result.header.attack for result in read] == ["autoattack(linf(8/255))", pgd]
    return [holding(result, left) for result, left in zip(read, (6, 5), strict=True)]


def holding(result: Evaluation, left: int) -> Evaluation:
    """The result with the attack's answers changed: the first ``left`` of the right images hold."""
    right = [row.index for row in result.rows if row.clean == row.label]
    assert len(right) == N - WRONG
    rows = [
        dataclasses.replace(row, adversarial=row.label if row.index in right[:left] else (row.label + 1) % 10)
        for row in result.rows
    ]
    return Evaluation(result.header, rows, result.checks)


def with_checks(result: Evaluation, *checks: Check) -> Evaluation:
    assert result.checks is not None
    kept = [check for check in result.checks.checks if check.id not in {new.id for new in checks}]
    return Evaluation(result.header, result.rows, Checks([*kept, *checks], 1.0))


def test_an_entry(run: list[Evaluation]) -> None:
    """9, 6 and 5 of 12: 75, 50 and 41.67 per cent."""
    entry = interop.robustbench_json(run, name="A title", architecture="Linear", reported="51")
    assert " ".join(entry) == KEYS
    assert entry == {
        **dict.fromkeys(KEYS.split()),
        "name": "A title",
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "Linear",
        "eps": "8/255",
        "clean_acc": "75.0",
        "reported": "51",
        "autoattack_acc": "50.0",
        "external": "41.67",
        "unreliable": False,
    }
    assert interop.robustbench_json(run[:1])["external"] is None


@pytest.mark.parametrize("eps, text", [(4 / 255, "4/255"), (0.5, "0.5"), (0.031, "0.031"), (0.0, "0")])
def test_eps_is_written_as_they_do(eps: float, text: str, run: list[Evaluation]) -> None:
    header = dataclasses.replace(run[0].header, eps=eps)
    assert interop.robustbench_json([Evaluation(header, run[0].rows, run[0].checks)])["eps"] == text


def test_a_failed_check_makes_an_entry_unreliable(run: list[Evaluation]) -> None:
    failed = with_checks(run[0], Check("H7", "determinism", "fail", 1.0, "passes differ"))
    assert interop.robustbench_json([failed])["unreliable"] is True


def test_only_autoattack_standard_makes_an_entry(run: list[Evaluation]) -> None:
    with pytest.raises(UserError, match=r"a finished AutoAttack standard, .*; got pgd\(.*, keep=first\)$"):
        interop.robustbench_json(run[1:])
    renamed = with_checks(run[0], Check("G14", "attack identity", "pass", {"label": None}, "no published name"))
    with pytest.raises(UserError, match="a finished AutoAttack standard"):
        interop.robustbench_json([renamed])
    with pytest.raises(UserError, match="a finished AutoAttack standard"):
        interop.robustbench_json([Evaluation(run[0].header, run[0].rows, None)])
    with pytest.raises(UserError, match="got no rows file at all"):
        interop.robustbench_json([])
    with pytest.raises(UserError, match="has 11 of 12 images; let it finish first"):
        interop.robustbench_json([Evaluation(run[0].header, run[0].rows[1:], run[0].checks)])
