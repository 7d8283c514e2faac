"""The options of vision transformers that published weights need: against the same network written out in float64,
scipy's zoom, and the equations of the papers; dropout and another room in evaluation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.costs import costs
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.lipschitz.layers import layer_terms
from robustmoe.models import TokenExperts, TokenMoE, ViT, ViTMoE, ViTMoEModel, build_model
from robustmoe.models.tokens import Dispatch, Masks
from robustmoe.models.vit import resample_positions
from robustmoe.models.vit_parts import dropped, gelu, sincos2d
from robustmoe.noise import Noise
from robustmoe.routing import Tape
from robustmoe.training.starting import start_from
from robustmoe.weights import LAYOUTS

SIZE = "patch=4, width=16, depth=4, heads=2, mlp_ratio=2"
MOE = f"{SIZE}, experts=3, k=2, placement=every_2"


def shaken(network: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter drawn anew, so that none is 0 or 1, and the GELUs of all units see numbers of size 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return network


def tanh_gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel 2016, section 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# ------------------------------------------------------------------------------------------------ written out


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]
    return scaled + weights.get(f"{name}.bias", torch.zeros(()).double())


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(query: Tensor, key: Tensor, value: Tensor, spec: ViT, weights: dict[str, Tensor], name: str) -> Tensor:
    """Head by head, on one image's (t, d)."""
    heads = []
    for head in range(spec.heads):
        own = slice(head * spec.width // spec.heads, (head + 1) * spec.width // spec.heads)
        q, k = query[:, own], key[:, own]
        if spec.qk_norm:
            q, k = norm(q, weights, f"{name}.q_norm"), norm(k, weights, f"{name}.k_norm")
        heads.append(torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ value[:, own])
    return linear(torch.cat(heads, 1), weights, f"{name}.proj")


def mlp(x: Tensor, spec: ViT, weights: dict[str, Tensor], name: str) -> Tensor:
    act = tanh_gelu if spec.gelu == "tanh" else exact_gelu
    return linear(act(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def positions_of(spec: ViT, rows: int, columns: int) -> Tensor:
    """MoCo v3's, place by place."""
    quarter = spec.width // 4
    table = np.zeros((rows * columns, spec.width))
    for (row, column), i in itertools.product(itertools.product(range(rows), range(columns)), range(quarter)):
        omega = 1 / 10_000 ** (i / (quarter - 1))
        angles = math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)
        table[row * columns + column, [i, i + quarter, i + 2 * quarter, i + 3 * quarter]] = angles
    return torch.from_numpy(table)


def written_out(spec: ViT, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """The logits of one image."""
    rows, columns = image.shape[1] // spec.patch, image.shape[2] // spec.patch
    cut = image.unfold(1, spec.patch, spec.patch).unfold(2, spec.patch, spec.patch).permute(1, 2, 0, 3, 4)
    tokens = cut.reshape(rows * columns, -1) @ weights["patch_embed.proj.weight"].flatten(1).T
    tokens = tokens + weights["patch_embed.proj.bias"]
    if spec.positions == "sincos2d":
        tokens = tokens + positions_of(spec, rows, columns)
    if spec.classifier == "token":
        tokens = torch.cat([weights["cls_token"][0], tokens])
    if spec.positions == "learned":
        tokens = tokens + weights["pos_embed"][0]
    for i in range(spec.depth):
        query, key, value = linear(norm(tokens, weights, f"blocks.{i}.norm1"), weights, f"blocks.{i}.attn.qkv").chunk(
            3, 1
        )
        tokens = tokens + attend(query, key, value, spec, weights, f"blocks.{i}.attn")
        tokens = tokens + mlp(norm(tokens, weights, f"blocks.{i}.norm2"), spec, weights, f"blocks.{i}.mlp")
    tokens = norm(tokens, weights, "norm")
    pooled = {"token": tokens[:1], "gap": tokens.mean(0, keepdim=True)}.get(spec.classifier)
    if pooled is None:
        key, value = linear(tokens, weights, "attn_pool.kv").chunk(2, 1)
        query = linear(weights["attn_pool.latent"][0], weights, "attn_pool.q")
        pooled = attend(query, key, value, spec, weights, "attn_pool")
        pooled = pooled + mlp(norm(pooled, weights, "attn_pool.norm"), spec, weights, "attn_pool.mlp")
    if spec.pre_logits is not None:
        pooled = torch.tanh(linear(pooled, weights, "pre_logits"))
    return linear(pooled, weights, "head")[0]


OPTIONS = [
    {"gelu": "tanh"},
    {"pre_logits": 5},
    {"classifier": "gap"},
    {"classifier": "map"},
    {"positions": "sincos2d"},
    {"positions": "sincos2d", "classifier": "gap", "qk_norm": True},
    {"qk_norm": True},
    {"gelu": "tanh", "classifier": "map", "pre_logits": 5, "qk_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_is_the_network_written_out(options: dict[str, object], images: Callable[..., Tensor]) -> None:
    """Logits and the input gradient in float64; 8 x 12 pixels, so that rows and columns cannot be confused."""
    spec = ViT(4, 16, 2, 2, 2.0, **options)  # type: ignore[arg-type]
    network, x = shaken(spec.network(5, (3, 8, 12))).double(), images(3, 3, 8, 12).double()
    if spec.positions == "sincos2d":
        network.pos_fixed = F.pad(positions_of(spec, 2, 3)[None], (0, 0, int(spec.classifier == "token"), 0))
    weights, results = dict(network.state_dict()), []
    for function in (network, lambda x: torch.stack([written_out(spec, weights, image) for image in x])):
        at = x.clone().requires_grad_(True)
        logits = function(at)
        results.append((logits, *torch.autograd.grad(F.cross_entropy(logits, torch.arange(3)), at)))
    for own, expected in zip(*results, strict=True):
        assert float(expected.detach().abs().max()) > 1e-3
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def test_fixed_positions(images: Callable[..., Tensor]) -> None:
    """In float32, as the network holds them; a model that moves to another dtype or device takes them along, and no
    file does.
    """
    torch.testing.assert_close(sincos2d((2, 3), 16)[0].double(), positions_of(ViT(width=16, heads=2), 2, 3))
    model = build_model(f"vit({SIZE}, positions=sincos2d)", 4, (3, 8, 12))
    assert not any("pos" in name for name in model.state_dict())
    assert model.double()(images(2, 3, 8, 12).double()).dtype == torch.float64


def test_the_gelus() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x, "tanh"), tanh_gelu(x), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gelu(x, "exact"), exact_gelu(x), rtol=1e-12, atol=1e-15)
    assert 1e-4 < float((gelu(x, "tanh") - gelu(x, "exact")).abs().max()) < 1e-3


# ------------------------------------------------------------------------------------------------ experts


def test_a_mixture_has_its_backbones_options() -> None:
    given = {"gelu": "tanh", "classifier": "map", "pre_logits": 5, "positions": "sincos2d", "qk_norm": True}
    backbone = ViTMoE("tiny", width=16, heads=2, dropout=0.1, **given).backbone  # type: ignore[arg-type]
    assert backbone == ViT(16, 16, 12, 2, dropout=0.1, **given)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["loop", "sorted", "grouped", "dense"])
def test_experts_by_every_dispatch_have_the_gelu(dispatch: Dispatch) -> None:
    experts, x = shaken(TokenExperts(3, 8, 16, kind="tanh")), torch.randn(20, 8)
    assert isinstance(experts, TokenExperts)
    weight, index = torch.softmax(torch.randn(20, 3), 1).topk(2)
    expected = torch.zeros(20, 8)
    for item, rank in itertools.product(range(20), range(2)):
        i = int(index[item, rank])
        hidden = tanh_gelu(x[item] @ experts.w1[i] + experts.b1[i])
        expected[item] += weight[item, rank] * (hidden @ experts.w2[i] + experts.b2[i])
    torch.testing.assert_close(experts(x, index, weight, dispatch=dispatch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(experts.single(2, x), experts.every(x)[2])


@pytest.mark.parametrize("choice", ["token", "expert", "slots"])
@pytest.mark.parametrize("classifier", ["token", "gap", "map"])
def test_mixtures_build_run_and_say_their_cost(choice: str, classifier: str, images: Callable[..., Tensor]) -> None:
    """A model without a class token routes one item less; the costs of attention pooling are counted."""
    text = f"vit_moe(tiny, {MOE}, choice={choice}, classifier={classifier}, gelu=tanh, pre_logits=5, qk_norm=True)"
    model, x = build_model(text, 4, (3, 8, 8)), images(5)
    output = model.run(x)
    assert output.logits.isfinite().all()
    items = {len(routing.logits[0]) for routing in output.trace.values()}
    assert items == {5 if classifier == "token" else 4}
    torch.testing.assert_close(model.run(x, forced=output.trace).logits, output.logits)


def test_the_cost_of_pooling() -> None:
    """MAP on t = 4 tokens of width 16 against their mean: q and proj 16 * 16 each, kv 2 * 16 * 16 a token, attention
    2 * 16 a token, and an MLP of 2 * 16 * 32.
    """
    counted = [costs(f"vit({SIZE}, classifier={how})", 4, (3, 8, 8)) for how in ("gap", "map")]
    macs = [count.macs for count in counted]
    assert macs[1] - macs[0] == 2 * 16 * 16 + 4 * 2 * 16 * 16 + 4 * 2 * 16 + 2 * 16 * 32


def test_the_jacobian_of_experts_follows_the_gelu() -> None:
    """`layer_terms` writes the experts' Jacobians out; autograd takes them from the layer itself."""
    layer = next(iter(build_model(f"vit_moe(tiny, {MOE}, gelu=tanh)", 4, (3, 8, 8)).layers().values()))
    assert isinstance(layer, TokenMoE)
    shaken(layer.experts).double()
    layer.double()
    h = torch.randn(1, 2, 16, dtype=torch.float64)
    total = layer_terms(layer, h).total
    jacobian = torch.autograd.functional.jacobian(lambda tokens: layer(tokens, Tape()), h)
    for token in range(2):
        expected = torch.linalg.matrix_norm(jacobian[0, token, :, 0, token], ord=2)
        torch.testing.assert_close(total[token].double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("text", [f"vit({SIZE}, qk_norm=True, classifier=map)", f"vit_moe(tiny, {MOE}, qk_norm=True)"])
def test_half_precision(text: str, images: Callable[..., Tensor]) -> None:
    """Under autocast LayerNorm gives float32 and the values are bf16; attention takes both."""
    model, x = build_model(text, 4, (3, 8, 8)), images(6)
    shaken(model)
    trace = model.run(x).trace
    own, copied = (each.run(x, forced=trace).logits for each in (model, frozen_copy(model, x, "fast")))
    assert copied.dtype == torch.float32
    assert float((copied - own).norm() / own.norm()) < 0.05


# ------------------------------------------------------------------------------------------------ room and dropout


@torch.no_grad()
@pytest.mark.parametrize("choice, room", [("token", (2, 6)), ("expert", (2, 5))])
def test_another_room_in_evaluation(choice: str, room: tuple[int, int], images: Callable[..., Tensor]) -> None:
    """5 tokens, 3 experts, k 2: ceil(10 / 3 * 0.5) = 2 places in training, and in evaluation all that come (6 > 5).
    Expert choice: ceil(5 / 3 * 1.2) = 2, then 3 * 5 / 3 = 5.
    """
    first, then = {"token": (0.5, 1.8), "expert": (1.2, 3)}[choice]
    text, x = f"vit_moe(tiny, {MOE}, choice={choice}, capacity=", images(6)
    model = build_model(f"{text}{first}, eval_capacity={then})", 4, (3, 8, 8))
    shaken(model)
    loads = []
    for training in (True, False):
        trace = model.train(training).run(x).trace
        loads.append(max(int(routing.chosen().sum(1).max()) for routing in trace.values()))
    assert loads[0] == room[0]
    assert room[0] < loads[1] <= room[1]
    plain = build_model(f"{text}{then})", 4, (3, 8, 8))
    shaken(plain)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_by_the_equation(rate: float) -> None:
    """0 or x / (1 - rate), each number on its own; the mean stays, to four standard errors."""
    x, noise = torch.full((40, 10, 30), 3.0), Noise.of(torch.arange(40), 7)
    out = dropped(x, rate, Tape(noise=noise), "place")
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 3 / (1 - rate)))
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=4 * math.sqrt(rate * (1 - rate) / x.numel()))
    assert not torch.equal(out, dropped(x, rate, Tape(noise=noise), "another place"))
    assert dropped(x, rate, Tape(), "place") is x
    assert dropped(x, 0.0, Tape(noise=noise), "place") is x


DROPPING = [
    f"vit({SIZE}, dropout=0.3)",
    f"vit_moe(tiny, {MOE}, dropout=0.3, noise=False)",
    *(
        f"vit_moe(tiny, {MOE}, expert_dropout=0.3, noise=False, choice={choice})"
        for choice in ("token", "expert", "slots")
    ),
]


@torch.no_grad()
@pytest.mark.parametrize("text", DROPPING)
def test_an_images_dropout_is_its_own(text: str, images: Callable[..., Tensor]) -> None:
    """The same in another batch, other with another epoch's noise, none without noise: in evaluation, and in an
    attack's passes.
    """
    model, x = build_model(text, 4, (3, 8, 8)).train(), images(6)
    shaken(model)
    noise = Noise.of(torch.arange(6), 1)
    whole, plain = model.run(x, noise=noise).logits, model.run(x).logits
    order = torch.tensor([4, 1])
    torch.testing.assert_close(model.run(x[order], noise=noise[order]).logits, whole[order], rtol=1e-4, atol=1e-5)
    assert ((whole - plain).abs().amax(1) > 1e-3).all()
    assert ((model.run(x, noise=Noise.of(torch.arange(6), 2)).logits - whole).abs().amax(1) > 1e-3).all()
    without = build_model(text.replace("0.3", "0"), 4, (3, 8, 8))
    shaken(without)
    torch.testing.assert_close(without(x), plain)


@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["loop", "sorted", "grouped", "dense"])
@pytest.mark.parametrize("full", [False, True])
def test_dropout_of_pairs(dispatch: Dispatch, full: bool) -> None:
    """Pair by pair: (mask of the hidden units times GELU) W2, times the mask of what it gives."""
    experts, x = shaken(TokenExperts(3, 8, 16)), torch.randn(12, 8)
    assert isinstance(experts, TokenExperts)
    weight, index = torch.softmax(torch.randn(12, 3), 1).topk(2)
    masks = Masks((torch.rand(12, 2, 16) > 0.3) / 0.7, (torch.rand(12, 2, 8) > 0.3) / 0.7)
    kept = None if full else torch.rand(12, 2) > 0.4
    expected = torch.zeros(12, 8)
    for item, rank in itertools.product(range(12), range(2)):
        if kept is None or kept[item, rank]:
            i = int(index[item, rank])
            hidden = exact_gelu(x[item] @ experts.w1[i] + experts.b1[i]) * masks.hidden[item, rank]
            expected[item] += weight[item, rank] * (hidden @ experts.w2[i] + experts.b2[i]) * masks.out[item, rank]
    torch.testing.assert_close(experts(x, index, weight, kept, dispatch, masks), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_expert_dropout_beside_that_of_the_rest(images: Callable[..., Tensor]) -> None:
    """Experts without it and the rest with it, and the other way: neither is the other."""
    noise, x, answers = Noise.of(torch.arange(6), 1), images(6), []
    for rates in ("dropout=0.3", "dropout=0.3, expert_dropout=0", "expert_dropout=0.3"):
        model = build_model(f"vit_moe(tiny, {MOE}, noise=False, {rates})", 4, (3, 8, 8)).train()
        assert isinstance(model, ViTMoEModel)
        shaken(model)
        answers.append(model.run(x, noise=noise).logits)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(answers, 2))


# ------------------------------------------------------------------------------------------------ ensembles

E3 = f"vit_moe(tiny, {SIZE}, experts=6, members=2, k=2, placement=(1, 3)"


@torch.no_grad()
@pytest.mark.parametrize("options", ["", ", capacity=0.7", ", choice=expert", ", choice=slots, slots=2"])
def test_an_ensemble_is_its_members(options: str, images: Callable[..., Tensor]) -> None:
    """Allingham et al. 2022: each member is a mixture of its own experts by its own router, all else shared; the
    ensemble's probability is the mean of theirs.
    """
    model, x = build_model(f"{E3}{options})", 4, (3, 8, 8)), images(5)
    shaken(model)
    output, probabilities = model.run(x), []
    assert set(output.trace) == {f"network.blocks.{i}.mlp.members.{m}.router" for i in (1, 3) for m in (0, 1)}
    for member in range(2):
        alone = build_model(f"vit_moe(tiny, {SIZE}, experts=3, k=2, placement=(1, 3){options})", 4, (3, 8, 8))
        state = {name.replace(f".members.{member}.", "."): value for name, value in model.state_dict().items()}
        alone.load_state_dict({name: value for name, value in state.items() if ".members." not in name})
        own = alone.run(x)
        probabilities.append(own.logits.softmax(1))
        for name, routing in own.trace.items():
            theirs = output.trace[name.replace(".mlp.", f".mlp.members.{member}.")]
            torch.testing.assert_close(theirs.weight, routing.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logits.exp(), torch.stack(probabilities).mean(0), rtol=1e-4, atol=1e-6)
    assert float((probabilities[0] - probabilities[1]).abs().max()) > 1e-2
    assert set(model.layers()) == set(output.trace)
    torch.testing.assert_close(model.run(x, forced=output.trace).logits, output.logits)
    assert model(x[:0]).shape == (0, 4)


@torch.no_grad()
def test_an_ensemble_in_training(images: Callable[..., Tensor]) -> None:
    """Router noise and dropout of an image are its own, and other for each member."""
    model, x = build_model(f"{E3}, dropout=0.3)", 4, (3, 8, 8)).train(), images(6)
    shaken(model)
    noise, order = Noise.of(torch.arange(6), 1), torch.tensor([4, 1])
    whole = model.run(x, noise=noise)
    torch.testing.assert_close(
        model.run(x[order], noise=noise[order]).logits, whole.logits[order], rtol=1e-4, atol=1e-5
    )
    routings = [whole.trace[f"network.blocks.1.mlp.members.{member}.router"] for member in (0, 1)]
    drawn = [routing.noisy - routing.logits for routing in routings if routing.noisy is not None]
    assert float((drawn[0] - drawn[1]).abs().max()) > 0.1
    twice = dropped(torch.ones(12, 5, 16), 0.5, Tape(noise=noise), "place").unflatten(0, (6, 2))
    assert not torch.equal(twice[:, 0], twice[:, 1])


def test_the_cost_of_an_ensemble() -> None:
    """Blocks from the first routed one on run once for each member: of 4, with experts in 1 and 3, three do."""
    plain = costs(f"vit_moe(tiny, {SIZE}, experts=3, k=2, placement=(1, 3))", 4, (3, 8, 8)).macs
    both = costs(f"{E3})", 4, (3, 8, 8)).macs
    dense = [costs(f"vit({SIZE.replace('depth=4', f'depth={depth}')})", 4, (3, 8, 8)).macs for depth in (1, 2)]
    block, shared = dense[1] - dense[0], 2 * dense[0] - dense[1] - 4 * 16  # of the patches; the head runs twice
    assert both == 2 * plain - shared - block


# ------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(7, 7), (2, 2), (3, 5), (1, 4), (4, 4)])
def test_zoom_is_scipys(prefix: int, grid: tuple[int, int]) -> None:
    """What V-MoE's code does to positions (vmoe/initialization/rules.py): scipy.ndimage.zoom of order 1."""
    positions = torch.randn(1, prefix + 16, 3, dtype=torch.float64)
    square = positions[0, prefix:].view(4, 4, 3).numpy()
    expected = scipy.ndimage.zoom(square, (grid[0] / 4, grid[1] / 4, 1), order=1)
    resampled = resample_positions(positions, grid, prefix, "zoom")
    assert torch.equal(resampled[:, :prefix], positions[:, :prefix])
    torch.testing.assert_close(resampled[0, prefix:].view(*grid, 3), torch.from_numpy(expected))


def test_weights_of_flax_for_another_image_size() -> None:
    """Their positions are zoomed to the model's grid; the class token's stay."""
    model = build_model(f"vit({SIZE})", 4, (3, 8, 12))
    (pair,) = [pair for pair in LAYOUTS["vmoe"].pairs(model) if pair.ours == ("network.pos_embed",)]
    assert pair.theirs == ("Encoder/posembed_input/pos_embedding",)
    given = torch.randn(1, 17, 16)
    assert torch.equal(pair.read([given])[0], resample_positions(given, (2, 3), how="zoom"))


def test_a_file_without_a_class_token_for_another_image_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As timm's nets with global_pool=avg or map: all positions are of the grid."""
    weights = shaken(ViT(4, 16, 4, 2, 2.0, classifier="gap").network(4, (3, 8, 8))).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "gap.safetensors")
    model = build_model(f"vit({SIZE}, classifier=gap)", 4, (3, 12, 16))
    start_from(model, tmp_path / "gap.safetensors")
    assert "pos_embed interpolated from 2 x 2 to 3 x 4 patches" in capsys.readouterr().err
    assert torch.equal(model.network.pos_embed, resample_positions(weights["pos_embed"], (3, 4), prefix=0))


def test_positions_without_a_class_token() -> None:
    with pytest.raises(ValueError, match="expected a square grid of positions; got 17 positions"):
        resample_positions(torch.zeros(1, 17, 3), (4, 4), prefix=0)
    assert resample_positions(torch.zeros(1, 16, 3), (2, 6), prefix=0).shape == (1, 12, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("vit(patch=4, gelu=erf)", "gelu"),
        ("vit(patch=4, pre_logits=0)", "pre_logits must be at least 1, or none; got 0"),
        ("vit(patch=4, width=6, heads=1, positions=sincos2d)", "multiple of 4 and at least 8; got 6"),
        ("vit(patch=4, dropout=1)", "dropout must be at least 0 and below 1; got 1"),
        ("vit_moe(patch=4, expert_dropout=-1)", "expert_dropout must be at least 0 and below 1; got -1"),
        ("vit_moe(patch=4, eval_capacity=0)", "eval_capacity must be above 0, or none; got 0"),
        ("vit_moe(patch=4, choice=slots, eval_capacity=1)", "choice=slots drops no token; expected no eval_capacity"),
        ("vit_moe(patch=4, experts=5, members=2)", "experts must be a multiple of members, 2; got 5"),
        ("vit_moe(patch=4, experts=4, members=4)", "k must be .* 1"),
        ("ensemble(vit(patch=4, dropout=0.1))", "dropout=0.1 of a vit inside another model"),
    ],
)
def test_bad_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(text, 4, (3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [f"vit({SIZE}, pre_logits=5", f"vit_moe(tiny, {MOE}"])
def test_v_moes_head_begins_at_the_classes_share(text: str) -> None:
    """Every logit is -log(classes), whatever the image: a sigmoid of 1 / (classes + 1), the loss near its least for
    labels that nothing is known of; the rest begins as without.
    """
    model, plain = (build_model(f"{text}{more})", 7, (3, 8, 8), seed=4) for more in (", head_start=vmoe", ""))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model(x), torch.full((2, 7), -math.log(7)))
    torch.testing.assert_close(torch.sigmoid(model(x)), torch.full((2, 7), 1 / 8))
    same = plain.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, same[name]) == (".head." not in name), name
