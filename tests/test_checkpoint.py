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
import torch
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.routing import to_expert
from robustmoe.training import load_model
from robustmoe.training.checkpoint import (
    load_weights,
    read_config,
    read_state,
    read_weights,
    save_state,
    save_weights,
    start_from,
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
        assert file.metadata() == {"model": SPEC}


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
    with pytest.raises(UserError, match=r"state\.pt: no checkpoint to resume from"):
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
}


def test_a_state_comes_back_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    assert torch.equal(read_state(path)["model"]["w"], STATE["model"]["w"])
    whole = path.read_bytes()
    for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state\.pt: the checkpoint is (damaged|broken)"):
            read_state(path)
    for other in ([1, 2], {"model": {}}, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"state\.pt: the checkpoint is (damaged|broken)"):
            read_state(path)


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


# ------------------------------------------------------------------------------------------------ init

DENSE = "resnet8(width=4)"
DUAL = f"dual({DENSE}, {DENSE})"
MOE = f"ensemble({DENSE}, experts=3, router=small_cnn(width=4))"
OTHER = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """made(name, spec, ...): the run folder of a model whose every tensor is random, normalised by ``OTHER``."""

    def make(name: str, spec: str, mean: tuple[float, ...] = OTHER[0], std: tuple[float, ...] = OTHER[1]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = build_model(spec, 4, (3, 8, 8), mean, std, seed=len(name))
        for key, value in model.state_dict().items():
            if value.is_floating_point() and "normalise" not in key:
                value.add_(0.1 * torch.rand_like(value))
        save_weights(folder / "model.safetensors", model.state_dict(), spec)
        config = {"model": spec, "num_classes": 4, "image_shape": [3, 8, 8], "mean": mean, "std": std}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def starting(spec: str, init: str | Path, mean: tuple[float, ...] = (0.5,) * 3) -> RoutedModel:
    """A fresh model of another seed, started from ``init``."""
    model = build_model(spec, 4, (3, 8, 8), mean, seed=99)
    start_from(model, init)
    return model


@torch.no_grad()
def test_a_dense_run_fills_every_expert(
    made: Callable[..., Path], images: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the route, the ensemble answers as the dense run does: its normalisation has come along. The router is
    a fresh one's.
    """
    run, x = made("dense", DENSE), images(7)
    for source in (run, run / "model.safetensors"):
        model, dense = starting(MOE, source), load_model(run)
        said = "experts.0, experts.1, experts.2"
        assert capsys.readouterr().err == f"init: {run / 'model.safetensors'} into {said}\n"
        for i in range(3):
            assert torch.equal(model.run(x, forced=to_expert(model.run(x).trace, i)).logits, dense(x))
        fresh = build_model(MOE, 4, (3, 8, 8), seed=99)
        assert all(torch.equal(a, b) for a, b in zip(model.router.parameters(), fresh.router.parameters()))


@torch.no_grad()
def test_a_run_fills_both_halves_or_each_its_own(made: Callable[..., Path], images: Callable[..., Tensor]) -> None:
    """At alpha 0 and 1 a dual model is its half: logits bit for bit. The halves may be of any kinds."""
    dense, robust, moe, x = made("dense", DENSE), made("robust", DENSE), made("moe", MOE), images(5)
    for spec, init, halves in [
        (DUAL, dense, (dense, dense)),
        (f"dual({MOE}, {MOE})", moe, (moe, moe)),
        (DUAL, f"standard={dense}, robust={robust}", (dense, robust)),
        (f"dual({DENSE}, {MOE})", f"robust = {moe} ,standard={dense / 'model.safetensors'}", (dense, moe)),
    ]:
        model = starting(spec, init)
        for alpha, half in zip((0.0, 1.0), halves):
            assert torch.equal(model.at(alpha)(x), load_model(half)(x))
    shift = made("shift", DENSE, (0.1, 0.2, 0.3))
    model = starting(DUAL, f"standard={dense}, robust={shift}")
    assert torch.equal(model.at(0.0)(x), load_model(dense)(x))
    assert torch.equal(model.at(1.0)(x), load_model(shift)(x))
    mixed = starting(f"dual({DENSE}, {MOE})", dense)
    model = load_model(dense)
    assert torch.equal(mixed.at(0.0)(x), model(x))
    torch.testing.assert_close(mixed.at(1.0)(x), model(x))


@torch.no_grad()
def test_each_expert_from_its_own_run(made: Callable[..., Path], images: Callable[..., Tensor]) -> None:
    """And the router from a third, of another kind of model."""
    runs, x = [made("a", DENSE), made("bb", DENSE), made("ccc", "small_cnn(width=4)")], images(6)
    spec = f"ensemble({DENSE}, experts=4, router=small_cnn(width=4))"
    model = starting(spec, f"experts.0={runs[0]}, experts.3={runs[1]}, router={runs[2]}", OTHER[0])
    for i, run in ((0, runs[0]), (3, runs[1])):
        assert torch.equal(model.run(x, forced=to_expert(model.run(x).trace, i)).logits, load_model(run)(x))
    assert torch.equal(model.run(x).trace["router"].logits[:, 0], load_model(runs[2])(x))


def test_a_folder_whose_name_has_an_equals_sign(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a run folder before parts were, and still is; so is one behind the sign of a part."""
    run = made("lr=0.1, wd=0", DENSE)
    monkeypatch.chdir(run.parent)
    weights = read_weights(run / "model.safetensors")
    (run.parent / "lr=1").symlink_to(run)
    for init in ("lr=0.1, wd=0", "network=lr=1"):
        found = starting(DENSE, init).state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items()), init


@pytest.mark.parametrize(
    "spec, init, message",
    [
        (DENSE, "none.safetensors", r"none\.safetensors: no such file; expected the weights of a run \(model"),
        (DENSE, "none", "none: not a run folder"),
        (DENSE, "pickle.pth", r"pickle\.pth: this is a pickle .*Convert it with safetensors"),
        (DENSE, "broken.safetensors", r"broken\.safetensors: the file is damaged"),
        (DUAL, "standard=dense, robust=none", "none: not a run folder"),
        (DUAL, "standart=dense", r"no part 'standart'; did you mean 'standard'\? known: robust, standard$"),
        (DUAL, "standard.net=dense", "no part 'standard.net'; .*known: standard.network, standard.normalise$"),
        (MOE, "experts.3=dense", "no part 'experts.3'; .*known: experts.0, experts.1, experts.2$"),
        (MOE, "router.head.x=dense", "no part 'router.head.x'; .*known: router.conv1, router.conv2, router.head$"),
        (DUAL, "robust=dense, robust=dense", "the part 'robust' is named twice; expected each part once"),
        (DUAL, "standard=, robust=dense", "'standard' has no source; expected standard=RUN or standard=FILE"),
        (MOE, "experts=dense, experts.1=other", "dense/.* and other/.* both give 'experts.1.stem.weight', and differ"),
        (MOE, "experts.0=dense, experts.1=shift", "dense/.* and shift/.* both give 'normalise.mean', and differ"),
        (
            MOE,
            "conv",
            r"conv/.* fits nowhere in the model: experts.0.stages.0.0 lacks 'conv1.bias' \(2 of 4 names\); expected",
        ),
        (MOE, "router=dense", "dense/.* has no tensor of the part 'router''s; expected the run of a model"),
        (MOE, "wide", r"'network.stem.weight' has shape \(8, 3, 3, 3\), the model's is \(4, 3, 3, 3\); expected"),
    ],
)
def test_bad_sources_are_named(
    spec: str, init: str, message: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and the model is left alone. The halves of a dual model share one normalisation."""
    monkeypatch.chdir(tmp_path)
    for name, kind in {"dense": DENSE, "other": DENSE, "conv": "small_cnn", "wide": "resnet8(width=8)"}.items():
        made(name, kind)
    made("shift", DENSE, mean=(0.1, 0.2, 0.3))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pickle.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    model = build_model(spec, 4, (3, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        start_from(model, init)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_is_not_adapted(made: Callable[..., Path]) -> None:
    """Its head of other classes is an error, as before; its file, given as such, may differ there."""
    run = made("dense", DENSE)
    model = build_model(MOE, 6, (3, 8, 8))
    with pytest.raises(UserError, match=r"'network.head.weight' has shape \(4, 16\), the model's is \(6, 16\)"):
        start_from(model, run)
    heads = [expert.head.weight.clone() for expert in model.experts]
    start_from(model, run / "model.safetensors")
    weights = read_weights(run / "model.safetensors")
    for expert, head in zip(model.experts, heads):
        assert torch.equal(expert.head.weight, head)
        assert torch.equal(expert.stem.weight, weights["network.stem.weight"])
