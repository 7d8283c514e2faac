"""Frozen copies: equal to the model where they claim to be, apart from it in memory, and never believed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import compat
from robustmoe.attacks import PGD, linf
from robustmoe.attacks.surrogate import Surrogate, missed
from robustmoe.evaluation.precision import Frozen, frozen_copy
from robustmoe.models import BatchNorm2d, Plain, RoutedModel
from robustmoe.models.convolution import Conv, RoutedConv, Segments
from robustmoe.routing import Tape, to_expert

FOLDED = {"dense": 9, "pathway": 10}
"""ResNet-8: stem, three blocks of two, two projections (three where the stages are narrower than the stem); the
ensembles of small CNNs have no BatchNorm.
"""


def lived_in(model: nn.Module) -> None:
    """BatchNorms as after training: statistics, scale and shift that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)


def gradient(model: RoutedModel, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def network(*layers: nn.Module) -> nn.Sequential:
    """The layers, which end in 5 channels, to 4 logits; BatchNorms lived in."""
    made = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    lived_in(made)
    return made


def storages(model: nn.Module) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}


# ------------------------------------------------------------------------------------------------ strict


def test_a_strict_copy_is_the_model(
    request: pytest.FixtureRequest, model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    lived_in(model)
    x, y = images(40), labels(40)
    made = frozen_copy(model, x)
    expected, found = model.run(x), made.run(x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert found.trace.keys() == expected.trace.keys()
    for name, routing in expected.trace.items():
        torch.testing.assert_close(found.trace[name].logits, routing.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.trace[name].index, routing.index)
    assert relative(gradient(made, x, y), gradient(model, x, y)) < 1e-3
    kind = request.node.callspec.params["model"]
    assert made.folded == FOLDED.get(kind, 0)
    assert made.note == f"a frozen copy, {made.folded} of {made.folded} BatchNorms folded"


def test_one_image_and_one_expert(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """A pathway copy runs an expert without splitting where it has all images."""
    model, x = tiny("pathway"), images(12)
    lived_in(model)
    made, trace = frozen_copy(model, x), model.run(x).trace
    for expert in range(3):
        forced = to_expert(trace, expert)
        torch.testing.assert_close(
            made.run(x, forced=forced).logits, model.run(x, forced=forced).logits, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(made(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
    assert made(x[:0]).shape == (0, 4)


def test_the_straight_through_gradient_survives_folding(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Of the router's logits, which only straight-through weights reach: <dL/dh, h> over the routed convolutions."""
    model, x, y = tiny("pathway").double(), images(12).double(), labels(12)
    lived_in(model)
    made = frozen_copy(model, x)
    assert made.folded == 10
    found = []
    for each in (model, made):
        output = each.run(x.clone().requires_grad_(True))
        loss = F.cross_entropy(output.logits, y, reduction="sum")
        found.append(torch.autograd.grad(loss, output.trace["router"].logits)[0])
    assert float(found[0].abs().min(dim=-1).values.max()) == 0  # an expert that is not chosen gets none
    assert float(found[0].abs().amax(-1).min()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_straight_through_gradient_by_hand() -> None:
    """One routed 1x1 convolution of filter f, BatchNorm y = s h + t, loss = y: h = f x, and dL/dw = <s, h> = s f x."""

    class One(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = RoutedConv(1, 1, 1, 1, 1), BatchNorm2d(1, eps=0.0)
            self.weight: Tensor | None = None

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            weight = torch.ones(len(x)) if self.weight is None else self.weight
            return self.norm(self.conv(x, Segments([len(x)], weight))).flatten(1)

    model = One().eval()
    with torch.no_grad():
        model.conv.experts[0].weight.fill_(3.0)
        model.norm.weight.fill_(2.0), model.norm.bias.fill_(7.0)
        model.norm.running_var.fill_(4.0), model.norm.running_mean.fill_(5.0)
    x = torch.tensor([0.5, 0.25])[:, None, None, None]
    made = frozen_copy(model, x)
    assert made.folded == 1
    weight = torch.ones(2, requires_grad=True)
    made.climbed.weight = weight
    y = made(x)
    assert y.flatten().tolist() == pytest.approx([2 / 2 * (1.5 - 5) + 7, 2 / 2 * (0.75 - 5) + 7])
    assert torch.autograd.grad(y.sum(), weight)[0].tolist() == pytest.approx([1.5, 0.75])


def test_the_model_is_left_as_it_was(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    for precision in ("strict", "fast"):
        made = frozen_copy(model, images(4), precision)
        assert [module.training for module in model.modules()] == modes
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not storages(model) & storages(made.climbed)
        assert not any(
            module.training for module in made.climbed.modules() if module.__module__ != frozen_copy.__module__
        )
        assert not any(parameter.requires_grad for parameter in made.climbed.parameters())


# ------------------------------------------------------------------------------------------------ what does not fold


class Twice(nn.Module):
    """The convolution's output goes to the BatchNorm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out) + out


class Again(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))


def test_plain_user_networks_fold(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    """torch's own layers, with bias and without, strided, grouped; a BatchNorm that follows none stays."""
    made_of = network(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 5, 1),
    )
    x, y, model = images(6), labels(6), Plain(made_of)
    made = frozen_copy(model, x)
    assert (made.folded, made.note) == (2, "a frozen copy, 2 of 3 BatchNorms folded")
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    assert relative(gradient(made, x, y), gradient(model, x, y)) < 1e-4
    assert gradient(made, x, y).is_contiguous()


def test_what_would_change_the_model_is_not_folded(images: Callable[..., Tensor]) -> None:
    x, model = images(6), Plain(network(Twice()))
    made = frozen_copy(model, x)
    assert made.folded == 0
    assert made.note.startswith("a frozen copy, not folded (folding would change it by")
    assert not storages(model) & storages(made.climbed)
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-6)


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 5, 3)
    conv.register_forward_hook(lambda module, args, out: out * 2)
    return nn.Sequential(conv, nn.BatchNorm2d(5))


class Doubled(Conv):
    """A convolution of its own: it says nothing of folding, so it does not inherit its parent's word."""

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return 2 * super().forward(x, segments)


class Mean(BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    "layers",
    [
        Again,
        hooked,
        lambda: nn.Sequential(Doubled(3, 5, 3, 1), nn.BatchNorm2d(5)),
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Mean(5)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3)), nn.BatchNorm2d(5)),
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
    ],
    ids=["norm_used_twice", "hook", "own_convolution", "own_norm", "weight_norm", "batch_statistics"],
)
def test_other_pairs_are_left_alone(layers: Callable[[], nn.Module], images: Callable[..., Tensor]) -> None:
    x, model = images(6), Plain(network(layers()))
    for precision in ("strict", "fast"):
        made = frozen_copy(model, x, precision)
        assert made.folded == 0
        assert made.note.startswith("a frozen copy, 0 of 1 BatchNorms folded")
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-6 if precision == "strict" else 0.05)


def test_what_cannot_be_copied_is_used_as_it_is(images: Callable[..., Tensor]) -> None:
    x, net = images(6), network(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    for precision in ("strict", "fast"):
        made = frozen_copy(Plain(lambda x: net(x)), x, precision)
        assert made.note.startswith("used as it is: a plain function cannot be copied")
        torch.testing.assert_close(made(x), net(x), rtol=0, atol=1e-6 if precision == "strict" else 0.05)
        assert made(x).dtype == torch.float32
    net.cache = net(x)  # not a leaf: torch refuses to copy it
    made = frozen_copy(Plain(net), x)
    assert made.note.startswith("used as it is: it cannot be copied (RuntimeError: Only Tensors created explicitly")
    assert torch.equal(made(x), net(x))


# ------------------------------------------------------------------------------------------------ fast


def test_a_fast_copy_is_nearly_the_model(
    model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """bf16 keeps 8 bits: a few per cent of the largest logit, on the model's own routes."""
    lived_in(model)
    x, y = images(40), labels(40)
    made = frozen_copy(model, x, "fast")
    assert made.note.endswith("; bf16 weights")
    assert {p.dtype for p in made.climbed.parameters() if p.ndim == 4} == {torch.bfloat16}
    with torch.no_grad():
        expected = model.run(x)
        found = made.run(x, forced=expected.trace)
    assert found.logits.dtype == torch.float32
    assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 0.05
    for name, routing in expected.trace.items():
        assert found.trace[name].logits.dtype == torch.float32
        assert float((found.trace[name].logits - routing.logits).abs().max() / routing.logits.abs().max()) < 0.05
    slope = gradient(made, x, y)
    assert slope.dtype == torch.float32
    assert slope.is_contiguous()
    assert float(F.cosine_similarity(slope.flatten(1), gradient(model, x, y).flatten(1)).median()) > 0.95


def test_float64_models(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("dense").double(), images(4).double()
    assert frozen_copy(model, x)(x).dtype == torch.float64
    made = frozen_copy(model, x, "fast")
    assert made.note.endswith("bf16 weights")
    assert made(x).dtype == torch.float32
    assert gradient(made, x, torch.zeros(4, dtype=torch.long)).dtype == torch.float64


def test_weights_used_outside_a_layer_fall_back_to_autocast(images: Callable[..., Tensor]) -> None:
    """The weight in a product of its own that autocast does not know: bf16 and float32 do not go together."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            pull = torch.zeros(5).index_add(0, torch.arange(5), self.conv.weight.sum((1, 2, 3)))
            return self.conv(x) + pull[:, None, None]

    x, model = images(6), Plain(network(Own()))
    made = frozen_copy(model, x, "fast")
    assert "; autocast to bf16; not bf16 weights (RuntimeError: " in made.note
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=0.05)


def test_a_model_that_bf16_breaks_stays_strict(images: Callable[..., Tensor]) -> None:
    """Features 64.1 and 64 are one number in bf16, and the logits are their difference."""

    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            nn.init.constant_(self.conv.bias, 64.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)).float() - 64.0

    x, model = images(6), Plain(Fine())
    made = frozen_copy(model, x, "fast")
    assert made.note.count("the logits would be off by") == 2
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-4)


def test_a_device_without_products_of_bf16_climbs_the_strict_copy(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There torch's bf16 takes many times what float32 takes: "fast" is what is fast."""
    model, x = tiny("pathway"), images(6)
    monkeypatch.setattr(compat, "multiplies", lambda device, dtype: dtype != torch.bfloat16)
    made = frozen_copy(model, x, "fast")
    assert made.note.endswith("; not bf16 (this cpu has no products of bf16, and would take longer)")
    assert torch.equal(made(x), frozen_copy(model, x)(x))


# ------------------------------------------------------------------------------------------------ who is believed


def test_a_claim_of_the_copy_is_not_believed(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """The model changes after the copy was made: its answers differ, and only the model's count."""
    model, x = tiny("dense"), images(6)
    made = frozen_copy(model, x)
    y = model(x).argmax(1)
    with torch.no_grad():
        made.climbed.network.head.bias[(y + 1) % 4] += 100.0
    assert (made(x).argmax(1) != y).any()
    assert not missed(made, x, made(x), y).any()
    assert isinstance(made, Surrogate)
    assert made.exact is model
    assert made.close


def test_attacked_through_a_copy_an_image_is_broken_as_the_model_says(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Same noise, gradients equal to rounding: PGD on the strict copy breaks what PGD on the model breaks.

    Centred, the logits of a fresh network say every class, by margins small and large.
    """
    model, x = tiny("dense"), images(32)
    with torch.no_grad():
        model.network.head.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    attack = PGD(linf(0.01), steps=5, keep="first")
    wrong = {}
    for name, target in (("exact", model), ("strict", frozen_copy(model, x)), ("fast", frozen_copy(model, x, "fast"))):
        with torch.no_grad():
            wrong[name] = model(attack(target, x, y)).argmax(1) != y
    assert 8 <= int(wrong["exact"].sum()) <= 24
    assert torch.equal(wrong["strict"], wrong["exact"])
    assert int((wrong["fast"] != wrong["exact"]).sum()) <= 1


def test_passes_are_counted(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Those of an attack, not those that compare the copy."""
    passes: list[tuple[int, bool]] = []
    model, x = tiny("dense"), images(5)
    made = frozen_copy(model, x, on_pass=lambda n, gradient: passes.append((n, gradient)))
    assert passes == []
    with torch.no_grad():
        y = model(x).argmax(1)
        made(x)
    gradient(made, x, y)
    assert passes == [(5, False), (5, True)]
    missed(made, x, made(x).detach(), y)  # right everywhere: the exact model is not asked
    missed(made, x, -made(x).detach(), y)
    assert passes[-1] == (5, False)
    assert len(passes) == 5


def test_of_an_attack_view_what_it_climbs_is_copied(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    view, exact, x = tiny("dense", seed=1), tiny("dense"), images(5)
    made = frozen_copy(Surrogate(view, exact), x)
    assert made.exact is exact
    assert not made.close
    torch.testing.assert_close(made(x), view(x), rtol=1e-4, atol=1e-5)


def test_a_probe_is_needed(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="give at least one image, got none"):
        frozen_copy(tiny("dense"), images(0))
    assert isinstance(frozen_copy(tiny("dense"), images(1)), Frozen)
