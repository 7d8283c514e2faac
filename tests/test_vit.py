"""Vision transformers: against torch's own layers, timm's names and numbers, positions for another grid, images at
another size, and starting from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import RoutedModel, ViT, build_model, vit_small, vit_tiny
from robustmoe.models.small import Linear, Resized
from robustmoe.models.vit import ViTNetwork, resample_positions
from robustmoe.routing import to_expert
from robustmoe.training.starting import start_from

SMALL = ViT(patch=4, width=12, depth=2, heads=3, mlp_ratio=2.0)
TEXT = "vit(patch=4, width=12, depth=2, heads=3, mlp_ratio=2)"


def shaken(network: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter drawn anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return network


# ------------------------------------------------------------------------------------------------ the network


def reference(spec: ViT, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same network of torch's encoder layers; patches by `F.unfold`."""
    filters = weights["patch_embed.proj.weight"].flatten(1)
    tokens = F.unfold(x, spec.patch, stride=spec.patch).transpose(1, 2) @ filters.T + weights["patch_embed.proj.bias"]
    tokens = torch.cat([weights["cls_token"].expand(len(x), 1, -1), tokens], 1) + weights["pos_embed"]
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.proj.weight",
        "self_attn.out_proj.bias": "attn.proj.bias",
        "linear1.weight": "mlp.fc1.weight",
        "linear1.bias": "mlp.fc1.bias",
        "linear2.weight": "mlp.fc2.weight",
        "linear2.bias": "mlp.fc2.bias",
        **{f"norm{i}.{kind}": f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    }
    for i in range(spec.depth):
        layer = nn.TransformerEncoderLayer(
            spec.width,
            spec.heads,
            int(spec.mlp_ratio * spec.width),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        ).to(x)
        layer.load_state_dict({own: weights[f"blocks.{i}.{name}"] for own, name in names.items()})
        tokens = layer(tokens)
    first = F.layer_norm(tokens[:, 0], [spec.width], weights["norm.weight"], weights["norm.bias"], eps=1e-6)
    return first @ weights["head.weight"].T + weights["head.bias"]


def test_it_is_torchs_transformer(images: Callable[..., Tensor]) -> None:
    """Logits and the input gradient, float64; 8 x 12 pixels, so that rows and columns cannot be confused."""
    network = shaken(SMALL.network(5, (3, 8, 12))).double()
    found, x = [], images(4, 3, 8, 12).double()
    for function in (network, lambda x: reference(SMALL, network.state_dict(), x)):
        at = x.clone().requires_grad_(True)
        logits = function(at)
        found.append((logits, *torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), at)))
    assert float(found[1][1].abs().max()) > 1e-3
    for own, torchs in zip(*found):
        torch.testing.assert_close(own, torchs, rtol=1e-9, atol=1e-12)


def count(width: int, patch: int, tokens: int, classes: int) -> int:
    block = 2 * 2 * width + (width + 1) * 3 * width + (width + 1) * width
    block += (width + 1) * 4 * width + (4 * width + 1) * width
    patches = (3 * patch * patch + 1) * width
    return width + tokens * width + patches + 12 * block + 2 * width + (width + 1) * classes


@pytest.mark.parametrize(
    "spec, image, classes, parameters",
    [
        (vit_small(), 224, 1000, 22_050_664),
        (vit_tiny(), 224, 1000, 5_717_416),
        (vit_small(patch=4), 32, 10, None),
    ],
)
def test_parameters_of_the_known_sizes(spec: ViT, image: int, classes: int, parameters: int | None) -> None:
    """By the formula; the numbers are those that timm gives for its vit_small_patch16_224 and vit_tiny_patch16_224."""
    with torch.device("meta"):
        network = spec.network(classes, (3, image, image))
    found = sum(p.numel() for p in network.parameters())
    assert found == count(spec.width, spec.patch, 1 + (image // spec.patch) ** 2, classes) == (parameters or found)


def test_names_and_shapes_are_timms() -> None:
    with torch.device("meta"):
        state = vit_small().network(1000, (3, 224, 224)).state_dict()
    shapes = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
        "head.weight": (1000, 384),
        "head.bias": (1000,),
    }
    for i in range(12):
        for name, shape in {
            "norm1": (384,),
            "attn.qkv": (1152, 384),
            "attn.proj": (384, 384),
            "norm2": (384,),
            "mlp.fc1": (1536, 384),
            "mlp.fc2": (384, 1536),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes


def test_a_fresh_network_has_timms_spread() -> None:
    """0.02 for linear layers (18,432 numbers: 0.5 % is one standard error) and positions; biases 0, norms 1."""
    network = ViT(patch=4, width=48, depth=2, heads=3).network(10, (3, 32, 32))
    state = network.state_dict()
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "pos_embed", "head.weight"):
        assert float(state[name].std()) == pytest.approx(0.02, rel=0.1), name
    assert 0 < float(state["cls_token"].abs().max()) < 1e-5
    assert all(not value.any() for name, value in state.items() if name.endswith("bias") and "proj" not in name)
    assert all(bool((value == 1).all()) for name, value in state.items() if "norm" in name and "weight" in name)


def test_no_image_and_one_image(images: Callable[..., Tensor]) -> None:
    model, x = build_model(TEXT, 4, (3, 8, 8)), images(5)
    assert model(x[:0]).shape == (0, 4)
    torch.testing.assert_close(model(x[3:4])[0], model(x)[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "vit",
        "vit_tiny",
        "vit_small(patch=4)",
        "vit(patch=4, width=12, heads=3, mlp_ratio=2.5)",
        "resized(vit_small)",
        "ensemble(resized(vit_tiny, size=64))",
    ],
)
def test_specs_come_back(text: str) -> None:
    described = specs.build(text, "model")
    written = specs.text(described)
    assert specs.build(written, "model") == described
    assert written == {"vit": "vit_small"}.get(text, text)  # of two names the shorter call; of equal ones, a factory
    assert {"vit", "vit_tiny", "vit_small", "resized"} <= {name for name, _, _ in specs.describe("model")}


@pytest.mark.parametrize(
    "text, message",
    [
        ("vit_small", "images of 8 x 8 pixels cannot be cut into patches of 16; choose a patch that divides both"),
        ("vit(patch=3, width=6)", "images of 8 x 8 pixels cannot be cut into patches of 3"),
        ("vit(patch=0)", "patch must be at least 1; got 0"),
        ("vit(depth=0)", "depth must be at least 1; got 0"),
        ("vit(width=10, heads=3)", "width must be a multiple of heads, 3; got 10"),
        ("vit(width=6, mlp_ratio=0)", "mlp_ratio 0.0 of width 6 leaves no hidden unit"),
        ("resized(linear, size=0)", "size must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(text, 4, (3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision, tolerance", [("strict", 1e-5), ("fast", 0.03)])
@pytest.mark.parametrize("text", [TEXT, f"ensemble(resized({TEXT}, size=16), experts=2, router=linear)"])
def test_copies_to_attack(text: str, precision: Any, tolerance: float, images: Callable[..., Tensor]) -> None:
    """ "fast" is the bf16 copy under autocast: its attention is in bf16, its logits and the gradient in float32."""
    model, x = build_model(text, 4, (3, 8, 8)), images(12)
    shaken(model)
    made = frozen_copy(model, x, precision)
    assert ("bf16 weights" in made.note) == (precision == "fast")
    trace = {name: routing.detach() for name, routing in model.run(x).trace.items()}
    found = []
    for each in (model, made):
        at = x.clone().requires_grad_(True)
        logits = each.run(at, forced=trace).logits
        found.append((logits.detach(), *torch.autograd.grad(logits[:, 0].sum(), at)))
    for copied, own in zip(found[1], found[0]):
        assert copied.dtype == torch.float32
        assert float((copied - own).norm() / own.norm()) < tolerance


# ------------------------------------------------------------------------------------------------ other sizes


def test_enlarging_by_hand() -> None:
    """A ramp, twice as large: bilinear between the centres of the pixels, the outer ones go on to the edge."""
    network = Resized(Linear(), size=8).network(3, (1, 4, 4))
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    ramp = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(network(x), network.inner(ramp.expand(1, 1, 8, 8)))
    torch.testing.assert_close(network(x.mT), network.inner(ramp.expand(1, 1, 8, 8).mT))
    same = Resized(Linear(), size=4).network(3, (1, 4, 4))
    torch.testing.assert_close(same(x), same.inner(x))


def test_shrinking_by_hand() -> None:
    """6 pixels to 3: triangles of twice the width. A middle one weighs its pixels 1/8, 3/8, 3/8, 1/8, an outer one
    lacks the first: 3/7, 3/7, 1/7. Without antialiasing it would be 1/2, 1/2. The other side, 1 to 3, is copied.
    """
    network = Resized(Linear(), size=3).network(2, (1, 1, 6))
    x = torch.rand(2, 1, 1, 6)
    weights = torch.tensor([[3, 3, 1, 0, 0, 0], [0, 1, 3, 3, 1, 0], [0, 0, 0, 1, 3, 3]])
    small = x @ (weights / weights.sum(1, keepdim=True)).T
    torch.testing.assert_close(network(x), network.inner(small.expand(2, 1, 3, 3)))


def test_positions_of_an_equal_grid_stay_bitwise() -> None:
    positions = torch.randn(1, 17, 3)
    assert torch.equal(resample_positions(positions, (4, 4)), positions)


def test_positions_for_another_grid() -> None:
    """The class token's stays. Cubic interpolation keeps constants everywhere, and ramps where it sees no edge (two
    old patches inwards): the new centre of patch i of twice as many is at i / 2 - 1/4.
    """
    positions = torch.empty(1, 65, 3)
    positions[:, 0] = torch.tensor([7.0, 8.0, 9.0])
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    positions[0, 1:] = torch.stack([torch.full((64,), 5.0), rows.flatten(), columns.flatten()], 1)
    found = resample_positions(positions, (16, 12))
    assert torch.equal(found[:, 0], positions[:, 0])
    grid = found[0, 1:].view(16, 12, 3)
    torch.testing.assert_close(grid[..., 0], torch.full((16, 12), 5.0))
    inner_rows, inner_columns = torch.arange(4, 12), torch.arange(3, 9)
    expected = (inner_rows / 2 - 0.25)[:, None].expand(8, 12)
    torch.testing.assert_close(grid[4:12, :, 1], expected)
    expected = ((inner_columns + 0.5) * 8 / 12 - 0.5).expand(16, 6)
    torch.testing.assert_close(grid[:, 3:9, 2], expected)
    assert resample_positions(positions.bfloat16(), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [0, 1, 16, 18])
def test_positions_that_are_no_square_grid(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"a class token and a square grid of positions; got {tokens} positions"):
        resample_positions(torch.zeros(1, tokens, 3), (4, 4))


# ------------------------------------------------------------------------------------------------ init from a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint as timm writes one: of the small vit, for 8 x 8 pixels and 4 classes."""
    return saved(tmp_path / "vit.safetensors", SMALL, 4, 8)


def saved(path: Path, spec: ViT, classes: int, image: int) -> Path:
    network = shaken(spec.network(classes, (3, image, image)))
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def vits(model: RoutedModel) -> Iterator[ViTNetwork]:
    return (module for module in model.modules() if isinstance(module, ViTNetwork))


@pytest.mark.parametrize(
    "text, places",
    [
        (TEXT, "network"),
        (f"resized({TEXT}, size=8)", "network.inner"),
        (f"ensemble({TEXT}, experts=4, router=linear)", "experts.0, experts.1, experts.2, experts.3"),
        (f"ensemble({TEXT}, experts=2, router={TEXT})", "experts.0, experts.1"),
        (f"dual({TEXT}, resnet8(width=4), mixer={TEXT})", "standard.network"),
        (
            f"dual({TEXT}, ensemble({TEXT}, experts=2, router=linear))",
            "standard.network, robust.experts.0, robust.experts.1",
        ),
    ],
)
def test_a_file_fills_every_network_that_has_its_names(
    text: str, places: str, file: Path, images: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Routers and mixers keep their own weights; whatever the route, an ensemble answers as the one network does."""
    model, weights, x = build_model(text, 4, (3, 8, 8)), safetensors.torch.load_file(file), images(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, file)
    assert capsys.readouterr().err == f"init: {file} into {places}\n"
    filled = {f"{place}.{name}": value for place in places.split(", ") for name, value in weights.items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, filled.get(name, before[name])), name
    network = SMALL.network(4, (3, 8, 8))
    network.load_state_dict(weights)
    if text.startswith("ensemble"):
        for i in range(len(places.split(", "))):
            forced = model.run(x, forced=to_expert(model.run(x).trace, i)).logits
            torch.testing.assert_close(forced, network((x - 0.5) / 0.5))


def test_a_part_may_be_a_router(file: Path, tmp_path: Path) -> None:
    """And the others stay."""
    model = build_model(f"ensemble({TEXT}, experts=4, router={TEXT})", 4, (3, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = saved(tmp_path / "other.safetensors", SMALL, 4, 8)
    start_from(model, f"router={file}, experts.2 = {other}")
    weights = safetensors.torch.load_file(file)
    for name, value in model.state_dict().items():
        part = "router." if name.startswith("router.") else "experts.2."
        assert torch.equal(value, weights.get(name.removeprefix(part), before[name])), name


def test_a_head_of_other_classes_and_another_grid(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an ImageNet checkpoint needs for another data set; said in one line."""
    model = build_model(f"ensemble({TEXT}, experts=2, router=linear)", 7, (3, 12, 16))
    heads = [expert.head.weight.clone() for expert in vits(model)]
    start_from(model, file)
    weights = safetensors.torch.load_file(file)
    assert capsys.readouterr().err == (
        f"init: {file} into experts.0, experts.1; pos_embed interpolated from 2 x 2 to 3 x 4 patches; but not its head "
        "of 4 classes: that of 7 stays as initialised\n"
    )
    for expert, head in zip(vits(model), heads, strict=True):
        assert torch.equal(expert.head.weight, head)
        assert not expert.head.bias.any()
        assert torch.equal(expert.pos_embed, resample_positions(weights["pos_embed"], (3, 4)))
        assert torch.equal(expert.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


def test_a_deeper_model_says_what_the_file_lacks(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_from(build_model("vit(patch=4, width=12, depth=3, heads=3, mlp_ratio=2)", 4, (3, 8, 8)), file)
    assert "; 12 tensors there are not in it, such as 'network.blocks.2.norm1.weight'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, image, message",
    [
        (
            "vit(patch=8, width=12, depth=2, heads=3, mlp_ratio=2)",
            8,
            r"'patch_embed.proj.weight' is for patches of 4 pixels, the model's are of 8; expected the same patch",
        ),
        (
            "vit(patch=4, width=24, depth=2, heads=3, mlp_ratio=2)",
            8,
            r"'cls_token' has shape \(1, 1, 12\), the model's is \(1, 1, 24\); expected the run of a model with the",
        ),
        (
            "vit(patch=4, width=12, depth=1, heads=3, mlp_ratio=2)",
            8,
            r"fits nowhere in the model: network lacks 'blocks.1.attn.proj.bias' \(12 of 30 names\); expected the run",
        ),
        ("small_cnn", 8, r"vit.safetensors has no tensor of the model's; expected the run of a model with the"),
    ],
)
def test_a_file_that_does_not_fit(text: str, image: int, message: str, file: Path) -> None:
    model = build_model(text, 4, (3, image, image))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        start_from(model, file)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_positions_without_a_square_grid_are_named(tmp_path: Path) -> None:
    weights = SMALL.network(4, (3, 8, 12)).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "wide.safetensors")
    message = "init: .*wide.safetensors: 'pos_embed': expected a class token and a square grid of positions; got 7"
    with pytest.raises(UserError, match=message):
        start_from(build_model(TEXT, 4, (3, 8, 8)), tmp_path / "wide.safetensors")
