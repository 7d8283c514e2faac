"""Files of a run folder: what is written comes back, and what is damaged is named in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.training import load_model
from robustmoe.training.checkpoint import (
    load_weights,
    read_config,
    read_state,
    read_weights,
    save_state,
    save_weights,
)

SPEC = "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4))"


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., RoutedModel]) -> Path:
    model = tiny("pathway")
    save_weights(tmp_path / "model.safetensors", model.state_dict(), SPEC)
    config = {"model": SPEC, "num_classes": 4, "image_shape": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_saved_model_comes_back_bit_for_bit(
    run: Path, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, loaded = tiny("pathway"), load_model(run)
    assert not any(module.training for module in loaded.modules())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(images(6)), model(images(6)))
    with safetensors.safe_open(run / "model.safetensors", "pt") as file:
        assert file.metadata()["model"] == SPEC
        assert sorted(file.metadata()) == ["model", "sha256"]


def test_equal_weights_are_equal_files(run: Path, tiny: Callable[..., RoutedModel]) -> None:
    for number in range(5):
        save_weights(run / f"{number}", tiny("pathway").state_dict(), SPEC)
        assert (run / f"{number}").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_missing_file_or_folder(run: Path) -> None:
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file; expected the weights of a run"):
        load_model(run)
    with pytest.raises(UserError, match="not a run folder"):
        load_model(run / "elsewhere")
    with pytest.raises(UserError, match=r"state\.pt is not there: no checkpoint to resume from"):
        read_state(run / "state.pt")


def test_truncated_weights_at_every_kind_of_place(run: Path) -> None:
    """Nothing, inside the header's length, inside the header, inside the first and the last tensor."""
    path = run / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 5, 8, header // 2, header, header + 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: the file is (damaged|broken)"):
            read_weights(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=r"model\.safetensors: the file is (damaged|broken)"):
        read_weights(path)


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must not run > TRAPPED",)


def test_a_pickle_is_refused_unread(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    path = run / "model.safetensors"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"this is a pickle .*expected safetensors\. Convert it with"):
        read_weights(path)
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
        with pytest.raises(UserError, match="this is a pickle"):
            read_weights(path)
        (run / "state.pt").write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=r"state\.pt: the checkpoint is (damaged|broken)"):
            read_state(run / "state.pt")
    torch.save({"model": Trap()}, run / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt: the checkpoint is (damaged|broken)"):
        read_state(run / "state.pt")
    assert not (run / "TRAPPED").exists()


def test_weights_of_another_architecture_name_the_first_tensor(run: Path, tiny: Callable[..., RoutedModel]) -> None:
    state = tiny("pathway").state_dict()
    first, *_ = state
    path = run / "model.safetensors"
    model = tiny("pathway")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing = {name: value for name, value in state.items() if name != first}
    with pytest.raises(UserError, match=rf"another architecture: '{first}' is missing \(1 differences\)"):
        load_weights(model, missing, path)
    with pytest.raises(UserError, match="another architecture: 'extra' is not part of the model"):
        load_weights(model, {**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=rf"'{first}' has shape \(2, 2\), the model's is"):
        load_weights(model, {**state, first: torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match=rf"'{first}' is of torch\.bool, the model's of torch\.float32"):
        load_weights(model, {**state, first: state[first] > 0}, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_weights(path, tiny("dense").state_dict(), "resnet8(width=4)")
    with pytest.raises(UserError, match=r"model\.safetensors: these are the weights of another architecture: '"):
        load_model(run)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", r"the file is (damaged|broken)"),
        ('{"model": "resnet8"', r"the file is (damaged|broken)"),
        ("[]", r"the file is (damaged|broken) \(not a JSON object\)"),
        ("7", r"the file is (damaged|broken) \(not a JSON object\)"),
        ("{}", "the fields .*'image_shape'.* are missing"),
        ('{"model": "resnet8", "num_classes": 4}', r"the fields \['image_shape', 'mean', 'std'\] are missing"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", r"the file is (damaged|broken)"),
    ],
)
def test_a_damaged_config_is_named(text: str, said: str, run: Path) -> None:
    (run / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"config\.json: {said}"):
        read_config(run)


def test_a_config_that_names_an_unknown_model(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model": "resnet9"}))
    with pytest.raises(UserError, match="resnet9"):
        load_model(run)


STATE = {
    "model": {"w": torch.arange(3.0)},
    "optimisers": [],
    "average": None,
    "rng": torch.get_rng_state(),
    "progress": {},
    "run": "0",
}


def test_a_state_comes_back_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    assert torch.equal(read_state(path)["model"]["w"], STATE["model"]["w"])
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:1],
        whole[: len(whole) // 2],
        whole[:-1],
        b"not a checkpoint",
        whole + b"x",
        whole[85:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state\.pt: the checkpoint is damaged \(its SHA-256 is not the one"):
            read_state(path)
    for other in ([1, 2], {"model": {}}, torch.zeros(2), {**STATE, "more": 1}):
        save_state(path, {"state": other} if not isinstance(other, dict) else other)
        with pytest.raises(UserError, match=r"state\.pt: the checkpoint is damaged \(it has not the fields"):
            read_state(path)
    save_state(path, {**STATE, "model": Trap()})
    with pytest.raises(UserError, match=r"state\.pt: the checkpoint is damaged \(UnpicklingError\)"):
        read_state(path)


def test_every_flipped_bit_of_weights_and_state_is_noticed(run: Path) -> None:
    """One bit of each byte of the beginning, and of some of the rest."""
    save_state(run / "state.pt", STATE)
    for name, read in (("model.safetensors", read_weights), ("state.pt", read_state)):
        path = run / name
        whole = bytearray(path.read_bytes())
        for at in [*range(120), *range(120, len(whole), 1 + len(whole) // 100)]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            with pytest.raises(UserError, match=r"(model\.safetensors: the file|state\.pt: the checkpoint) is damaged"):
                read(path)
        path.write_bytes(whole)
        read(path)


def test_weights_of_another_tool_need_no_digest(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", metadata)
        assert torch.equal(read_weights(tmp_path / "w.safetensors")["w"], torch.ones(2))


def test_no_space_leaves_the_file_before_it(run: Path, tiny: Callable[..., RoutedModel]) -> None:
    path, state = run / "model.safetensors", tiny("pathway", seed=1).state_dict()
    before = path.read_bytes()
    save_state(run / "state.pt", STATE)
    old_state = (run / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        said = f"{os.strerror(errno.EFBIG)}; free some space"
        with pytest.raises(UserError, match=rf"cannot write .*model\.safetensors: {said}"):
            save_weights(path, state, SPEC)
        with pytest.raises(UserError, match=rf"cannot write .*state\.pt: {said}"):
            save_state(run / "state.pt", STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert (run / "state.pt").read_bytes() == old_state
    assert sorted(file.name for file in run.iterdir()) == ["config.json", "model.safetensors", "state.pt"]
