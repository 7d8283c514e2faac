"""Costs: the published counts of AdvMoE's architectures, formulas of our own for what could not be built there, and
what a real forward pass executes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from robustmoe import costs as module
from robustmoe.cli import main
from robustmoe.costs import Costs, costs, rows, table
from robustmoe.models import RoutedModel, build_model
from tiny_models import in_turn


def near(published: float) -> object:
    """Within 0.1 %, or within the rounding of the last digit that is printed."""
    return pytest.approx(published, rel=1e-3, abs=5e-5)


PUBLISHED = [
    # pixels, classes; million parameters dense, slim, MoE of two; GMAC dense, slim, one pathway (advmoe.md, 4.2)
    ("resnet18", 32, 10, [11.174, 2.798, 5.565, 0.5554, 0.1393, 0.1517]),
    ("resnet34", 32, 10, [21.282, 5.327, 10.620, 1.1594, 0.2903, 0.3027]),
    ("resnet50", 32, 10, [23.521, 5.899, 11.075, 1.2978, 0.3249, 0.3310]),
    ("wrn_28_10", 32, 10, [36.479, 9.126, 18.240, 5.2433, 1.3109, 1.3109]),
    ("vgg16", 32, 10, [15.312, 4.013, 7.690, 0.3138, 0.0791, 0.0791]),
    ("densenet40", 32, 10, [0.176, 0.046, None, 0.0724, 0.0183, None]),
    ("resnet18", 128, 200, [11.271, 2.846, 5.614, 8.8868, 2.2288, 2.4275]),
    ("resnet18(stem=imagenet)", 224, 1000, [11.690, 3.056, 5.845, 1.8141, 0.4831, 0.4831]),
    ("resnet50(stem=imagenet)", 224, 1000, [25.557, 6.918, 12.779, 4.0892, 1.0523, 1.0523]),
    ("wrn_28_10(stem=imagenet)", 224, 1000, [37.116, None, 18.558, 16.0865, None, 4.0292]),
    ("vgg16", 224, 1000, [15.566, 4.267, 7.945, 15.3475, 3.8589, 3.8589]),
]


@pytest.mark.parametrize("text, pixels, classes, published", PUBLISHED)
def test_the_published_counts(text: str, pixels: int, classes: int, published: list[float | None]) -> None:
    """ "None": the released code does not construct it; the formulas below say what ours is."""
    shape = (3, pixels, pixels)
    dense, slim = costs(text, classes, shape), costs(f"slim({text})", classes, shape)
    moe = costs(f"pathway({text}, router=linear)", classes, shape)
    assert moe.router_parameters == 2 * (3 * pixels**2 + 1)
    assert moe.router_macs == 2 * 3 * pixels**2
    assert (dense.router_parameters, dense.router_macs) == (0, 0)
    found = [c.parameters - c.router_parameters for c in (dense, slim, moe)]
    for number, expected in zip(found, published[:3], strict=True):
        assert expected is None or number / 1e6 == pytest.approx(expected, rel=1e-3, abs=5e-4)
    for one, expected in zip((dense, slim, moe), published[3:], strict=True):
        assert expected is None or (one.macs - one.router_macs) / 1e9 == near(expected)


@pytest.mark.parametrize(
    "experts, ratio, parameters, gmac", [(2, 0.8, 14.138, 0.3632), (2, 0.2, 0.892, 0.0293), (5, 0.5, 13.832, 0.1517)]
)
def test_other_ratios_and_numbers_of_experts(experts: int, ratio: float, parameters: float, gmac: float) -> None:
    found = costs(f"pathway(resnet18, experts={experts}, ratio={ratio}, router=linear)")
    assert (found.parameters - found.router_parameters) / 1e6 == pytest.approx(parameters, rel=1e-3, abs=5e-4)
    assert (found.macs - found.router_macs) / 1e9 == near(gmac)


@pytest.mark.parametrize("pixels, gmac", [(32, 0.0406), (64, 0.1622), (128, 0.6488), (224, 1.9870)])
def test_the_router_at_every_image_size(pixels: int, gmac: float) -> None:
    """Six convolutions a stage, of 16, 32, 64 channels at full, half and quarter sides; the head's 64 a score. Alone
    and inside a model it counts the same.
    """
    stage = [9 * (3 * 16 + 6 * 16 * 16), 9 * (16 * 32 + 5 * 32 * 32), 9 * (32 * 64 + 5 * 64 * 64)]
    expected = sum(each * (pixels >> place) ** 2 for place, each in enumerate(stage)) + 64 * 2
    shape = (3, pixels, pixels)
    assert costs("resnet20", 2, shape) == Costs(269_202, 0, expected, 0)
    assert expected / 1e9 == near(gmac)
    inside = costs("pathway(resnet8(width=2), router=resnet20)", 10, shape)
    assert (inside.router_parameters, inside.router_macs) == (269_202, expected)


def test_a_router_of_a_large_image_may_see_a_small_one() -> None:
    """At 224 pixels the ResNet-20 router costs more than the dense ResNet-18; averaged down to 64, what it costs
    there.
    """
    shape = (3, 224, 224)
    assert costs("resnet20", 2, shape).macs > costs("resnet18(stem=imagenet)", 1000, shape).macs
    assert costs("downsampled(resnet20, size=64)", 2, shape) == costs("resnet20", 2, (3, 64, 64))


# ------------------------------------------------------------------------------------------------ formulas of our own


def wide(width: int, n: int, pixels: int, classes: int, ratio: float, experts: int, imagenet: bool) -> tuple[int, int]:
    """(parameters, multiply-adds) of a WRN: stem, three stages of n blocks of BatchNorm, 3x3, BatchNorm, 3x3, a 1x1
    where channels change, last BatchNorm, head. With experts every convolution but the stem has as many banks.
    """
    inputs, kernel = int(16 * ratio), 7 if imagenet else 3
    stem = 3 * inputs * kernel**2
    side = pixels // 2 if imagenet else pixels
    parameters, macs = stem + (2 * inputs if imagenet else 0), stem * side**2
    side = side // 2 if imagenet else side
    for stage in range(3):
        outputs = int(16 * width * 2**stage * ratio)
        side = side // 2 if stage else side
        for _ in range(n):
            filters = 9 * inputs * outputs + 9 * outputs**2 + (inputs * outputs if inputs != outputs else 0)
            parameters += experts * filters + 2 * inputs + 2 * outputs
            macs += filters * side**2
            inputs = outputs
    return parameters + 2 * inputs + inputs * classes + classes, macs + inputs * classes


def densely(
    blocks: list[int], growth: int, pixels: int, classes: int, ratio: float, experts: int, imagenet: bool
) -> tuple[int, int]:
    """The same of a DenseNet-BC: every layer BatchNorm, 1x1 to four growths, BatchNorm, 3x3 to one growth more; between
    the blocks BatchNorm, 1x1 to half, average.
    """
    inputs, k, kernel = int(2 * growth * ratio), int(growth * ratio), 7 if imagenet else 3
    stem = 3 * inputs * kernel**2
    side = pixels // 2 if imagenet else pixels
    parameters, macs = stem + (2 * inputs if imagenet else 0), stem * side**2
    side = side // 2 if imagenet else side
    for place, count in enumerate(blocks):
        for _ in range(count):
            filters = inputs * 4 * k + 9 * 4 * k * k
            parameters, macs = parameters + experts * filters + 2 * inputs + 8 * k, macs + filters * side**2
            inputs += k
        if place + 1 < len(blocks):
            filters = inputs * (inputs // 2)
            parameters, macs = parameters + experts * filters + 2 * inputs, macs + filters * side**2
            inputs, side = inputs // 2, side // 2
    return parameters + 2 * inputs + inputs * classes + classes, macs + inputs * classes


OWN = [
    ("wrn_28_10", 32, 10, lambda *form: wide(10, 4, 32, 10, *form, False)),
    ("wrn_28_10(stem=imagenet)", 224, 1000, lambda *form: wide(10, 4, 224, 1000, *form, True)),
    ("wide_resnet(depth=16, width=3)", 8, 7, lambda *form: wide(3, 2, 8, 7, *form, False)),
    ("densenet40", 32, 10, lambda *form: densely([6, 6, 6], 12, 32, 10, *form, False)),
    ("densenet40(stem=imagenet)", 224, 1000, lambda *form: densely([6, 6, 6], 12, 224, 1000, *form, True)),
    ("densenet121", 224, 1000, lambda *form: densely([6, 12, 24, 16], 32, 224, 1000, *form, True)),
]


@pytest.mark.parametrize("text, pixels, classes, formula", OWN, ids=[case[0] for case in OWN])
def test_formulas_of_wide_and_dense_networks(
    text: str, pixels: int, classes: int, formula: Callable[[float, int], tuple[int, int]]
) -> None:
    """Also what the released code does not construct: WRN-28-10's S-Dense at 224 pixels, every DenseNet pathway."""
    shape = (3, pixels, pixels)
    dense, slim = costs(text, classes, shape), costs(f"slim({text}, ratio=0.5)", classes, shape)
    assert (dense.parameters, dense.macs) == formula(1.0, 1)
    assert (slim.parameters, slim.macs) == formula(0.5, 1)
    for experts, ratio in ((2, 0.5),) if text == "densenet121" else ((2, 0.5), (3, 0.7)):
        moe = costs(f"pathway({text}, experts={experts}, ratio={ratio}, router=linear)", classes, shape)
        assert (moe.parameters - moe.router_parameters, moe.macs - moe.router_macs) == formula(ratio, experts)


# ------------------------------------------------------------------------------------------------ what runs

TINY = [
    "resnet8(width=4)",
    "resnet10(width=4, stem=imagenet)",
    "wide_resnet(depth=10, width=1)",
    "preact_resnet(depth=10, width=4, padding=same)",
    "vgg16(width=4)",
    "densenet(depth=10, growth=4)",
]


@pytest.mark.parametrize(
    "experts, extra, training, backbone",
    in_turn(
        [(2, "", False), (5, "", True), (5, ", norm=own", False), (5, ", norm=own", True), (5, "", False)],
        TINY,
        every=2,
    ),
)
def test_a_mixed_batch_executes_its_pathways_and_its_router_and_nothing_else(
    experts: int,
    extra: str,
    training: bool,
    backbone: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
) -> None:
    """n images, n times one slim pathway and the router, whatever the number of experts."""
    x = images(16)
    model = tiny(f"pathway({backbone}, experts={experts}, router=small_cnn(width=4){extra})").train(training)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trace = model.run(x).trace
    assert len(trace["router"].index.unique()) > 1
    pathway = costs(f"pathway({backbone}, experts=2, router=linear)", 4, (3, 8, 8))
    router = 9 * (3 * 4 * 4**2 + 4 * 8 * 2**2) + 8 * experts  # two strided convolutions and the head
    assert counter.get_total_flops() // 2 == 16 * (pathway.macs - pathway.router_macs + router)


@pytest.mark.parametrize(
    "text",
    [
        "resnet8(width=4)",
        "pathway(wide_resnet(depth=10, width=1), experts=3, router=resnet20(width=4), standardise=True)",
        "pathway(vgg16(width=4), experts=3, router=downsampled(resnet20(width=4), size=4), norm=own)",
        "pathway(densenet(depth=10, growth=4), experts=3, router=small_cnn, routers=stage)",
        "ensemble(resnet8(width=4), experts=3, k=2)",
        "ensemble(resnet8(width=4), experts=3, gate=soft, mix=probabilities)",
    ],
)
def test_a_model_costs_what_its_spec_does(text: str) -> None:
    """On the meta device without BatchNorms, and on a real image with them."""
    model = build_model(text, 4, (3, 8, 8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = costs(model, image_shape=(3, 8, 8))
    assert found == costs(text, 4, (3, 8, 8))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_ensemble_costs_its_k_experts_and_its_router() -> None:
    one, router = costs("resnet8(width=4)"), costs("small_cnn", 4)
    for gate, k, run in (("hard", 1, 1), ("renormalised", 3, 3), ("soft", 1, 4)):
        found = costs(f"ensemble(resnet8(width=4), experts=4, k={k}, gate={gate})")
        assert found.parameters == 4 * one.parameters + router.parameters
        assert found.macs == run * one.macs + router.macs
        assert (found.router_parameters, found.router_macs) == (router.parameters, router.macs)


def test_every_stages_router_is_counted() -> None:
    """ResNet-8 of width 8 has stages that get 8, 4, 8 channels of 32, 32, 16 pixels; a linear router reads them all."""
    found = costs("pathway(resnet8(width=8), experts=3, router=linear, routers=stage)")
    reads = [8 * 32**2, 4 * 32**2, 8 * 16**2]
    assert found.router_macs == 3 * sum(reads)
    assert found.router_parameters == 3 * sum(reads) + 3 * len(reads)
    alone = costs("pathway(resnet8(width=8), experts=3, router=linear)")
    assert found.macs - found.router_macs == alone.macs - alone.router_macs


# ------------------------------------------------------------------------------------------------ the table


def test_the_printed_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Per cent of dense as in research/advmoe.md, 4.3: 35 at 32 pixels, 136 at 224; 36 with the router at 64 pixels."""
    some = {32: (10, ("resnet18",)), 224: (1000, ("resnet18(stem=imagenet)",))}
    assert all(set(names) <= set(module.TABLE[size][1]) for size, (_, names) in some.items())
    monkeypatch.setattr(module, "TABLE", some)
    found = rows()
    shapes = [(row.architecture, row.image_shape[1], row.num_classes, row.router_pixels) for row in found]
    large = "resnet18(stem=imagenet)"
    assert shapes == [("resnet18", 32, 10, 32), (large, 224, 1000, 224), (large, 224, 1000, 64)]
    assert [round(row.pathway_percent) for row in found] == [35, 136, 36]
    assert [round(row.slim_percent) for row in found] == [25, 27, 27]
    monkeypatch.setattr(module, "rows", lambda: found)
    assert main(["list", "models", "--costs"]) == 0
    printed = capsys.readouterr().out
    assert printed == table(found) + "\n"
    first, second, third = (line.split() for line in printed.splitlines() if line.startswith("resnet18 "))
    assert first[1:] == ["32", "10", "11.174", "2.798", "5.565", "0.269"]
    assert second[1:] == ["32", "0.5554", "0.1393", "0.1517", "0.0406", "32"]
    assert third[1:] == ["32", "32", "25", "35"]
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("argv, got", [(["list", "--costs"], "no kind"), (["list", "attacks", "--costs"], "'attacks'")])
def test_costs_are_of_models_alone(argv: list[str], got: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert (
        f"--costs are those of the models; got {got}; write: robustmoe list models --costs" in capsys.readouterr().err
    )
