"""Whatever a user gets wrong, end to end: one line on stderr, exit code 2, no traceback, nothing computed is lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from robustmoe.cli import main

RECIPE = """
model = "ensemble(linear, experts=2, router=linear)"
data = "digits"
method = "at(pgd(linf(0.1), steps=1))"
epochs = 2
batch_size = 64
val_limit = 16
max_steps = 2
checkpoint_every = 1
threads = 1
attacks = ["fgsm(linf(0.1))"]
"""
EVALUATE = ["--limit", "6", "--curve", "none"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on digits: two steps, evaluated with one attack."""
    place = tmp_path_factory.mktemp("bad-inputs")
    (place / "tiny.toml").write_text(RECIPE)
    run = place / "run"
    assert main(["train", str(place / "tiny.toml"), "--out", str(run)]) == 0
    assert main(["evaluate", str(run), *EVALUATE]) == 0
    return place


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A copy of that run (``run``) and its recipe (``tiny.toml``) in the working directory."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "tiny.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    capsys.readouterr()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


Refused = Callable[..., str]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(argv): the message of a command that fails as it should, and leaves every file as it was."""

    def run(*argv: str, new: bool = False) -> str:
        before = contents(here)
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"robustmoe: [^\n]+\n", err), err
        assert "Traceback" not in err
        after = contents(here)
        assert {name: after.get(name) for name in before} == before
        assert new or set(after) == set(before)
        return err.removeprefix("robustmoe: ").rstrip("\n")

    return run


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "argv, message",
    [
        # what the recipe says
        ("train tiny.toml --model resnet81", r"unknown model 'resnet81'; did you mean '(resnet8|resnet18)'"),
        ("train tiny.toml --model ensemble(linaer)", "unknown name 'linaer'; did you mean 'linear'"),
        ("train tiny.toml --model ensemble(linear,expert=2)", "no argument 'expert'; did you mean 'experts'"),
        ("train tiny.toml --model ensemble(linear,k=9)", "k must be between 1 and the number of experts, 4; got 9"),
        ("train tiny.toml --model ensemble(linear,gate=hrad)", "gate"),
        ("train tiny.toml --method att(pgd(linf(0.1)))", "unknown method 'att'; did you mean 'at'"),
        ("train tiny.toml --method at(pgd(linf(0.1),step=3))", "'pgd' has no argument 'step'; did you mean 'steps'"),
        ("train tiny.toml --method at(pgd(linf(8)))", "an linf eps above 1 leaves the pixel range"),
        ("train tiny.toml --method at(pgd(linf(-1)))", "eps must be 0 or more, in pixels"),
        ("train tiny.toml --method pgd(linf(0.1))", "'pgd' is of kind 'attack', not 'method'"),
        ("train tiny.toml --optimizer sgdd", "unknown optimizer 'sgdd'; did you mean 'sgd'"),
        ("train tiny.toml --schedule cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("train tiny.toml --augment cropflip", "unknown augment 'cropflip'; did you mean 'crop_flip'"),
        ("train tiny.toml --data digit", "unknown data 'digit'; did you mean 'digits'"),
        ("train tiny.toml --val_attack pdg(linf(0.1))", "unknown attack 'pdg'; did you mean 'pgd'"),
        ("train tiny.toml --device gpu", "device 'gpu' cannot be used here .*; expected auto, cpu, cuda or cuda:N"),
        ("train misspelt.toml", r"unknown field 'epoch'; did you mean 'epochs'"),
        ("train tiny.tmol", r"there is no recipe 'tiny.tmol'"),
        # verbs and options
        ("trian tiny.toml", "unknown verb 'trian'; did you mean 'train'"),
        ("train tiny.toml --epoch 3", "unknown option '--epoch'; did you mean '--epochs'"),
        ("evaluate run --atack fgsm(linf(0.1))", "unknown option '--atack'; did you mean '--attack'"),
        # what is evaluated
        ("evaluate run --attack pdg(linf(0.1))", "unknown attack 'pdg'; did you mean 'pgd'"),
        ("evaluate run --attack pgd(linff(0.1))", "unknown name 'linff'; did you mean 'linf'"),
        ("evaluate run --attack pgd(linf(0.1),stepz=3)", "no argument 'stepz'; did you mean .*'steps'"),
        ("evaluate run --attack pgd(linf(0.1),steps=0)", "steps and restarts must be at least 1"),
        ("evaluate run --attack pgd(linf(0.1),step_size=-1)", "step_size must be above 0"),
        ("evaluate run --attack pgd(linf(0.1),objective=router_onyl)", "unknown name 'router_onyl'; .*'router_only'"),
        ("evaluate run --attack pgd(8/255)", "argument 'threat'"),
        ("evaluate run --attack __import__('os')", "unknown attack '__import__'"),
        ("evaluate run --data digts", "unknown data 'digts'; did you mean 'digits'"),
        ("evaluate run --split tset", "--split must be one of 'test', 'val', 'train'; got 'tset'"),
        ("evaluate run --limit 0", "the limit on images is 0, expected at least 1"),
        ("evaluate run --batch-size 0", "the batch size is 0, expected at least 1"),
        ("evaluate run --curve 0.1,7", "7 is no radius of the linf curve; expected numbers from 0 to 1"),
        ("evaluate run --device cuda:99", "device 'cuda:99' cannot be used here"),
        ("evaluate run --device tpu", "device 'tpu' cannot be used here"),
        ("evaluate rnu", "there is no run folder 'rnu'; did you mean 'run'"),
        ("evaluate tiny.toml", "'tiny.toml' is a file, not a run folder"),
        ("analyze rnu", "there is no run folder 'rnu'"),
        ("report run rnu", "there is no run folder 'rnu'"),
        ("list atacks", r"unknown kind or name 'atacks'; did you mean 'attack'"),
    ],
)  # fmt: skip
def test_a_name_or_number_that_is_wrong(argv: str, message: str, here: Path, refused: Refused) -> None:
    (here / "misspelt.toml").write_text(RECIPE.replace("epochs", "epoch"))
    assert re.search(message, refused(*argv.split()))


# ------------------------------------------------------------------------------------------------ data


def test_data_that_are_not_there(here: Path, refused: Refused) -> None:
    for verb in (["train", "tiny.toml"], ["evaluate", "run"]):
        assert "there is no file or folder" in refused(*verb, "--data", "cifar10(root='nowhere')")
        assert "there is no file or folder nowhere; run: apt-get" in refused(
            *verb, "--data", "fashion_mnist(root='nowhere')"
        )
        (here / "empty").mkdir(exist_ok=True)
        assert "holds none of cifar-10-python.tar.gz" in refused(*verb, "--data", "cifar10(root='empty')")


def test_data_that_are_damaged(here: Path, refused: Refused) -> None:
    (here / "c").mkdir()
    (here / "c" / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))  # the start of an archive
    message = refused("evaluate", "run", "--data", "cifar10(root='c')")
    assert re.search(r"has MD5 \w{32}, expected c58f3\w+: it is damaged, truncated or another file; download", message)
    (here / "f").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (here / "f" / f"{name}.gz").write_bytes(b"\x1f\x8b\x08\x00")
    assert "is not a whole gzip file" in refused("train", "tiny.toml", "--data", "fashion_mnist(root='f')")
    (here / "f" / "train-images-idx3-ubyte.gz").unlink()
    (here / "f" / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03" + (28).to_bytes(4, "big") * 3 + b"12")
    assert "18 bytes, expected 21968 for the sizes" in refused(
        "train", "tiny.toml", "--data", "fashion_mnist(root='f')"
    )


def folder_of_images(root: Path, classes: int, size: int, channels: int = 1) -> str:
    from PIL import Image

    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(5):
            colour = (10 * label + i,) * channels
            Image.new("RGB" if channels == 3 else "L", (size, size), colour if channels == 3 else colour[0]).save(
                root / f"class{label}" / f"{i}.png"
            )
    return f"folder(root='{root.name}', channels={channels})"


@pytest.mark.parametrize(
    "classes, size, channels, message",
    [
        (10, 9, 1, r"10 classes and images \(1, 8, 8\); the data have 10 classes and images \(1, 9, 9\)"),
        (3, 8, 1, r"10 classes and images \(1, 8, 8\); the data have 3 classes and images \(1, 8, 8\)"),
        (10, 8, 3, r"10 classes and images \(1, 8, 8\); the data have 10 classes and images \(3, 8, 8\)"),
    ],
)
def test_data_of_another_shape(
    classes: int, size: int, channels: int, message: str, here: Path, refused: Refused
) -> None:
    data = folder_of_images(here / "images", classes, size, channels)
    assert re.search(message, refused("evaluate", "run", "--data", data))


def test_a_damaged_image_is_told_of_before_anything_is_computed(here: Path, refused: Refused) -> None:
    """A truncated test image stops the training, whose images are whole; a truncated late one stops the evaluation."""
    data = folder_of_images(here / "images", 10, 8)
    whole = {file: file.read_bytes() for file in sorted((here / "images").rglob("*.png"))}
    for file in sorted(whole):
        file.write_bytes(whole[file][:45])
        message = refused("train", "tiny.toml", "--data", data, "--out", "other", new=True)
        assert str(file.relative_to(here)) in message
        file.write_bytes(whole[file])
        if file.name == "1.png":
            break
    assert not (here / "other" / "config.json").exists()


def test_a_data_set_that_has_changed_since_the_training(
    here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of_images(here / "images", 3, 8)
    assert main(["train", "tiny.toml", "--data", data, "--out", "mine"]) == 0
    evaluate = ["evaluate", "mine", *EVALUATE]
    capsys.readouterr()
    assert main(evaluate) == 0
    assert "have changed" not in capsys.readouterr().err
    shutil.copy(here / "images/class1/0.png", here / "images/class1/9.png")
    assert main([*evaluate, "--out", "again"]) == 0
    assert "warning: the training images of folder(root='images', channels=1) have changed" in capsys.readouterr().err
    (here / "images/class2").rename(here / "images/class0b")
    message = refused("evaluate", "mine", *EVALUATE)
    assert "trained on other classes than" in message
    assert "(such as 'class1', now 'class0b')" in message


def test_an_image_that_is_damaged(here: Path, refused: Refused) -> None:
    data = folder_of_images(here / "images", 10, 8)
    for file in (here / "images").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:45])
    message = refused("evaluate", "run", "--data", data, "--out", "other", new=True)
    assert re.search(r"images/class\d/\d\.png", message)


# ------------------------------------------------------------------------------------------------ checkpoints


def flip(content: bytes) -> bytes:
    return content[:12] + bytes(255 - byte for byte in content[12:40]) + content[40:]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[: len(content) // 2], "the file is damaged"),
        (lambda content: content[:4], "the file is damaged"),
        (lambda content: b"", "the file is damaged"),
        (flip, "the file is damaged"),
        (lambda content: b"\xff" * 8 + content[8:], "the file is damaged"),
        (lambda content: pickle.dumps({"a": 1}), "this is a pickle .*, which could run code when loaded; expected saf"),
    ],
)
def test_weights_that_are_damaged(damage: Callable[[bytes], bytes], message: str, here: Path, refused: Refused) -> None:
    weights = here / "run" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    said = refused("evaluate", "run", *EVALUATE)
    assert said.startswith("run/model.safetensors: ")
    assert re.search(message, said)


def test_weights_in_a_pickle_of_torch(here: Path, refused: Refused) -> None:
    torch.save({"a": torch.zeros(1)}, here / "run" / "model.safetensors")
    assert "this is a pickle" in refused("evaluate", "run")
    (here / "run" / "model.safetensors").unlink()
    assert "no such file; expected the weights of a run" in refused("evaluate", "run")


@pytest.mark.parametrize(
    "model, problem",
    [
        ("ensemble(linear, experts=3, router=linear)", "'experts.2.head.weight' is missing"),
        ("ensemble(small_cnn, experts=2, router=linear)", "'experts.0.conv1.weight' is missing"),
        ("linear", "'network.head.weight' is missing"),
    ],
)
def test_weights_of_another_architecture(model: str, problem: str, here: Path, refused: Refused) -> None:
    config = json.loads((here / "run" / "config.json").read_text())
    (here / "run" / "config.json").write_text(json.dumps({**config, "model": model}))
    message = refused("evaluate", "run")
    assert message.startswith("run/model.safetensors: these are the weights of another architecture: ")
    assert problem in message


def test_a_checkpoint_that_is_damaged(here: Path, refused: Refused) -> None:
    state = here / "run" / "state.pt"
    whole = state.read_bytes()
    resume = ["train", "tiny.toml", "--out", "run", "--resume", "--max_steps", "4"]
    for damaged in (whole[: len(whole) // 2], b"", whole[:50] + b"\x00" * 100 + whole[150:], pickle.dumps(print)):
        state.write_bytes(damaged)
        assert "run/state.pt: the checkpoint is damaged" in refused(*resume)
    state.write_bytes(whole)
    message = refused(*resume, "--model", "linear")
    assert (
        "was trained with model = 'ensemble(linear, experts=2, router=linear)', this command says 'linear'" in message
    )


def test_a_run_to_resume_that_is_not_there(here: Path, refused: Refused) -> None:
    assert "start it without --resume" in refused("train", "tiny.toml", "--out", "none", "--resume")


def test_a_folder_that_is_no_run(here: Path, refused: Refused) -> None:
    (here / "else").mkdir()
    for verb in ("evaluate", "analyze", "report"):
        refused(verb, "else")
    assert "not a run folder (it has no config.json)" in refused("evaluate", "else")
    for text, message in (
        ("{", "damaged"),
        ("{}", r"the fields \['image_shape', 'mean', .* are missing"),
        ("\xff", ""),
    ):
        (here / "else" / "config.json").write_bytes(text.encode("latin1"))
        assert re.search(message, refused("evaluate", "else"))
    assert "'run' already holds a run; add --resume" in refused("train", "tiny.toml", "--out", "run")
    assert "'tiny.toml' is a file, not a run folder" in refused("train", "tiny.toml", "--out", "tiny.toml")


# ------------------------------------------------------------------------------------------------ rows


def test_rows_of_other_work_are_kept(here: Path, refused: Refused) -> None:
    assert "holds other work: its n is 6, this one's is 5" in refused("evaluate", "run", "--limit", "5")
    (rows,) = (file for file in (here / "run" / "rows").glob("*.jsonl") if "examples" not in file.name)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:3], "what is this?\n", *lines[3:]]))
    for argv in (["evaluate", "run", *EVALUATE], ["analyze", "run"]):
        assert refused(*argv).endswith(f"run/rows/{rows.name}, line 4: not a JSON object; delete that line or the file")


# ------------------------------------------------------------------------------------------------ nowhere to write


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow past ``size`` bytes: a real failed write, also as root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("place", ["tiny.toml/other", "/proc/other", "/dev/null/other"])
def test_no_folder_can_be_made(place: str, refused: Refused) -> None:
    assert "cannot write" in refused("evaluate", "run", *EVALUATE, "--out", place)
    if place != "tiny.toml/other":
        refused("train", "tiny.toml", "--out", place)


def test_a_folder_without_permission(here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (here / "closed").mkdir(mode=0o500)
    assert "ask for the right to write there, or write to another place (--out" in refused(
        "evaluate", "run", *EVALUATE, "--out", "closed/other"
    )


def test_no_space_keeps_the_rows_that_are_there_and_goes_on_when_there_is_room(here: Path, refused: Refused) -> None:
    from robustmoe import records

    attack = ["--attack", "pgd(linf(0.1), steps=2)", "--limit", "40", "--curve", "none", "--batch-size", "4"]
    assert main(["evaluate", "run", *attack, "--out", "whole"]) == 0
    (whole,) = (file for file in (here / "whole" / "rows").glob("*.jsonl") if "examples" not in file.name)
    with no_file_larger_than(whole.stat().st_size // 2):
        refused_out = ["evaluate", "run", *attack, "--out", "part"]
        assert main(refused_out) == 2
    part = here / "part" / "rows" / whole.name
    kept = records.read(part).rows
    assert 0 < len(kept) < 40
    before = part.read_bytes()
    assert before.endswith(b"\n")
    assert main(refused_out) == 0
    assert part.read_bytes().startswith(before)
    assert records.read(part).rows == records.read(whole).rows


def test_no_space_message(here: Path, refused: Refused) -> None:
    with no_file_larger_than(500):  # the header does not fit
        message = refused("evaluate", "run", *EVALUATE, "--out", "part", new=True)
    assert re.fullmatch(
        r"cannot write part/rows/\S+: File too large; free some space, or write to another place \(.+\)", message
    )
    with no_file_larger_than(500):
        message = refused("train", "tiny.toml", "--out", "run2", new=True)
    assert message.startswith("cannot write run2/config.json: File too large")
    with no_file_larger_than(2000):
        message = refused("report", "run", "--out", "page.html")
    assert message.startswith("cannot write page.html: File too large")


@pytest.mark.parametrize("wrong", ["exit(3)", "(_ for _ in ()).throw(BaseException('x'))"])
def test_a_model_that_leaves_the_program_is_one_line(
    wrong: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"import torch\n\n\ndef make():\n    return lambda x: {wrong}\n"
    (here / "leaving.py").write_text(source)
    assert main(["evaluate", "--model", "leaving.py:make", "--data", "digits", *EVALUATE]) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"robustmoe: .*(SystemExit: 3|BaseException: x).*leaving.py, line 5\)", said[-1])


def test_a_run_whose_checkpoint_is_lost_does_not_start_anew(here: Path, refused: Refused) -> None:
    (here / "run" / "state.pt").unlink()
    metrics = here / "run" / "metrics.jsonl"
    line = json.loads(metrics.read_text())
    metrics.write_text("".join(json.dumps({**line, "epoch": epoch}) + "\n" for epoch in (1, 2)))
    message = refused("train", "tiny.toml", "--out", "run", "--resume")
    assert "metrics.jsonl tells of 2 epochs, and run/state.pt is not there" in message


def test_answers_of_checks_are_shown_where_they_cannot_be_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They took minutes."""
    from robustmoe import records
    from robustmoe.evaluation.checks import run

    answer = records.Check("G1", "gradient", "fail", 1.0, "There is none.")
    monkeypatch.setattr(run, "check_run", lambda *given, **more: records.Audit("m", [], 2, 0, [answer]))
    (here / "run" / "checks.json").mkdir()
    assert main(["check", "run", "--limit", "2"]) == 2
    out, err = capsys.readouterr()
    assert "There is none." in out
    assert err.startswith("robustmoe: cannot write run/checks.json: Is a directory; that path is a folder")
    (here / "run" / "checks.json").rmdir()
