"""`robustmoe certify`: the engine on models whose certificates have closed forms, its file, its alarm, its verb."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe import records
from robustmoe.certification import Bounds, Certificate, Certifier
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation import certify_run
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.records import Certificates, Proof
from robustmoe.training.checkpoint import save_weights
from test_dissection import make_trained
from test_report import make_header


def make_plane() -> nn.Module:
    """Two classes of images (1, 2, 2): z_0 - z_1 = x_0 - 2 x_1."""
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    return nn.Sequential(nn.Flatten(), linear)


def four_images() -> Tensor:
    """Margins of class 0 by hand: 0.6, 0.15, -0.3, 0.06; far enough from 0 and 1 that the pixel box cuts no ball."""
    first = torch.tensor([[0.8, 0.1], [0.75, 0.3], [0.5, 0.4], [0.66, 0.3]])
    return torch.cat([first, torch.full((4, 2), 0.5)], 1).view(4, 1, 2, 2)


def without_time(found: Certificates) -> list[Proof]:
    return [dataclasses.replace(row, seconds=0.0) for row in found.rows]


# ------------------------------------------------------------------------------------------------ a model in hand


def test_bounds_that_take_long_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every layer and halving, inside a batch: minutes go by there."""
    monkeypatch.setenv("ROBUSTMOE_PROGRESS", "0")
    monkeypatch.setattr("robustmoe.certification.bounds.MEMORY", 2**12)
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 2))
    rm.certify(deep, four_images(), [0, 0, 0, 1], certifiers="bounds(l2(0.4), how=crown, search=1)", num_classes=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "neurons" in line]
    head = "certify, bounds(l2(0.4), how=crown, search=1): 0/4 images, radius"
    assert {line[: len(head) + 7] for line in lines} == {f"{head} 1 of 2", f"{head} 2 of 2"}
    first = [line for line in lines if "1 of 2, step" in line]
    steps = sorted({line.split("step ")[1].split(",")[0] for line in first})
    assert len(steps) == 2, "both layers that a ReLU follows"
    assert len(first) > 6, "in several parts each"
    assert all(line.endswith(" neurons") for line in first)


def test_a_plane_has_its_distance_as_radius() -> None:
    """|x_0 - 2 x_1| / 3 in linf: the margin over the l1 norm of its gradient. Bisection of [0, 2 eps] or so: the radius
    claimed is below the true one, by eps / 64 at most where that is above eps, by eps / 2^6 below it.
    """
    (found,) = rm.certify(make_plane(), four_images(), [0, 0, 0, 1], certifiers="bounds(linf(0.05))", num_classes=2)
    assert [row.prediction for row in found.rows] == [0, 0, 1, 0]
    true = [0.6 / 3, 0.15 / 3, 0.3 / 3, 0.06 / 3]
    for row, distance in zip(found.rows, true, strict=True):
        reached = min(distance, 0.1)  # up to twice eps
        assert reached - 0.05 / 60 <= row.radius <= distance
        assert (row.rule, row.stable, row.reachable) == ("bounds", 1.0, 1)
    assert [row.reason == "" for row in found.rows] == [True, False, True, False], "0.05 itself is not proven strictly"
    assert (found.subject, found.done, found.header.attack) == ("model", True, None)
    assert (found.header.norm, found.header.eps) == ("linf", 0.05)
    assert set(found.radii()) == {0, 1}, "the images whose prediction is the label"


def test_evaluate_leaves_certified_images_out(tmp_path: Path) -> None:
    """Radii 0.1, 0.0499, and two images that are wrong: at eps 0.06 one image is not attacked, and no other is."""
    x, y = four_images(), [0, 0, 0, 1]
    plane = make_plane()
    (found,) = rm.certify(plane, x, y, certifiers="bounds(linf(0.05))", num_classes=2)
    rm.evaluate(
        plane, x, y, attacks=["pgd(linf(0.06), steps=20)"], certified=found.radii(), out=tmp_path, num_classes=2
    )
    path = next(path for path in tmp_path.glob("*.jsonl") if ".examples" not in path.name)
    rows = records.read(path).rows
    assert [row.part for row in rows] == ["certified", "", "", ""]
    assert [row.adversarial for row in rows] == [0, 1, 1, 0]
    assert rows[1].size["linf"] > found.radii()[1], "what breaks it is farther than what is proven"


def test_a_smoothed_model_is_another_model(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    (found,) = rm.certify(
        tiny("ensemble_hard"), images(3), [0, 1, 2], certifiers="smoothing(n0=8, n=16)", num_classes=4
    )
    assert found.subject == "smoothed model"
    assert all(row.reachable is None and row.proven is None for row in found.rows)
    with pytest.raises(UserError, match="are of the smoothed model: an attack on the model itself may leave none"):
        found.radii()


def test_the_answer_of_an_image_is_its_own(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Not of its batch; and the model, in training mode, comes back as it was."""
    model, x, y = tiny("ensemble_hard").train(), images(5), [0, 1, 2, 3, 0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for spec in ("bounds(linf(0.01), how=ibp, search=2)", "smoothing(n0=8, n=16)"):
        one, five = (
            without_time(rm.certify(model, x, y, certifiers=spec, num_classes=4, batch_size=size)[0]) for size in (1, 5)
        )
        for a, b in zip(one, five, strict=True):
            assert a.radius == pytest.approx(b.radius, abs=1e-9)
            assert dataclasses.replace(a, radius=0.0) == dataclasses.replace(b, radius=0.0)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass(frozen=True)
class Loose(Certifier):
    """A user's certifier that gives what it is told."""

    radius: float = 0.1
    missing: int = 0

    @property
    def norm(self) -> Any:
        return "linf"

    @property
    def eps(self) -> float:
        return 0.1

    def certify(self, model: RoutedModel, x: Tensor, noise: Noise) -> list[Certificate]:
        return [Certificate(0, self.radius, "told", None, None, "")] * (len(x) - self.missing)


def test_no_certifier_is_trusted() -> None:
    x, y = four_images(), [0, 0, 0, 1]
    assert len(rm.certify(make_plane(), x, y, certifiers=Loose(), num_classes=2)[0].rows) == 4
    with pytest.raises(UserError, match="Loose gives a radius of nan; expected 0 or more"):
        rm.certify(make_plane(), x, y, certifiers=Loose(float("nan")), num_classes=2)
    with pytest.raises(UserError, match="Loose gives 3 certificates for 4 images; expected one each"):
        rm.certify(make_plane(), x, y, certifiers=Loose(missing=1), num_classes=2)
    with pytest.raises(UserError, match="the batch size is 0, expected at least 1"):
        rm.certify(make_plane(), x, y, certifiers=Loose(), num_classes=2, batch_size=0)


# ------------------------------------------------------------------------------------------------ a run folder

SPEC = "bounds(linf(0.002), how=ibp, search=2)"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that `Bounds` is asked about; a size is put there before it can fail."""
    real, sizes = Bounds.certify, []

    def counted(self: Bounds, model: RoutedModel, x: Tensor, noise: Noise) -> list[Certificate]:
        sizes.append(len(x))
        return real(self, model, x, noise)

    monkeypatch.setattr(Bounds, "__call__", counted)
    return sizes


def test_a_stopped_run_goes_on_and_a_longer_one_extends_it(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trained(tmp_path / "run")
    write, written = Certificates.write, []

    def stopped(found: Certificates, folder: Path) -> None:
        written.append(write(found, folder))
        raise KeyboardInterrupt

    with monkeypatch.context() as within:
        within.setattr(Certificates, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            certify_run(run, certifiers=[SPEC], limit=5, batch_size=2)
    (path,) = written
    assert path == run / "certificates" / "bounds-linf-0.002-how-ibp-search-2.json"
    (left,) = Certificates.read_all(run)
    assert (len(left.rows), left.done) == (2, False)
    asked.clear()
    (whole,) = certify_run(run, certifiers=[SPEC], limit=5, batch_size=2)
    assert (asked, whole.done, Certificates.read_all(run)) == ([2, 1], True, [whole])
    asked.clear()
    assert certify_run(run, certifiers=[SPEC], limit=5, batch_size=4) == (whole,), (
        "the batch size is not part of the work"
    )
    assert certify_run(run, certifiers=[SPEC], limit=3) == (whole,), "fewer images do not throw the others away"
    assert asked == []
    (longer,) = certify_run(run, certifiers=[SPEC], limit=7)
    assert (asked, len(longer.rows), longer.header.n, longer.done) == ([2], 7, 7, True)
    assert longer.rows[:5] == whole.rows
    assert capsys.readouterr().err == "", "nothing was made anew"
    path.unlink()
    (again,) = certify_run(run, certifiers=[SPEC], limit=7, batch_size=3)
    assert without_time(again) == without_time(longer), "as if never stopped"


def test_other_work_is_made_anew(tmp_path: Path, asked: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run")
    certify_run(run, certifiers=[SPEC], limit=2)
    certify_run(run, certifiers=[SPEC], limit=2, seed=3)
    assert "bounds-linf-0.002-how-ibp-search-2.json is of another seed; it is kept as" in capsys.readouterr().err
    model = "ensemble(linear, experts=2, router=linear, gate=straight_through)"
    save_weights(run / "model.safetensors", build_model(model, 10, (1, 8, 8), seed=5).state_dict(), model)
    certify_run(run, certifiers=[SPEC], limit=2, seed=3)
    assert "is of another model hash; it is kept as" in capsys.readouterr().err
    assert asked == [2, 2, 2]
    assert len(Certificates.read_all(run)) == 1, "what was set aside is no result of the run any more"
    certify_run(run, certifiers=[SPEC, "bounds(linf(0.002), how=ibp, search=1)", SPEC], limit=2, seed=3)
    assert asked == [2, 2, 2, 2], "one certifier was new, and one named twice"
    assert len(list((run / "certificates").glob("*.json"))) == 2


def test_the_default_is_the_ball_of_the_training(tmp_path: Path) -> None:
    (found,) = certify_run(make_trained(tmp_path / "run"), limit=1)
    assert found.certifier == "bounds(linf(0.05))"
    run = make_trained(tmp_path / "l1")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"threat": "l1(12)"}))
    with pytest.raises(UserError, match=r"trained for l1, for which there are no bounds; name a --certifier, such as"):
        certify_run(run, limit=1)


def test_a_broken_certificate_is_an_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in which someone wrote a radius that no bound gave; the attacks on the run say so, on the command line, in
    the Markdown and on the page. With the true radii there is no alarm.
    """
    run = make_trained(tmp_path / "run")
    attack = ["evaluate", str(run), "--attack", "pgd(linf(0.3), steps=5)", "--limit", "20", "--curve", "none"]
    assert main(attack) == 0
    command = ["certify", str(run), "--certifier", "bounds(linf(0.3), how=ibp)", "--limit", "20"]
    capsys.readouterr()
    assert main(command) == 0
    assert "!" not in capsys.readouterr().out
    (found,), (rows,) = Certificates.read_all(run), (records.read(each).rows for each in records.rows_files(run))
    broken = [row.index for row in rows if row.clean != row.adversarial]
    assert broken
    false = [dataclasses.replace(row, radius=0.31) if row.index == broken[0] else row for row in found.rows]
    dataclasses.replace(found, rows=false).write(run)
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"ALARM: image {broken[0]} is certified as {found.rows[broken[0]].prediction} up to linf 0.31, but" in err
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert '<div class="alarm"' in (tmp_path / "page.html").read_text()
    assert f"Image {broken[0]} is certified as" in (tmp_path / "page.md").read_text()


# ------------------------------------------------------------------------------------------------ the file


def record(**changes: Any) -> Certificates:
    rows = [
        Proof(0, 3, 3, 0.1, "all reachable experts", 1, 1, 1.0, "", 0.5),
        Proof(1, 4, -1, 0.0, "", None, None, 0.25, "too few", 0.5),
    ]
    header = make_header(n=2, attack=None, objective=None, eps=0.1)
    return Certificates(**{"header": header, "certifier": SPEC, "subject": "model", "rows": rows, **changes})


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert Certificates.read(tmp_path, SPEC) is None
    path = record().write(tmp_path)
    assert path == Certificates.path(tmp_path, SPEC)
    assert Certificates.read(tmp_path, SPEC) == record()
    assert Certificates.read(tmp_path, "another") is None
    assert Certificates.read_all(tmp_path) == [record()]
    assert (record().seconds, record().done, record().radii()) == (1.0, True, {0: 0.1})


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("kind",), "header", "not of the kind certificates: expected"),
        (("version",), 9, "certificates of version 9, this robustmoe reads version 3"),
        (("subject",), "moon", "field 'subject' must be one of model, smoothed model, got 'moon'"),
        (("header", "kind"), "row", "field 'header.kind' must be 'header', got 'row'"),
        (("extra",), 1, "certificates: unknown field 'extra'"),
        (("rows", 0), 3, "field 'rows[0]' must be an object, got 3"),
        (("rows", 0, "radius"), -1.0, "field 'rows[0].radius' must be a number of at least 0.0, got -1"),
        (("rows", 0, "radius"), float("nan"), "field 'rows[0].radius' must be a number of at least 0.0, got nan"),
        (("rows", 0, "stable"), "yes", "field 'rows[0].stable' must be a number or null, got 'yes'"),
        (("rows", 1, "index"), 0, "an image has two rows"),
        (("header", "n"), 1, "it has 2 images, more than the 1 it is about"),
    ],
)
def test_a_damaged_file_gets_one_line(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    path = record().write(tmp_path)
    data = json.loads(path.read_text())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        Certificates.read_all(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("makes it anew")


def test_an_empty_file(tmp_path: Path) -> None:
    record().write(tmp_path).write_text("")
    with pytest.raises(UserError, match="delete it, and `robustmoe certify` makes it anew"):
        Certificates.read(tmp_path, SPEC)


# ------------------------------------------------------------------------------------------------ the verb


def test_the_verb_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One certifier of the model, one of what noise makes of it; both in the table, the JSON, and resumed for free."""
    run = make_trained(tmp_path / "run")
    both = ["--certifier", SPEC, "--certifier=smoothing(n0=8, n=16)"]
    assert main(["certify", str(run), "--limit", "4", *both]) == 0
    out = capsys.readouterr().out
    assert f"What {SPEC} proves" in out
    assert "smoothing(n0=8, n=16) on 4 images of digits (test), of the smoothed model" in out
    assert out.rstrip().endswith(f"written to {run}/certificates; report shows it")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    found = json.loads((tmp_path / "page.json").read_text())["runs"][0]["certificates"]
    assert [(one["subject"], one["n"], one["done"]) for one in found] == [
        ("model", 4, True), ("smoothed model", 4, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, message",
    [
        (["--certifier", "bound(linf(0.1))"], "unknown certifier 'bound'; did you mean 'bounds'"),
        (["--certifier", "bounds("], "cannot read 'bounds('"),
        (["--certifier", "bounds(linf(0))"], "a certificate needs an eps above 0; got 0"),
        (["--certifier", "bounds(l1(12))"], "bounds are for linf and l2 balls; got l1"),
        (["--certifier", "smoothing(sigma=0)"], "sigma must be above 0"),
        (["--limit", "0"], "the limit on images is 0"),
        (["--batch-size", "0"], "the batch size is 0"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trained(tmp_path / "run")
    assert main(["certify", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_a_transformer_is_bounded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "patch=4, width=8, depth=1, heads=2"
    model = {"routed": f"vit_moe(tiny, {shape}, experts=3, k=2, placement=(0,))", "dense": f"vit({shape})"}
    run = make_trained(tmp_path / "run", model[kind])
    words = ["certify", str(run), "--limit", "2", "--certifier", "bounds(linf(0.0001), search=0)"]
    assert main(words) == 0
    assert "Of 2 images" in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["choice=expert", "members=3, k=1", "capacity=1.0, k=1", "plan=sinkhorn"])
def test_a_transformer_whose_tokens_depend_on_each_others_routes_is_refused_in_one_line(
    odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"vit_moe(tiny, patch=4, width=8, depth=1, heads=2, experts=3, placement=(0,), {odd})"
    run = make_trained(tmp_path / "run", model)
    assert main(["certify", str(run), "--limit", "2"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "smoothing(" in err, "what does certify it"
    if odd == "choice=expert":
        assert main(["certify", str(run), "--limit", "2", "--certifier", "smoothing(n0=8, n=16)"]) == 0


def test_no_run_and_damaged_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", str(tmp_path / "none")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    run = make_trained(tmp_path / "run")
    (run / "model.safetensors").write_bytes(b"damaged")
    assert main(["certify", str(run)]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "model.safetensors" in err) == (1, True)
