"""What training starts from: names that fit, parts, upcycled experts of tokens, and sources that do not fit. (Files of
vision transformers: test_vit.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, TokenMoE, build_model
from robustmoe.models.vit_moe import ViTMoEModel
from robustmoe.routing import Tape, to_expert
from robustmoe.training import load_model
from robustmoe.training.checkpoint import read_weights, save_weights
from robustmoe.training.starting import start_from

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


def starting(
    spec: str, init: str | Path, mean: tuple[float, ...] = (0.5,) * 3, std: tuple[float, ...] = (0.5,) * 3
) -> RoutedModel:
    """A fresh model of another seed, started from ``init``."""
    model = build_model(spec, 4, (3, 8, 8), mean, std, seed=99)
    start_from(model, init)
    return model


def test_a_model_of_the_zoo_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo = load_model("zoo:digits_dense").state_dict()
    mixture = "ensemble(resnet8(width=16), experts=2, router=linear)"
    for init, spec, name in (
        ("zoo:digits_dense", "resnet8(width=16)", "network.stem.weight"),
        ("experts.1 = zoo:digits_dense", mixture, "experts.1.stem.weight"),
    ):
        model = build_model(spec, 10, (1, 8, 8), (0.5,), (0.5,), seed=99)
        start_from(model, init)
        assert torch.equal(model.state_dict()[name], zoo["network.stem.weight"])
    for init in ("zoo:nothing", "experts.1=zoo:nothing"):
        with pytest.raises(UserError, match="there is no model 'nothing' in the zoo"):
            start_from(model, init)


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers(dtype: torch.dtype, made: Callable[..., Path]) -> None:
    """A tensor of truth values would be taken as zeros and ones; half precision is taken."""
    file = made("dense", DENSE) / "model.safetensors"
    weights = read_weights(file)
    name = "network.stem.weight"
    model = build_model(DENSE, 4, (3, 8, 8))
    safetensors.torch.save_file({**weights, name: weights[name].to(dtype)}, file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"'{name}' is of {dtype}, the model's of torch.float32; .*the same kind"):
        start_from(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    safetensors.torch.save_file({key: value.half() for key, value in weights.items() if "num_" not in key}, file)
    start_from(model, file)
    assert torch.equal(model.state_dict()[name], weights[name].half().float())


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


# ------------------------------------------------------------------------------------------------ upcycling

VIT = "vit(patch=4, width=12, depth=4, heads=3, mlp_ratio=2)"
SPARSE = "patch=4, width=12, depth=4, heads=3, mlp_ratio=2, experts=3, placement=every_2"
EVERY = f"vit_moe({SPARSE}, k=2, gating=renormalised)"


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        EVERY,
        f"vit_moe({SPARSE}, k=1, gating=hard)",
        f"vit_moe({SPARSE}, gating=soft)",
        f"vit_moe({SPARSE}, choice=expert, capacity=3, gating=renormalised)",
        f"vit_moe({SPARSE}, k=2, gating=renormalised, capacity=1.5)",
    ],
)
def test_claim_9_experts_of_tokens_become_copies_of_the_dense_mlp(
    spec: str, made: Callable[..., Path], images: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that sum to 1 and equal experts: the dense run's logits. (Capacity 3 of expert choice: every expert takes
    every token; 1.5 = 3 / 2 of token choice: nobody is dropped.) From the run, and from its tensors under timm's names.
    """
    run, x = made("dense", VIT), images(7)
    weights = read_weights(run / "model.safetensors")
    plain = {name.removeprefix("network."): v for name, v in weights.items() if not name.startswith("normalise.")}
    safetensors.torch.save_file(plain, run / "timm.safetensors")
    for source, into in ((run / "model.safetensors", "the model"), (run / "timm.safetensors", "network")):
        model = starting(spec, source, OTHER[0], OTHER[1])
        copied = "; ".join(f"each of the 3 experts of network.blocks.{i}.mlp a copy of its MLP" for i in (1, 3))
        fresh = "2 tensors there are not in it, such as 'network.blocks.1.mlp.router.weight'"
        assert capsys.readouterr().err == f"init: {source} into {into}; {copied}; {fresh}\n"
        torch.testing.assert_close(model(x), load_model(run)(x), rtol=0, atol=1e-5)
    experts = model.network.blocks[3].mlp.experts
    assert all(torch.equal(w, plain["blocks.3.mlp.fc1.weight"].T) for w in experts.w1)
    assert all(torch.equal(b, plain["blocks.3.mlp.fc1.bias"]) for b in experts.b1)
    assert all(torch.equal(w, plain["blocks.3.mlp.fc2.weight"].T) for w in experts.w2)
    assert all(torch.equal(b, plain["blocks.3.mlp.fc2.bias"]) for b in experts.b2)
    routers = zip(routers_of(model), routers_of(build_model(spec, 4, (3, 8, 8), seed=99)), strict=True)
    assert all(torch.equal(a, b) for a, b in routers)


def routers_of(model: RoutedModel) -> list[Tensor]:
    return [value for name, value in model.named_parameters() if ".router." in name]


@torch.no_grad()
def test_slots_start_from_the_dense_mlp_too(made: Callable[..., Path]) -> None:
    run = made("dense", VIT)
    model = starting(f"vit_moe({SPARSE}, choice=slots)", run)
    weights = read_weights(run / "model.safetensors")
    for expert in model.network.blocks[1].mlp.experts.w2:
        assert torch.equal(expert, weights["network.blocks.1.mlp.fc2.weight"].T)


@torch.no_grad()
def test_both_halves_of_a_dual_model_are_upcycled(made: Callable[..., Path], images: Callable[..., Tensor]) -> None:
    """From one run, and each from its own; the normalisation comes along."""
    one, other, x = made("one", VIT), made("other", VIT, (0.1, 0.2, 0.3)), images(5)
    for init, halves in ((one, (one, one)), (f"standard={other}, robust={one}", (other, one))):
        model = starting(f"dual({EVERY}, {EVERY})", init)
        for alpha, half in zip((0.0, 1.0), halves):
            torch.testing.assert_close(model.at(alpha)(x), load_model(half)(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_claim_9_the_v_moe_gate_scales_an_upcycled_block(
    made: Callable[..., Path], images: Callable[..., Tensor]
) -> None:
    """Its weights do not sum to 1: the block's output is the dense one times the sum of the chosen gates, token by
    token, so such a start is not the dense model.
    """
    run, x = made("dense", VIT), images(5)
    model = starting(EVERY.replace("renormalised", "vmoe"), run)
    assert isinstance(model, ViTMoEModel)
    layer, mlp = model.network.blocks[1].mlp, load_model(run).network.blocks[1].mlp
    assert isinstance(layer, TokenMoE)
    tokens, tape = torch.randn(5, 5, 12), Tape()
    out = layer(tokens, tape)
    scale = tape.trace["router"].weight.sum(-1, keepdim=True)
    assert float(scale.max()) < 0.99
    torch.testing.assert_close(out, scale * mlp(tokens), rtol=1e-4, atol=1e-6)
    assert float((model(x) - load_model(run)(x)).abs().max()) > 1e-2


@torch.no_grad()
def test_a_sparse_run_fills_a_sparse_model_whole(made: Callable[..., Path], images: Callable[..., Tensor]) -> None:
    run, x = made("sparse", EVERY), images(4)
    model = starting(EVERY, run)
    assert torch.equal(model(x), load_model(run)(x))


def test_a_dense_run_of_other_sizes(made: Callable[..., Path]) -> None:
    """Also where only a routed block differs: the message gives the shape that one MLP has."""
    run = made("dense", VIT.replace("mlp_ratio=2", "mlp_ratio=3"))
    said = r"mlp.fc1.weight' has shape \(36, 12\), the model's is \(24, 12\); expected the run of a model with"
    with pytest.raises(UserError, match=rf"'network.blocks.0.{said}"):
        starting(EVERY, run)
    with pytest.raises(UserError, match=rf"'network.blocks.1.{said}"):
        starting(EVERY.replace("placement=every_2", "placement=(0, 1, 2, 3)"), only(run, "network.blocks.1."))


def only(run: Path, start: str) -> Path:
    """A file of the run's tensors that begin so."""
    file = run / "some.safetensors"
    weights = read_weights(run / "model.safetensors")
    safetensors.torch.save_file({name: v for name, v in weights.items() if name.startswith(start)}, file)
    return file
