"""Runs on the hub: pushed to and pulled from a stand-in (tests/hub_server.py), and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import robustmoe as rm
from hub_server import Hub, hub
from objective_infos import JOINT
from robustmoe import cli
from robustmoe import hub as module
from robustmoe.errors import UserError
from robustmoe.hub import folder_of, parsed
from robustmoe.records.weights import model_of
from robustmoe.reporting.sharing import model_card, share
from test_report import R1_FAILED, make_run


def outgoing(test: Callable[..., None]) -> Callable[..., None]:
    """Needs the extra hub; what its library does in deprecated ways is its own."""
    return pytest.mark.outgoing(pytest.mark.filterwarnings("default")(test))


CONFIG = {"model": "linear", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained model, with made-up rows."""
    place = tmp_path_factory.mktemp("run")
    attacks = (("fgsm(linf(8/255))", JOINT, 0.4),)
    run = make_run(place, name="dense", routed=False, attacks=attacks, curve=False, training=False, examples=False)
    trained = rm.zoo_model("digits_dense", place / "zoo")
    for name in module.FILES:
        shutil.copy(trained / name, run / name)
    return run


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, and a user who may write there."""
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.utils
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    with hub() as stand_in:
        huggingface_hub.utils.disable_progress_bars()
        api = huggingface_hub.HfApi(endpoint=stand_in.url)
        monkeypatch.setattr(module, "_api", lambda: (api, huggingface_hub.errors))
        yield stand_in


def test_what_a_name_on_the_hub_is() -> None:
    assert parsed("hub:me/a.b-c_d") == ("me/a.b-c_d", None)
    assert parsed("me/x@v1.0") == ("me/x", "v1.0")
    unlike = ("../..", "me/..", "-me/x", "me/x.", "mé/x", "me--you/x", "me/x@..", "me/x@a/../b", f"me/{'x' * 97}")
    for wrong in ("me", "hub:me", "a/b/c", "me/x@", "me/x y", "../x/y", "", *unlike):
        with pytest.raises(UserError, match=r"expected OWNER/NAME, or OWNER/NAME@REVISION"):
            parsed(wrong)


def test_no_two_repositories_share_a_folder() -> None:
    names = [
        ("a-b/c", None),
        ("a/b-c", None),
        ("a/b", "c"),
        ("a/b", "c/d"),
        ("a/b", "c-d"),
        ("a/b-c", "d"),
        ("a/b", None),
    ]
    folders = [folder_of(*name) for name in names]
    assert len(set(folders)) == len(names)
    assert {folder.parent for folder in folders} == {Path("runs")}


def test_a_card_says_what_its_reader_types(evaluated: Path, tmp_path: Path) -> None:
    assert 'rm.load_model(rm.pull("me/digits"))' in model_card(evaluated, "me/digits")
    assert "robustmoe evaluate hub:me/digits" in model_card(evaluated, "me/digits")
    assert 'rm.load_model("path/to/this/folder")' in model_card(evaluated)
    assert "no check speaks against this number." in model_card(evaluated)
    bad = make_run(tmp_path, routed=True, attacks=(("fgsm(linf(8/255))", JOINT, 0.4),), r1=R1_FAILED, examples=False)
    shutil.copy(evaluated / "config.json", bad / "config.json")
    assert "do NOT quote this number." in model_card(bad)
    share(evaluated, tmp_path / "shared")
    rm.load_model(tmp_path / "shared")


def test_without_its_library_one_line_names_the_extra(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for command in (["push", str(evaluated), "me/x"], ["pull", "me/x"], ["evaluate", "hub:me/x"]):
        assert cli.main(command) == 2
        assert "pip install 'robustmoe[hub]'" in capsys.readouterr().err


def test_only_whole_weights_of_ours_are_known(evaluated: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    good = (evaluated / "model.safetensors").read_bytes()
    weights.write_bytes(good)
    assert model_of(weights) == "resnet8(width=16)"
    torch.save({"x": torch.zeros(2)}, tmp_path / "saved")
    damaged = good[:-1] + bytes([good[-1] ^ 1])
    bads = (damaged, good[:-4], good[:5], b"", pickle.dumps({}), (tmp_path / "saved").read_bytes(), b"\xff" * 64)
    for bad in bads:
        weights.write_bytes(bad)
        assert model_of(weights) is None


@outgoing
def test_a_run_comes_back_equal_to_the_byte(evaluated: Path, server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(evaluated), "me/digits"]) == 0
    repository = server.repositories["me/digits"]
    assert repository.private
    _, files = list(repository.commits.items())[-1]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert "**Verdict** on the worst of 1 at L∞ ≤ 8/255: no check speaks against" in files["README.md"].decode()
    assert cli.main(["pull", "me/digits", "--out", "theirs"]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (Path("theirs") / name).read_bytes() == (evaluated / name).read_bytes() == files[name]
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(rm.load_model(rm.pull("me/digits"))(x), rm.load_model(evaluated)(x))
    assert rm.pull("me/digits") == Path("runs/hub-me--digits"), "once: it is there"
    capsys.readouterr()
    assert cli.main(["evaluate", "hub:me/digits", "--attack", "fgsm(linf(0.1))", "--limit", "2"]) == 0
    assert cli.main(["pull", "me/digits", "--out", "theirs"]) == 2
    assert "already holds a run" in capsys.readouterr().err


@outgoing
def test_a_revision_can_be_pinned(evaluated: Path, server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(evaluated), "me/digits", "--public"]) == 0
    assert not server.repositories["me/digits"].private
    first = list(server.repositories["me/digits"].commits)[-1]
    server.put("me/digits", {"README.md": b"---\nlibrary_name: robustmoe\n---"})
    assert cli.main(["pull", "me/digits"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert cli.main(["pull", f"me/digits@{first}"]) == 0
    assert cli.main(["pull", "me/digits", "--revision", first, "--out", "b"]) == 0
    assert cli.main(["pull", "me/digits@v9"]) == 2
    assert "has no such revision" in capsys.readouterr().err
    assert cli.main(["pull", "me/digits@v9", "--revision", "v8"]) == 2
    assert cli.main(["push", str(evaluated), "me/digits@v9"]) == 2


@outgoing
@pytest.mark.parametrize("at", ["PUT /lfs", "POST .*/commit", "POST .*/preupload"])
def test_a_push_that_is_cut_off_leaves_the_repository_as_it_was(
    at: str, evaluated: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub tries a few times
    server.broken = at
    assert cli.main(["push", str(evaluated), "me/digits"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("robustmoe: the hub cannot be reached for me/digits (")
    assert len(server.repositories["me/digits"].commits) == 1
    server.broken = None
    assert cli.main(["push", str(evaluated), "me/digits"]) == 0


@outgoing
@pytest.mark.parametrize("at", ["GET .*model.safetensors", "GET .*config.json", "GET /api/models"])
def test_a_pull_that_is_cut_off_leaves_nothing(
    at: str, evaluated: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert cli.main(["push", str(evaluated), "me/digits"]) == 0
    server.broken = at
    assert cli.main(["pull", "me/digits", "--out", "theirs"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("robustmoe: the hub cannot be reached for me/digits (")
    assert not Path("theirs").exists()
    server.broken = None
    assert cli.main(["pull", "me/digits", "--out", "theirs"]) == 0


@outgoing
def test_what_is_no_run_of_ours_is_refused(
    evaluated: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {name: (evaluated / name).read_bytes() for name in module.FILES}
    config = json.loads(good["config.json"])
    weights = bytearray(good["model.safetensors"])
    weights[-1] ^= 1
    for files, said in (
        ({"pytorch_model.bin": b"\x80\x04"}, "is not a robustmoe run: it has no config.json"),
        ({**good, "model.safetensors": bytes(weights)}, "not a whole safetensors file"),
        ({**good, "model.safetensors": pickle.dumps([1])}, "not a whole safetensors file"),
        ({**good, "config.json": b"{"}, "damaged"),
        ({**good, "config.json": json.dumps(CONFIG).encode()}, "put together"),
        ({**good, "config.json": json.dumps({**config, "model": "evil.py:make"}).encode()}, "code that is not in it"),
        ({**good, "config.json": b" " * (1 << 20) + good["config.json"]}, "expected at most 1048576"),
    ):
        server.put("them/x", files)
        assert cli.main(["pull", "them/x"]) == 2
        assert said in (line := capsys.readouterr().err.splitlines()[-1]), line
        assert not Path("runs").exists()
    server.put("them/x", {"pytorch_model.bin": b"\x80\x04"})
    assert cli.main(["push", str(evaluated), "them/x"]) == 2
    assert "holds something else" in capsys.readouterr().err
    server.put("them/x", {"README.md": b"somebody's", "config.json": b"{}"})
    assert cli.main(["push", str(evaluated), "them/x"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert cli.main(["pull", "them/nothing"]) == 2
    assert "there is no repository them/nothing" in capsys.readouterr().err


@outgoing
def test_who_may_not_write_is_told(
    evaluated: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert cli.main(["push", str(evaluated), "me/x"]) == 2
    assert "401" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert cli.main(["push", str(evaluated), "me/x"]) == 2
    assert "run hf auth login" in capsys.readouterr().err
    assert server.repositories == {}
    run = tmp_path / "unmeasured"
    shutil.copytree(evaluated, run)
    shutil.rmtree(run / "rows")
    asked = len(server.asked)
    assert cli.main(["push", str(run), "me/x"]) == 2
    assert "has no rows yet" in capsys.readouterr().err
    assert len(server.asked) == asked, "before the hub is asked"


@outgoing
def test_a_pull_that_was_stopped_goes_on(evaluated: Path, server: Hub) -> None:
    assert cli.main(["push", str(evaluated), "me/digits"]) == 0
    folder = Path("runs/hub-me--digits")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    assert rm.load_model(rm.pull("me/digits")) is not None
    (other := Path("mine")).mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        rm.pull("me/digits", other)
    assert (other / "README.md").read_text() == "mine"
