"""Affine experts in a vision transformer: each image's answer is that of a dense transformer of its own numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.attacks import AutoAttackRouting, linf
from robustmoe.costs import costs
from robustmoe.errors import UserError
from robustmoe.models import AffineViTModel, LayerExperts, RoutedModel, build_model
from robustmoe.models.vit import ViTModel
from robustmoe.noise import Noise
from robustmoe.routing import soft, to_expert
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.checkpoint import save_weights
from robustmoe.training.optimisation import SGD
from robustmoe.training.starting import start_from

SHAPE, CLASSES = (3, 8, 8), 4
BACKBONE = "vit(patch=2, width=12, depth=2, heads=2, mlp_ratio=2)"
SPECS = {
    "soft": f"affine({BACKBONE}, experts=3)",
    "soft, a router a norm": f"affine({BACKBONE[:-1]}, classifier=gap), experts=3, routers=norm, pool=1)",
    "top-1": f"affine({BACKBONE}, experts=3, gate=straight_through)",
    "top-2": f"affine({BACKBONE}, experts=3, gate=renormalised, k=2)",
}


def trained(text: str, x: Tensor) -> AffineViTModel:
    """In float64, with experts, weights and statistics away from where they began."""
    model = build_model(text, CLASSES, SHAPE, seed=0).double()
    assert isinstance(model, AffineViTModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayerExperts):
                module.experts.normal_(0, 0.3, generator=draw)
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(0, 0.2, generator=draw)
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.3, generator=draw)
        for _ in range(8):
            model.train().run(x)
    return model.eval()


def dense_of(model: AffineViTModel, text: str, numbers: dict[str, Tensor]) -> RoutedModel:
    """A transformer whose own numbers hold, beside what they are, those of each router: norms' scales and shifts, and
    rows and biases of the MLPs' first layer.
    """
    dense = build_model(specs.build(text, "model").backbone, CLASSES, SHAPE).double()
    assert isinstance(dense, ViTModel)
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if ".affine." not in name})
    for name, row in numbers.items():
        _, _, block, _, router, _ = name.split(".")
        own = dense.network.blocks[int(block)]
        experts = model.get_submodule(f"network.blocks.{block}.affine.{router}")
        assert isinstance(experts, LayerExperts)
        for place, part in zip(experts.places, row.split(list(experts.places.values()))):
            scale, shift = part.chunk(2)
            if place == 2:
                own.mlp.fc1.bias.data = own.mlp.fc1.bias * (1 + scale) + shift
                own.mlp.fc1.weight.data *= (1 + scale)[:, None]
            else:
                norm = (own.norm1, own.norm2)[place]
                norm.weight.data += scale
                norm.bias.data += shift
    return dense.eval()


@pytest.fixture
def x(images: Callable[..., Tensor]) -> Tensor:
    return images(6, *SHAPE).double()


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_an_image_is_answered_by_the_dense_transformer_of_its_own_mixture(name: str, x: Tensor) -> None:
    model = trained(SPECS[name], x)
    free = model.run(x)
    assert len(free.trace) == 2 * (3 if "norm" in name else 1)
    for image in range(3):
        numbers = {}
        for router, routing in free.trace.items():
            experts = model.get_submodule(router.removesuffix(".router"))
            assert isinstance(experts, LayerExperts)
            chosen = zip(routing.index[image, 0], routing.weight[image, 0])
            numbers[router] = experts.gain * sum(weight * experts.experts[index] for index, weight in chosen)
        torch.testing.assert_close(free.logits[image], dense_of(model, SPECS[name], numbers)(x[image : image + 1])[0])
    assert not torch.allclose(free.logits[0], dense_of(model, SPECS[name], {})(x[:1])[0], atol=1e-2)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_traces_are_replayed_and_any_batch_answers_alike(name: str, x: Tensor) -> None:
    model = trained(SPECS[name], x)
    free = model.run(x)
    assert torch.equal(model.run(x, forced=free.trace).logits, free.logits)
    assert torch.equal(model(x), free.logits)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), free.logits)
    assert model(x[:0]).shape == (0, CLASSES)
    alone = model.run(x, forced=to_expert(free.trace, 2)).logits
    others = model.run(x, forced={key: soft(-routing.logits) for key, routing in free.trace.items()}).logits
    assert not torch.allclose(alone, free.logits, atol=1e-3)
    assert not torch.allclose(others, free.logits, atol=1e-3)


@torch.no_grad()
def test_a_router_sees_the_patches_that_enter_its_block(x: Tensor) -> None:
    """4 x 4 patches after a class token, in 2 x 2 fields."""
    model = trained(SPECS["soft"], x)
    seen: list[Tensor] = []
    hook = model.network.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    routing = model.run(x).trace["network.blocks.1.affine.0.router"]
    hook.remove()
    patches = seen[0][:, 1:].unflatten(1, (4, 4))
    fields = torch.stack([patches[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2)], 2)
    router = model.get_submodule("network.blocks.1.affine.0.router")
    norm, head = router.get_submodule("norm"), router.get_submodule("head")
    torch.testing.assert_close(routing.logits[:, 0], head(norm(fields.flatten(1)[:, :, None, None])[:, :, 0, 0]))


@torch.no_grad()
def test_a_dense_run_upcycles_exactly(x: Tensor, tmp_path: Path) -> None:
    backbone = specs.build(SPECS["soft"], "model").backbone
    dense = build_model(backbone, CLASSES, SHAPE, seed=3).eval()
    save_weights(tmp_path / "dense.safetensors", dense.state_dict(), specs.text(backbone))
    model = build_model(SPECS["soft"], CLASSES, SHAPE).eval()
    start_from(model, tmp_path / "dense.safetensors")
    torch.testing.assert_close(model(x.float()), dense(x.float()), rtol=1e-5, atol=1e-6)


def test_all_of_it_moves_in_training(x: Tensor) -> None:
    model = trained(SPECS["soft"], x).float()
    before = copy.deepcopy(dict(model.named_parameters()))
    method = build_method("at(pgd(linf(8/255), steps=1))")
    optimisers = [SGD(0.1, 0.0, 0.0).make(phase.parameters(model).values()) for phase in method.phases]
    train_step(
        model.train(), method, optimisers, MiniBatch(x.float(), torch.arange(6) % CLASSES, Noise.of(torch.arange(6)))
    )
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == []


def test_gates_and_mixing_are_counted() -> None:
    """By hand: of each of two blocks a router on four fields of 12, and 2 x 12 numbers at both norms and 2 x 24 at the
    hidden layer, of three experts.
    """
    counted, dense = costs(SPECS["soft"], CLASSES, SHAPE), costs(BACKBONE, CLASSES, SHAPE)
    assert counted.router_macs == 2 * 4 * 12 * 3
    assert counted.macs - dense.macs == counted.router_macs + 2 * 3 * (2 * 24 + 48)
    assert counted.parameters - dense.parameters == 2 * (2 * 48 + 48 * 3 + 3) + 2 * 3 * (2 * 24 + 48)


def test_routers_decide_in_float32_under_autocast(x: Tensor) -> None:
    model = trained(SPECS["soft"], x).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = model.run(x.float())
    assert all(routing.logits.dtype == torch.float32 for routing in half.trace.values())
    exact = model.run(x.float()).logits
    assert (half.logits - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("name", ["soft", "top-1"])
def test_the_routing_attacks_take_it(name: str, x: Tensor) -> None:
    model = trained(SPECS[name], x).float()
    images, y = x[:3].float(), model(x[:3].float()).argmax(1)
    suite = AutoAttackRouting(linf(0.05), steps=2, temperatures=(1.0,))
    parts = dict(suite.routing_parts(model.run(images)))
    assert {"experts held", "routers", "expert 2"} <= set(parts)
    for attack in parts.values():
        assert (attack(model, images, y, Noise.of(torch.arange(3))) - images).abs().max() <= 0.05 + 1e-6


@pytest.mark.parametrize(
    "option, told",
    [("grid=2", "grid"), ("kernels=2", "kernels"), ("stages=(1,)", "stages"), ("routers=image", "routers=image")],
)
def test_what_is_of_convolutions_is_refused(option: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(f"affine({BACKBONE}, {option})", CLASSES, SHAPE)
    assert f"affine experts of a transformer take no {option.split('=')[0] if '=i' not in option else option}" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
