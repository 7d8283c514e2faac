"""MoE layers inside a CNN: identities of the tape, sparse against reference, what moves in training."""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustmoe import spec
from robustmoe.errors import UserError
from robustmoe.models import RoutedLayer, RoutedModel, block, build_model, mix_reference
from robustmoe.models.layer_routers import LayerRouter, layer_router, shared_out
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Trace, detach, soft, to_expert, top_k
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.health import trainable_routers
from robustmoe.training.optimisation import SGD

SHAPE = (3, 8, 8)
BACKBONE = "resnet(depth=14, width=4)"  # three stages of two blocks
SPECS = {
    "blocks": f"block_moe({BACKBONE}, stages=(3,), experts=3, standardise=True)",
    "last block, k = 2": f"block_moe({BACKBONE}, stages=(3,), experts=3, k=2, blocks=last, router=gap_fc)",
    "first block": f"block_moe({BACKBONE}, stages=(3,), experts=2, blocks=first)",
    "convolutions": f"conv_moe({BACKBONE}, stages=(3,), experts=3, router=gap_fc, standardise=True)",
    "shortcut, k = E": f"conv_moe({BACKBONE}, stages=(3,), experts=3, k=3, convs=last, shortcuts=True)",
}
ROUTERS = {
    "blocks": ["stages.2.0", "stages.2.1"],
    "last block, k = 2": ["stages.2.1"],
    "first block": ["stages.2.0"],
    "convolutions": ["stages.2.0.conv1", "stages.2.0.conv2", "stages.2.1.conv1", "stages.2.1.conv2"],
    "shortcut, k = E": ["stages.2.1.conv2", "stages.2.0.shortcut.conv"],
}


def lived_in(model: RoutedModel, x: Tensor) -> RoutedModel:
    """BatchNorms as after training, the routers' own too: the statistics of ``x``, random scales and shifts."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        model.train().run(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, images: Callable[..., Tensor]) -> RoutedModel:
    return lived_in(build_model(SPECS[name], 4, SHAPE), images(32))


def spread(trace: Trace, k: int = 1) -> Trace:
    """Other routes than the model's own: image i at router r to experts i + r, i + r + 1, ..., weights of all sizes."""
    out = {}
    for place, (name, routing) in enumerate(trace.items()):
        n, _, e = routing.logits.shape
        index = (torch.arange(n)[:, None] + torch.arange(k) + place) % e
        weight = torch.linspace(0.5, 1.5, n * k, dtype=routing.weight.dtype).view(n, 1, k)
        out[name] = Routing(routing.logits, index[:, None], weight)
    return out


# ------------------------------------------------------------------------------------------------ the tape


@torch.no_grad()
def test_routers_are_named_by_their_paths_and_forcing_the_own_trace_changes_nothing(
    name: str, model: RoutedModel, images: Callable[..., Tensor]
) -> None:
    x = images(16)
    free = model.run(x)
    assert set(free.trace) == {f"network.{path}.router" for path in ROUTERS[name]}
    assert {path for path, module in model.named_modules() if path.endswith("router")} == set(free.trace)
    again = model.run(x, forced=free.trace)
    assert torch.equal(again.logits, free.logits)
    for key, routing in free.trace.items():
        assert routing.logits.shape[:2] == (16, 1)
        assert torch.equal(again.trace[key].logits, routing.logits)
        assert torch.equal(again.trace[key].index, routing.index)
    if "standardise" in SPECS[name]:
        assert all(len(routing.index.unique()) > 1 for routing in free.trace.values())


@torch.no_grad()
def test_forcing_expert_i_is_the_dense_network_with_expert_i_in_place(
    name: str, model: RoutedModel, images: Callable[..., Tensor]
) -> None:
    x = images(7)
    trace, answers = model.run(x).trace, []
    for i in range(next(iter(trace.values())).num_experts):
        dense = build_model(BACKBONE, 4, SHAPE)
        mine = f".experts.{i}."
        state = {
            key.replace(mine, "."): value
            for key, value in model.state_dict().items()
            if (mine in key or ".experts." not in key) and ".router." not in key
        }
        dense.load_state_dict(state)
        answers.append(model.run(x, forced=to_expert(trace, i)).logits)
        torch.testing.assert_close(answers[-1], dense(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


@torch.no_grad()
def test_where_all_experts_are_equal_the_route_has_no_effect(
    name: str, model: RoutedModel, images: Callable[..., Tensor]
) -> None:
    x = images(12)
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            for expert in module.experts[1:]:
                expert.load_state_dict(module.experts[0].state_dict())
    free = model.run(x)
    equal = {key: top_k(r.logits.roll(1, -1), r.k, "renormalised") for key, r in free.trace.items()}
    for forced in (to_expert(free.trace, 0), to_expert(free.trace, 1), equal):
        torch.testing.assert_close(model.run(x, forced=forced).logits, free.logits, rtol=1e-5, atol=1e-5)
    scaled = {key: Routing(r.logits, r.index, 0.5 * r.weight) for key, r in free.trace.items()}
    assert not torch.allclose(model.run(x, forced=scaled).logits, free.logits, atol=1e-3)


@torch.no_grad()
def test_with_k_all_experts_the_layer_is_the_soft_mixture(images: Callable[..., Tensor]) -> None:
    x = images(9)
    model = lived_in(build_model(f"block_moe({BACKBONE}, stages=(3,), experts=3, k=3)", 4, SHAPE), images(32))
    free = model.run(x)
    forced = {key: soft(routing.logits) for key, routing in free.trace.items()}
    torch.testing.assert_close(model.run(x, forced=forced).logits, free.logits)
    assert all(float((r.weight.sum(-1) - 1).abs().max()) < 1e-6 for r in free.trace.values())


def test_an_image_is_answered_alike_in_any_batch(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    x = images(8)
    with torch.no_grad():
        whole, order = model(x), torch.randperm(8)
        torch.testing.assert_close(model(x[order]), whole[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), whole, rtol=0, atol=1e-5)
        assert model(images(0)).shape == model.train()(images(0)).shape == (0, 4)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.eval()(x).sum(), x)
    assert gradient.is_contiguous()


# ------------------------------------------------------------------------------------------------ sparse, and gradients


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
def test_sparse_is_the_reference_mix_in_values_and_gradients(
    kind: str, k: int, images: Callable[..., Tensor], labels: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eval mode and float64, on own routes and on forced ones: logits, and the gradients of image and weights."""
    text = f"{kind}({BACKBONE}, stages=(2, 3), experts=3, k={k}, standardise=True)"
    model = lived_in(build_model(text, 4, SHAPE), images(32)).double()
    x, y = images(12).double().requires_grad_(True), labels(12)
    forced = detach(spread(model.run(x).trace, k))
    found = []
    for mix in (block.mix_sparse, lambda experts, x, index, weight, _: mix_reference(experts, x, index, weight)):
        monkeypatch.setattr(block, "mix_sparse", mix)
        for given in (None, forced):
            logits = model.run(x, forced=given).logits
            loss = F.cross_entropy(logits, y)
            found.append([logits, *torch.autograd.grad(loss, [x, *model.parameters()], materialize_grads=True)])
    for sparse, reference in ((found[0], found[2]), (found[1], found[3])):
        for one, other in zip(sparse, reference):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_routers_gradient_is_the_softmax_straight_through(images: Callable[..., Tensor]) -> None:
    """d loss / d logit_j = g p_c ([j = c] - p_j), g = d loss / d weight by finite differences of a forced run."""
    model = lived_in(build_model(f"block_moe({BACKBONE}, stages=(3,), experts=3, blocks=last)", 4, SHAPE), images(32))
    model, x = model.double(), images(1).double()
    ((key, routing),) = (output := model.run(x)).trace.items()
    assert routing.weight.item() == 1.0
    (found,) = torch.autograd.grad(F.cross_entropy(output.logits, torch.tensor([1])), routing.logits)

    def loss(weight: float) -> float:
        forced = {key: Routing(routing.logits, routing.index, torch.full_like(routing.weight, weight))}
        return float(F.cross_entropy(model.run(x, forced=forced).logits, torch.tensor([1])).detach())

    g = (loss(1 + 1e-6) - loss(1 - 1e-6)) / 2e-6
    p, chosen = routing.logits[0, 0].detach().softmax(0), int(routing.index)
    expected = g * p[chosen] * (F.one_hot(torch.tensor(chosen), 3) - p)
    assert abs(g) > 1e-3
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_the_routers_are_the_papers_and_its_codes(training: bool) -> None:
    """GAP and a linear layer with bias; convolutions without bias and padding, and then GAP; and two that are fixed."""
    x = torch.randn(5, 6, 4, 3, dtype=torch.float64)
    router = {kind: layer_router(6, 3, kind).double().train(training) for kind in get_args(LayerRouter)}
    fc, twice = router["gap_fc"], router["double_conv"]
    torch.testing.assert_close(fc(x), x.mean((2, 3)) @ fc.head.weight.T + fc.head.bias)
    for kind, size in (("conv_gap", 1), ("conv3_gap", 3)):
        assert router[kind].head.bias is None
        filters = router[kind].head.weight.view(3, 6, size, size)
        torch.testing.assert_close(router[kind](x), F.conv2d(x, filters).mean((2, 3)))
    middle = F.conv2d(x, twice.first.weight)
    mean, var = (
        (middle.mean((0, 2, 3)), middle.var((0, 2, 3), correction=0)) if training else (0 * middle[0, :, 0, 0], 1)
    )
    middle = (middle - mean[:, None, None]) / (torch.as_tensor(var) + 1e-5).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(twice(x), F.conv2d(middle, twice.head.weight[:, :, None, None]).mean((2, 3)))
    fixed = router["fixed_gap"]
    torch.testing.assert_close(fixed(x), x.mean((2, 3)) @ fixed.directions.T)
    torch.testing.assert_close(router["channel_gap"](x), x[:, :3].mean((2, 3)))
    assert not [*fixed.parameters(), *router["channel_gap"].parameters()]


def test_a_map_smaller_than_the_filters_says_so() -> None:
    model = build_model(f"block_moe({BACKBONE}, stages=(3,), experts=2, router=conv3_gap)", 4, SHAPE)
    with pytest.raises(UserError, match=r"router conv3_gap got a feature map of 2 x 2; expected at least 3 x 3"):
        model(torch.rand(2, *SHAPE))


# ------------------------------------------------------------------------------------------------ sharing out a batch


def by_hand(scores: Tensor, k: int, room: int, rounds: int = 24) -> list[set[int]]:
    """The rule image by image and expert by expert: who asks for whom, and whom each expert takes."""
    n, e = scores.shape
    has: list[set[int]] = [set() for _ in range(n)]
    left = dict.fromkeys(range(e), room)

    def likes(i: int) -> Tensor:
        return torch.tensor([-1e5 if j in has[i] else float(scores[i, j]) for j in range(e)]).softmax(0)

    def asks(i: int, among: list[int]) -> list[int]:
        order = sorted((j for j in among if j not in has[i]), key=lambda j: -float(likes(i)[j]))
        return order[: k - len(has[i])]

    for _ in range(rounds):
        asked = {i: asks(i, [j for j in range(e) if left[j]]) for i in range(n)}
        liked = {i: likes(i) for i in range(n)}
        for j in range(e):
            taken = sorted((i for i in range(n) if j in asked[i]), key=lambda i: -float(liked[i][j]))[: left[j]]
            left[j] -= len(taken)
            for i in taken:
                has[i].add(j)
    return [mine | set(asks(i, list(range(e)))) for i, mine in enumerate(has)]


@pytest.mark.parametrize(
    "n, e, k, factor", [(9, 3, 1, 1.0), (10, 4, 1, 1.5), (7, 4, 2, 1.1), (6, 5, 3, 0.5), (1, 2, 2, 1.0)]
)
def test_a_batch_is_shared_out_as_by_hand(n: int, e: int, k: int, factor: float) -> None:
    scores = 2 * torch.randn(n, e) + 2 * torch.randn(e)
    room = max(1, math.ceil(k * n * factor / e))
    given = shared_out(scores, k, factor)
    assert [set(row) for row in given.tolist()] == by_hand(scores, k, room)
    assert [len(set(row)) for row in given.tolist()] == [k] * n
    if k == 1 and factor >= 1:
        assert int(torch.bincount(given[:, 0], minlength=e).max()) <= room
    best = scores.topk(k, dim=1).indices.sort(1).values
    assert torch.equal(shared_out(scores, k, None), best)


def test_everybody_wants_expert_1_and_two_get_it() -> None:
    """Six images, three experts, room for two each: the two most eager stay, the next two go to their second best."""
    scores = torch.tensor([[0.0, 9, 1], [0, 8, 1], [0, 7, 1], [0, 6, 1], [1, 5, 0], [1, 4, 0]])
    assert shared_out(scores, 1, 1.0)[:, 0].tolist() == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("k, gate", [(1, None), (2, None), (2, "vmoe")])
def test_noise_and_capacity_change_training_alone(k: int, gate: str | None, images: Callable[..., Tensor]) -> None:
    """In eval mode the model is that without them; in training no expert gets more than its room, noise moves
    decisions, and the gates are functions of the logits without it.
    """
    text, x = f"block_moe({BACKBONE}, stages=(3,), experts=3, k={k}, blocks=last", images(24)
    more = f", gate={gate}" if gate else ""
    plain, made = (build_model(f"{text}{each})", 4, SHAPE) for each in (more, f"{more}, noise=0.5, capacity=1.0"))
    randomised = Noise.of(torch.arange(24), 5)
    assert torch.equal(plain(x), made(x))
    (routing,) = made.train().run(x).trace.values()
    assert int(routing.chosen().sum((0, 1)).max()) <= 8 * k
    assert torch.equal(routing.index, made.run(x).trace[next(iter(plain.run(x).trace))].index)
    (noisy,) = made.run(x, noise=randomised).trace.values()
    assert not torch.equal(noisy.index, routing.index)
    (free,) = plain.train().run(x, noise=randomised).trace.values()
    assert not torch.equal(free.index, routing.index)
    chosen = noisy.logits.gather(-1, noisy.index)
    p = noisy.logits.softmax(-1).gather(-1, noisy.index)
    torch.testing.assert_close(noisy.weight, p if gate else chosen.softmax(-1))
    assert (p.diff(dim=-1) <= 0).all()  # best first
    (gradient,) = torch.autograd.grad(noisy.weight[0].sum() if k == 1 else noisy.weight[0, 0, 0], noisy.logits)
    assert (gradient[0] != 0).any()


def test_noise_is_drawn_image_by_image(images: Callable[..., Tensor]) -> None:
    """Scores by their definition: probabilities over their deviation in the batch, plus noise of the image's own."""
    model = build_model(f"block_moe({BACKBONE}, stages=(3,), experts=3, blocks=last, noise=2.0)", 4, SHAPE)
    x, streams = images(10), Noise.of(torch.arange(10), 1)
    ((name, routing),) = model.run(x, noise=streams).trace.items()
    p = routing.logits[:, 0].softmax(1)
    drawn = streams.fold(zlib.crc32(name.encode())).normal(3)
    assert torch.equal(routing.index[:, 0, 0], (p / p.std() + 2 * drawn).argmax(1))


# ------------------------------------------------------------------------------------------------ training


def test_an_expert_without_images_is_left_alone(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    """Train mode, all images to expert 1 of 3: the others get no gradient and their BatchNorms no statistics."""
    model = build_model(SPECS["blocks"], 4, SHAPE).train()
    x, y = images(6), labels(6)
    forced = detach(to_expert(model.run(x).trace, 1))
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model.run(x, forced=forced).logits, y).backward()
    for key, parameter in model.named_parameters():
        used = ".experts.1." in key or (".experts." not in key and ".router." not in key)
        assert used == (parameter.grad is not None and bool((parameter.grad != 0).any())), key
    for key, value in model.state_dict().items():
        if "experts" in key and "running" in key:
            assert torch.equal(value, before[key]) == (".experts.1." not in key), key


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_batches_train(
    size: int, model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """An expert that gets one image of one pixel a channel does not stop a run."""
    loss = F.cross_entropy(model.train().run(images(size)).logits, labels(size))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_step_of_adversarial_training_moves_routers_and_used_experts(
    autocast: torch.dtype | None, model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(24), labels(24)
    method = build_method("at(pgd(linf(0.03), steps=2), balance=0.1, balance_loss=importance)")
    with torch.no_grad():
        routers = list(model.run(x).trace)
    assert trainable_routers(model, x) == dict.fromkeys(routers, True)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimiser = SGD(0.1, 0.0, 0.0).make(model.parameters())
    done = train_step(
        model, method, [optimiser], MiniBatch(x, y, Noise.of(torch.arange(24), 1)), autocast=autocast, routers=routers
    )
    assert set(done.router_grad) == set(routers)
    assert all(value > 0 for value in done.router_grad.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    for key in routers:
        assert any(other.startswith(f"{key}.") for other in moved)
        assert any(other.startswith(key.replace("router", "experts.")) for other in moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ counts and refusals


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def test_counts_of_resnet18(images: Callable[..., Tensor]) -> None:
    """Stage 4 four times, and one router a block (256 and 512 channels to 4 logits): the cost of a pass is the dense
    network's and the routers'.
    """
    with torch.device("meta"):
        dense = build_model("resnet18", 10, (3, 32, 32))
        blocks = build_model("block_moe(resnet18)", 10, (3, 32, 32))
        convs = build_model("conv_moe(resnet18, experts=2, shortcuts=True)", 10, (3, 32, 32))
    filters = 9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512
    stage = filters + 2 * 512 * 5  # five BatchNorms
    assert parameters(dense) == 11_173_962
    assert parameters(blocks) == 11_173_962 + 3 * stage + 4 * (256 + 512)
    assert parameters(convs) == 11_173_962 + filters + 2 * (256 + 3 * 512 + 256)
    small, x = build_model("block_moe(resnet10(width=4))", 4, SHAPE), images(8)
    assert flops(small, x) == flops(build_model("resnet10(width=4)", 4, SHAPE), x) + 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    "backbone",
    ["resnet50(width=2)", "wide_resnet(depth=10, width=1)", "vgg16(width=4)", "densenet(depth=10, growth=4)"],
)
@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
@torch.no_grad()
def test_other_backbones_have_stages_too(kind: str, backbone: str, images: Callable[..., Tensor]) -> None:
    x = images(6)
    model, dense = build_model(f"{kind}({backbone}, stages=(3,), experts=2)", 4, SHAPE), build_model(backbone, 4, SHAPE)
    found = model.run(x)
    assert all(key.startswith("network.stages.2.") for key in found.trace)
    state = {key.replace(".experts.1.", "."): value for key, value in model.state_dict().items()}
    dense.load_state_dict({key: value for key, value in state.items() if key in dense.state_dict()})
    torch.testing.assert_close(model.run(x, forced=to_expert(found.trace, 1)).logits, dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("block_moe(resnet8)", r"stages must be between 1 and 3 here; got 4"),
        ("block_moe(resnet18, stages=())", r"stages names no stage"),
        ("conv_moe(resnet18, experts=2, k=3)", "k must be between 1 and the number of experts, 2; got 3"),
        ("block_moe(resnet18, router=linear)", "argument 'router'"),
        ("block_moe(resnet18, noise=-1.0)", "noise must be a number from 0 on; got -1.0"),
        ("conv_moe(resnet18, capacity=0.0)", "capacity must be above 0; got 0.0"),
        ("block_moe(resnet18, capacity=1.5, gate=soft)", "noise and capacity go with no gate, renormalised or vmoe"),
        (
            "block_moe(resnet18(width=2), experts=9, router=channel_gap)",
            "a channel for each expert; got 9 and 8 channels",
        ),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(text, 4, SHAPE)


def test_a_spec_is_written_as_it_is_read() -> None:
    text = "block_moe(resnet18(width=8), stages=(3, 4), router=gap_fc, blocks=last)"
    assert spec.text(spec.build(text, "model")) == text
    with pytest.raises(ValueError, match=r"router must be 'conv_gap', 'gap_fc', .*; got 'linear'"):
        layer_router(4, 2, "linear")


def test_a_layer_outside_of_its_model_says_so(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    message = re.escape(f"the routed layer {layer.name!r} was called outside of its model; call the model")
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            model.network(images(2))
        model(images(2))
        with pytest.raises(RuntimeError, match=r"tensor a \(5\)"):  # a pass that fails leaves nothing behind
            model(images(2, 5, 8, 8))
