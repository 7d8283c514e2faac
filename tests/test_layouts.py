"""Layouts of other code's convolutional networks, where the golden cases (test_fidelity.py) do not look: every kind of
model there and back, what they refuse, and what lies beside the weights in their files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.weights import LAYOUTS, load_weights
from robustmoe.weights.exporting import written
from robustmoe.weights.importing import import_run

ENSEMBLE = "ensemble(resnet10(width=2), experts=2, router=linear, gate=hard)"
VITS = "ensemble(resized(vit(patch=8, width=8, depth=1, heads=2), size=16), experts=2, router=linear, gate=hard)"
SPECS = [
    ("optml", "pathway(resnet10(width=2), experts=3)"),
    ("optml", "pathway(resnet10(width=2, stem=imagenet), experts=2)"),
    ("optml", "pathway(wide_resnet(10, 1, released=True), experts=1)"),
    ("optml", "slim(vgg16(width=4))"),
    ("optml", "wide_resnet(10, 1)"),
    ("timl", f"dual({ENSEMBLE}, {ENSEMBLE}, mix=logits)"),
    ("timl", VITS),
    ("torchvision", "resnet50(width=2, stem=imagenet, inner=2)"),
    ("torchvision", "vit(patch=8, width=8, depth=2, heads=2)"),
    ("robustbench", "resnet50(width=2)"),
    ("robustbench", "preact_resnet(50, width=2, last_norm=False)"),
    ("robustbench", "preact_resnet(10, width=2, shortcut=conv3, padding=same)"),
    ("robustbench", "wide_resnet(16, 1, activation=silu, padding=same)"),
    ("kastel", "resnet18(width=2)"),
    ("kastel", "block_moe(resnet18(width=2), experts=2, router=conv3_gap)"),
    ("kastel", "block_moe(resnet18(width=2), experts=2, k=2, router=fixed_gap)"),
    ("kastel", "conv_moe(resnet18(width=2), stages=(3, 4), experts=2, shortcuts=True, router=double_conv)"),
    ("kastel", "conv_moe(resnet18(width=2), experts=2, router=channel_gap)"),
]


def made(spec: str, seed: int = 0, size: int = 16) -> RoutedModel:
    return build_model(spec, 10, (3, size, size), seed=seed)


def theirs(layout: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors as that code would have them."""
    own, out = model.state_dict(), {}
    for pair in LAYOUTS[layout].pairs(model):
        if not pair.optional:
            values = pair.write([own[name] for name in pair.ours])
            out.update({name: value.clone() for name, value in zip(pair.theirs, values, strict=True)})
    return out


@pytest.mark.parametrize("layout, spec", SPECS)
def test_a_network_goes_there_and_comes_back(layout: str, spec: str, tmp_path: Path) -> None:
    """Out of a file as such code writes them, with parts of names before all; no tensor is left out, none is told
    apart by nothing, and another model has the same weights afterwards.
    """
    model, other = made(spec), made(spec, seed=1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.numel() > 3:
                value.uniform_(0.5, 1.5)
    names = theirs(layout, model)
    state = {f"module.model.{name}": value for name, value in names.items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "a.pth.tar")
    loaded = load_weights(other, tmp_path / "a.pth.tar", layout)
    assert loaded.fit.whole
    assert written(model, layout).keys() == names.keys()  # what is exported has nothing that their network lacks
    own = {name: value for name, value in model.state_dict().items() if "normalise." not in name}
    for name, value in own.items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize(
    "layout, spec",
    [
        ("optml", "pathway(wide_resnet(10, 1), experts=2)"),  # there the blocks that change the shape read x
        ("optml", "wide_resnet(10, 1, released=True)"),  # its dense one does not
        ("optml", "pathway(resnet18(width=2), experts=2, routers=stage)"),
        ("optml", "pathway(resnet18(width=2), experts=2, norm=own)"),
        ("optml", "pathway(resnet18(width=2), experts=2, standardise=True)"),
        ("optml", "pathway(resnet18(width=2), experts=2, router=small_cnn)"),
        ("optml", "pathway(densenet(10, 4), experts=2)"),
        ("timl", "ensemble(resnet18(width=2), experts=2)"),
        ("timl", f"dual(resnet18(width=2), {ENSEMBLE})"),
        ("torchvision", "resnet18(width=2)"),
        ("robustbench", "resnet20"),
        ("robustbench", "preact_resnet(10, 2, padding=same)"),
        ("robustbench", "wide_resnet(10, 1, released=True)"),
        ("kastel", "block_moe(resnet18(width=2), experts=2, standardise=True)"),
        ("kastel", "block_moe(wide_resnet(10, 1), stages=(3,), experts=2)"),
    ],
)
def test_a_network_that_the_code_does_not_have_has_no_names_there(layout: str, spec: str) -> None:
    assert LAYOUTS[layout].pairs(made(spec)) == []


def test_a_router_that_is_not_the_same_in_every_layer_is_refused(tmp_path: Path) -> None:
    spec = "pathway(resnet10(width=4), experts=2)"
    names = theirs("optml", made(spec))
    copies = [name for name in names if name.endswith("router.fc.weight")]
    assert len(copies) == 1 + 8
    names[copies[3]] += 1
    torch.save(names, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"router.fc.weight' are copies of one tensor there, but differ"):
        load_weights(made(spec), tmp_path / "a.pt", "optml")


@pytest.mark.parametrize(
    "start, mean", [("", "mean"), ("module.", "normalize.mean"), ("1.", "0.mean"), ("model.", "mu")]
)
def test_what_the_images_are_normalised_by_is_read_from_beside_the_network(
    start: str, mean: str, tmp_path: Path
) -> None:
    spec = "wide_resnet(10, 1)"
    std = {"mu": "sigma"}.get(mean, mean.replace("mean", "std"))
    names = {start + name: value for name, value in theirs("robustbench", made(spec)).items()}
    names |= {mean: torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), std: torch.tensor([0.4, 0.5, 0.6])}
    names |= {f"{start}sub_block1.layer.0.bn1.weight": torch.ones(16)}  # what TRADES' networks have besides
    torch.save(names, tmp_path / "a.pt")
    other = made(spec, seed=1)
    loaded = load_weights(other, tmp_path / "a.pt")
    assert loaded.fit.layout == "robustbench"
    assert other.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert other.normalise.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_a_network_that_is_wrapped_for_attacks_is_read_once(tmp_path: Path) -> None:
    """MadryLab's robustness registers the network, and with it its normalisation, twice."""
    spec = "resnet10(width=2, stem=imagenet)"
    names = theirs("torchvision", made(spec))
    pixels = {"new_mean": torch.full((3, 1, 1), 0.25), "new_std": torch.full((3, 1, 1), 0.5)}
    state = {f"module.model.{name}": value for name, value in names.items()}
    state |= {f"module.attacker.model.{name}": value for name, value in names.items()}
    state |= {
        f"module.{place}.{name}": v for place in ("normalizer", "attacker.normalize") for name, v in pixels.items()
    }
    torch.save({"model": state, "epoch": 90}, tmp_path / "a.pt")
    other = made(spec, seed=1)
    loaded = load_weights(other, tmp_path / "a.pt")
    assert (loaded.fit.layout, loaded.stayed) == ("torchvision", ())
    assert torch.equal(other.network.stem.weight, names["conv1.weight"])
    assert other.normalise.mean.flatten().tolist() == [0.25] * 3


def test_deepminds_networks_are_given_the_mean_that_their_code_has(tmp_path: Path) -> None:
    """It is in no file; a run folder of such weights takes pixels in [0, 1] as they do."""
    spec = "wide_resnet(10, 1, activation=silu, padding=same)"
    source = made(spec)
    torch.save(theirs("robustbench", source), tmp_path / "a.pt")
    run = import_run(tmp_path / "a.pt", spec, out=tmp_path / "run", image_shape=(3, 16, 16), classes=10)
    assert run.loaded.fit.layout == "robustbench"
    other = made(spec, seed=1)
    load_weights(other, tmp_path / "a.pt")
    assert other.normalise.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert other.normalise.std.flatten().tolist() == pytest.approx([0.2471, 0.2435, 0.2616])
