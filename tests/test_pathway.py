"""Pathway models: dispatch against a second implementation that computes every expert and masks, and what follows from
it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks.half import LowPrecision
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import PathwayModel, RoutedModel, StagedPathwayModel, build_model, resnet8
from robustmoe.models.convolution import Layers, RoutedConv, RoutedNorm, Segments
from robustmoe.routing import to_expert

VARIANTS = {
    "image": "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4))",
    "image_own_norm": "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4), norm=own)",
    "stage": "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4), routers=stage)",
    "stage_own_norm": "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4), routers=stage, norm=own)",
}
BACKBONES = {
    "wide_resnet": "pathway(wide_resnet(10, 1), experts=3, router=small_cnn(width=4))",
    "vgg": "pathway(vgg16(width=4), experts=3, router=small_cnn(width=4))",
    "densenet": "pathway(densenet(depth=10, growth=4), experts=3, router=small_cnn(width=4))",
}

Built = Callable[..., PathwayModel | StagedPathwayModel]


def routers(model: RoutedModel) -> list[nn.Module]:
    return list(model.routers) if isinstance(model, StagedPathwayModel) else [model.router]


@pytest.fixture
def built(images: Callable[..., Tensor]) -> Built:
    """built(spec): in eval mode, float64, BatchNorms as after training, every router using every expert on
    ``images``.
    """

    @torch.no_grad()
    def make(spec: str) -> RoutedModel:
        model = build_model(spec, 4, (3, 8, 8)).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    tensor.uniform_(0.5, 1.5)
        x = images(48).double()
        for position, router in enumerate(routers(model)):  # a later router sees what the earlier ones made
            logits = list(model.run(x).trace.values())[position].logits[:, 0]
            scale = 1 / logits.std(0)
            router.head.weight.mul_(scale[:, None])
            router.head.bias.copy_((router.head.bias - logits.mean(0)) * scale)
        assert all(len(routing.index.unique()) == model.num_experts for routing in model.run(x).trace.values())
        return model

    return make


@pytest.fixture(params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest, built: Built) -> PathwayModel | StagedPathwayModel:
    """Each kind of pathway model in turn."""
    return built(VARIANTS[request.param])


# ------------------------------------------------------------------------------------------------ compute all, mask


@dataclass(frozen=True)
class Mask(Segments):
    """What the masked layers read in place of the segments: ``mask`` (n, e)."""

    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        return cls([], mask.sum(1), mask)


class MaskedConv(nn.Module):
    """All experts' filters on every image, times the mask (n, e), summed over the experts."""

    def __init__(self, conv: RoutedConv) -> None:
        super().__init__()
        self.experts = conv.experts

    def forward(self, x: Tensor, segments: Mask) -> Tensor:
        mask, one = segments.mask, self.experts[0]
        out = F.conv2d(x, torch.cat([expert.weight for expert in self.experts]), None, one.stride, one.padding)
        return (out.unflatten(1, (len(self.experts), -1)) * mask[:, :, None, None, None]).sum(1)


class MaskedNorm(nn.Module):
    """Expert by expert, on the rows of its images."""

    def __init__(self, norm: RoutedNorm) -> None:
        super().__init__()
        self.experts = norm.experts

    def forward(self, x: Tensor, segments: Mask) -> Tensor:
        out = torch.zeros_like(x)
        for k, norm in enumerate(self.experts):
            rows = torch.nonzero(segments.mask[:, k])[:, 0]
            if len(rows):
                out = out.index_copy(0, rows, norm(x[rows]))
        return out


def masked(model: RoutedModel) -> RoutedModel:
    """A copy with the same parameters' names, whose routed layers take a mask in place of the segments."""
    made = copy.deepcopy(model)
    for parent in list(made.network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RoutedConv):
                setattr(parent, name, MaskedConv(child))
            elif isinstance(child, RoutedNorm):
                setattr(parent, name, MaskedNorm(child))
    return made


def by_mask(made: RoutedModel, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and every router's scores. The mask is the one-hot of the best score; its gradient goes to that score."""
    scores: list[Tensor] = []

    def mask(router: nn.Module, x: Tensor) -> Mask:
        score = router(x)
        scores.append(score)
        return Mask.of(F.one_hot(score.argmax(1), score.shape[1]) * (1 + score - score.detach()))

    x = made.normalise(x)
    if isinstance(made, PathwayModel):
        return made.network(x, mask(made.router, x)), scores
    x = made.network.entry(x)
    for router, stage in zip(made.routers, made.network.stages):
        chosen = mask(router, x)
        x = stage(x, chosen)
    return made.network.exit(x, chosen), scores


def gradients(loss: Tensor, model: nn.Module, *others: Tensor) -> list[Tensor]:
    wanted = [*model.parameters(), *others]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found)]


def check_equal(model: RoutedModel, x: Tensor, y: Tensor, tolerance: float) -> None:
    """Outputs, gradients of weights, image and scores, and every buffer after the pass."""
    made, x = masked(model), x.requires_grad_(True)
    output = model.run(x)
    expected, scores = by_mask(made, x)
    assert float((output.logits - expected).detach().abs().max()) <= tolerance
    found_scores = [routing.logits for routing in output.trace.values()]
    left = gradients(F.cross_entropy(output.logits, y, reduction="sum"), model, x, *found_scores)
    right = gradients(F.cross_entropy(expected, y, reduction="sum"), made, x, *scores)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        torch.testing.assert_close(a.squeeze(), b.squeeze(), rtol=10 * tolerance, atol=10 * tolerance)
    for a in left[-len(scores) :]:
        assert ((a != 0).sum(-1) == 1).all()  # the chosen expert's score alone
    for name, value in made.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dispatch_is_the_masked_pass(
    training: bool,
    variant: PathwayModel | StagedPathwayModel,
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """C1, and C4 with a router a stage: float64, so that only the order of sums differs."""
    before = {name: value.clone() for name, value in variant.named_buffers()}
    check_equal(variant.train(training), images(24).double(), labels(24), 1e-9)
    moved = [name for name, value in variant.named_buffers() if not torch.equal(value, before[name])]
    assert bool(moved) == training


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_dispatch_is_the_masked_pass_in_every_backbone(
    name: str, training: bool, built: Built, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    check_equal(built(BACKBONES[name]).train(training), images(24).double(), labels(24), 1e-8)


@torch.no_grad()
def test_dispatch_is_the_masked_pass_in_float32(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor]
) -> None:
    """C1's own bound, 1e-5, in eval mode."""
    x = images(24)
    assert float((variant.float()(x) - by_mask(masked(variant), x)[0]).abs().max()) <= 1e-5


@torch.no_grad()
def test_the_true_loss_does_not_move_with_the_scores(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor]
) -> None:
    """C4: finite differences are 0; the straight-through gradient is declared, not found."""
    x = images(24).double()
    before = variant.run(x)
    for router in routers(variant):
        for expert in range(3):
            router.head.bias[expert] += 1e-9
            after = variant.run(x)
            assert torch.equal(after.logits, before.logits)
            router.head.bias[expert] -= 1e-9


# ------------------------------------------------------------------------------------------------ one image, any batch


@torch.no_grad()
def test_an_image_is_answered_alike_in_any_batch(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor]
) -> None:
    """In another order, alone, none at all, and where some experts have no image."""
    x = images(24).double()
    whole = variant.run(x)
    order = torch.randperm(24)
    torch.testing.assert_close(variant(x[order]), whole.logits[order], rtol=0, atol=1e-12)
    for i in range(6):
        torch.testing.assert_close(variant(x[i : i + 1]), whole.logits[i : i + 1], rtol=0, atol=1e-12)
    assert variant(x[:0]).shape == (0, 4)
    for routing in whole.trace.values():
        for expert in range(3):
            others = routing.index[:, 0, 0] != expert
            assert 0 < int(others.sum()) < 24
            torch.testing.assert_close(variant(x[others]), whole.logits[others], rtol=0, atol=1e-12)
            torch.testing.assert_close(variant(x[~others]), whole.logits[~others], rtol=0, atol=1e-12)


def test_experts_without_images_train_on(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """In train mode: no gradient for an expert that got no image, and its own BatchNorms stay as they were."""
    x, y = images(24).double(), labels(24)
    trace = variant.run(x).trace
    before = {name: value.clone() for name, value in variant.named_buffers()}
    output = variant.train().run(x, forced=to_expert(trace, 1))
    assert torch.isfinite(output.logits).all()
    names = [name for name, _ in variant.named_parameters()]
    for name, gradient in zip(names, gradients(F.cross_entropy(output.logits, y), variant)):
        if ".experts." in name:
            assert bool(gradient.any()) == (".experts.1." in name), name
    for name, value in variant.named_buffers():
        if ".experts." in name and name.endswith("running_mean"):
            assert torch.equal(value, before[name]) == (".experts.1." not in name), name


# ------------------------------------------------------------------------------------------------ static networks


@torch.no_grad()
def test_every_path_of_stages_is_a_static_slim_network(built: Built, images: Callable[..., Tensor]) -> None:
    """C5 with a router a stage: 2^3 paths, each the slim network of the banks on it; what the model says is one of
    these.
    """
    x, model = images(6).double(), built(VARIANTS["stage"].replace("experts=3", "experts=2"))
    free, state = model.run(x), model.network.state_dict()
    answers = []
    for path in itertools.product(range(2), repeat=3):
        slim = resnet8(4).make(4, (3, 8, 8), Layers(routed=True), 0.5).double().eval()
        bank = {name.replace(f".experts.{path[int(name.split('.')[1])]}.", "."): value for name, value in state.items()
                if ".experts." in name and f".experts.{path[int(name.split('.')[1])]}." in name}  # fmt: skip
        slim.load_state_dict(bank | {name: value for name, value in state.items() if ".experts." not in name})
        forced = {name: to_expert({name: free.trace[name]}, k)[name] for name, k in zip(free.trace, path)}
        answers.append(slim(model.normalise(x)))
        torch.testing.assert_close(model.run(x, forced=forced).logits, answers[-1], rtol=0, atol=1e-9)
    every = torch.stack(answers, 1)
    assert float(torch.pdist(every[0]).min()) > 1e-6
    chosen = torch.cat([routing.index[:, 0] for routing in free.trace.values()], 1) @ torch.tensor([4, 2, 1])
    torch.testing.assert_close(free.logits, every[torch.arange(6), chosen], rtol=0, atol=1e-9)


@torch.no_grad()
def test_an_image_has_as_many_answers_as_there_are_experts(built: Built, images: Callable[..., Tensor]) -> None:
    """C5: whatever the router says; 20 routers drawn at random give each image one of three answers."""
    x, model = images(12).double(), built(VARIANTS["image"])
    trace = model.run(x).trace
    every = torch.stack([model.run(x, forced=to_expert(trace, k)).logits for k in range(3)], 1)
    used = torch.zeros(12, 3, dtype=torch.bool)
    for _ in range(20):
        model.router.head.bias.normal_(0, 2)
        near = (model(x)[:, None] - every).abs().amax(-1) < 1e-9
        assert (near.sum(1) == 1).all()
        used |= near
    assert (used.sum(1) > 1).any()


@pytest.mark.parametrize("routed_by", ["image", "stage"])
@torch.no_grad()
def test_routing_has_no_effect_where_all_experts_are_one(
    routed_by: str, built: Built, images: Callable[..., Tensor]
) -> None:
    """C10: one expert, or identical ones: the slim network's answer under any route."""
    x = images(12).double()
    one = built(f"pathway(resnet8(width=4), experts=1, router=small_cnn(width=4), routers={routed_by})")
    three = built(f"pathway(resnet8(width=4), experts=3, router=small_cnn(width=4), routers={routed_by})")
    same = {name: value for name, value in one.network.state_dict().items() if ".experts." not in name}
    for name, value in one.network.state_dict().items():
        if ".experts." in name:
            same |= {name.replace(".experts.0.", f".experts.{k}."): value for k in range(3)}
    three.network.load_state_dict(same)
    slim = resnet8(4).make(4, (3, 8, 8), Layers(routed=True), 0.5).double().eval()
    slim.load_state_dict({name.replace(".experts.0.", "."): value for name, value in one.network.state_dict().items()})
    expected, trace = slim(one.normalise(x)), three.run(x).trace
    for answer in (one(x), three(x), *(three.run(x, forced=to_expert(trace, k)).logits for k in range(3))):
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ a broken router


def broken(model: RoutedModel, expert: int | slice, value: float) -> RoutedModel:
    with torch.no_grad():
        for router in routers(model):
            router.head.bias[expert] = value
    return model


@torch.no_grad()
def test_a_broken_router_is_never_an_answer(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor]
) -> None:
    """C7: NaN or infinite scores, even of one expert alone, are NaN logits, under bf16 autocast too."""
    x, model = images(12), variant.float()
    for expert, value in ((slice(None), torch.nan), (2, torch.nan), (1, torch.inf)):
        made = broken(copy.deepcopy(model), expert, value)
        assert made(x).isnan().all()
        assert made.train()(x).isnan().all()
        assert LowPrecision(made.eval())(x).isnan().all()
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("precision", ["strict", "fast"])
@pytest.mark.parametrize("name", ["image", "stage_own_norm"])
@torch.no_grad()
def test_a_broken_router_is_never_an_answer_of_a_copy(
    name: str, precision: Literal["strict", "fast"], built: Built, images: Callable[..., Tensor]
) -> None:
    """C7: broken after the copy was made, folded, or before."""
    x, model = images(12), built(VARIANTS[name]).float()
    made = frozen_copy(model, x, precision)
    assert made.folded > 0
    assert torch.isfinite(made(x)).all()
    broken(made.climbed.model if isinstance(made.climbed, LowPrecision) else made.climbed, 2, torch.nan)
    assert made(x).isnan().all()
    assert torch.isfinite(model(x)).all()
    assert frozen_copy(broken(model, 2, torch.nan), x, precision)(x).isnan().all()


@torch.no_grad()
def test_a_broken_image_is_nan_and_no_other(
    variant: PathwayModel | StagedPathwayModel, images: Callable[..., Tensor]
) -> None:
    x = images(12).double()
    whole = variant(x)
    x[5] = torch.nan
    found = variant(x)
    assert found[5].isnan().all()
    rest = torch.arange(12) != 5
    torch.testing.assert_close(found[rest], whole[rest], rtol=0, atol=1e-12)
