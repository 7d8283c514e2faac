"""Structured pruning: which filters are kept, what trains the scores, and a training that starts from a dense run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.costs import costs
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import RoutedModel, build_model, resnet8
from robustmoe.models.convolution import Layers
from robustmoe.models.pruned import PrunedConv
from robustmoe.recipe import Recipe
from robustmoe.training import load_model, train
from robustmoe.training.checkpoint import read_state
from robustmoe.training.starting import start_from

PRUNED = "pruned(resnet8(width=8), ratio=0.5)"


def lived_in(model: nn.Module) -> None:
    """BatchNorms as after training, and scores that are no longer those of the weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, PrunedConv):
            nn.init.normal_(module.score)


def pruned_convs(model: nn.Module) -> list[PrunedConv]:
    return [module for module in model.modules() if isinstance(module, PrunedConv)]


def one(ratio: float, filters: list[list[float]], scores: list[list[float]]) -> PrunedConv:
    """A 1x1 convolution of these filters and scores."""
    conv = PrunedConv(ratio, len(filters[0]), len(filters), 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(filters)[:, :, None, None])
        conv.score.copy_(torch.tensor(scores)[:, :, None, None])
    return conv


# ------------------------------------------------------------------------------------------------ what is kept

SCORES = [[1.0, -2.0], [0.5, 0.5], [-3.0, 0.0], [2.0, -2.0], [0.0, 3.0]]
"""L1 norms 3, 1, 3, 4, 3: filter 3 first, then 0, 2, 4 in their order, then 1."""


@pytest.mark.parametrize(
    "ratio, kept",
    [(0.1, [3]), (0.2, [3]), (0.5, [0, 3]), (0.6, [0, 2, 3]), (0.99, [0, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_the_filters_of_the_largest_scores_are_kept(ratio: float, kept: list[int]) -> None:
    """The share is rounded down, at least one; of equal ones the first."""
    assert one(ratio, SCORES, SCORES).kept().tolist() == kept


def test_both_modes_by_hand() -> None:
    """Filters 0 and 3 of the five on one pixel (1, 10): 2 - 30 and 4 + 50; the other channels are 0."""
    conv = one(0.5, [[2.0, -3.0], [9.0, 9.0], [9.0, 9.0], [4.0, 5.0], [9.0, 9.0]], SCORES)
    x = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    for training in (True, False):
        assert conv.train(training)(x).flatten().tolist() == [-28.0, 0.0, 0.0, 54.0, 0.0]


def test_the_straight_through_gradient_by_hand() -> None:
    """h_f = m_f w_f . x on one pixel, loss = sum of g_f h_f. d loss / d |s| = g_f w x, number by number, for dropped
    filters too; times the score's sign. The weights' is g_f m_f x.
    """
    filters, scores = [[2.0, -3.0], [4.0, 5.0]], [[-1.0, 0.5], [3.0, -2.0]]
    conv, g = one(0.5, filters, scores).train(), torch.tensor([7.0, 11.0])
    assert conv.kept().tolist() == [1]
    loss = (conv(torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)).flatten() * g).sum()
    score, weight = torch.autograd.grad(loss, [conv.score, conv.weight])
    assert score.flatten().tolist() == [-1 * 7 * 2 * 1, 7 * -3 * 10, 11 * 4 * 1, -1 * 11 * 5 * 10]
    assert weight.flatten().tolist() == [0.0, 0.0, 11.0, 110.0]


def test_a_dropped_filter_comes_back_where_that_lowers_the_loss() -> None:
    """Loss (h - 1)^2 of the sum of two channels on x = 1: filter 0 gives -1, filter 1 would give 1."""
    conv = one(0.5, [[-1.0], [1.0]], [[1.0], [0.9]]).train()
    optimiser = torch.optim.SGD([conv.score], lr=0.1)
    before = conv(torch.ones(1, 1, 1, 1)).sum()
    (before - 1).square().backward()
    optimiser.step()  # d loss / d h = 2 (-1 - 1) = -4: scores 1 - 0.1 * 4 = 0.6 and 0.9 + 0.1 * 4 = 1.3
    assert conv.score.flatten().tolist() == pytest.approx([0.6, 1.3])
    assert (before.item(), conv(torch.ones(1, 1, 1, 1)).sum().item()) == (-1.0, 1.0)


def test_the_first_scores_are_the_weights_scaled() -> None:
    """The largest is sqrt(6 / fan-in); they keep the filters of the largest L1 norm."""
    for conv in pruned_convs(build_model(PRUNED, 4, (3, 8, 8))):
        scale = (conv.score / conv.weight).flatten()
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
        assert float(conv.score.detach().abs().max()) == pytest.approx((6 / conv.weight[0].numel()) ** 0.5)
        norms = conv.weight.detach().abs().sum((1, 2, 3))
        assert conv.kept().tolist() == sorted(norms.topk(conv.keep).indices.tolist())


# ------------------------------------------------------------------------------------------------ whole networks


def reference(model: RoutedModel) -> RoutedModel:
    """A dense network of the same tensors, the dropped filters set to 0."""
    dense = build_model("resnet8(width=8)", 4, (3, 8, 8))
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PrunedConv):
            norms = module.score.detach().abs().sum((1, 2, 3))
            low = norms.sort().values[: len(norms) - module.keep]
            state[f"{name}.weight"] = torch.where(
                torch.isin(norms, low)[:, None, None, None], 0, state[f"{name}.weight"]
            )
            del state[f"{name}.score"]
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_pruned_network_is_the_dense_one_with_filters_at_zero(
    training: bool, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Logits, and the gradient of the image."""
    x, y, model = images(6), labels(6), build_model(PRUNED, 4, (3, 8, 8))
    lived_in(model)
    found = []
    for each in (model, reference(model)):
        inputs = x.clone().requires_grad_(True)
        logits = each.train(training)(inputs)
        found.append((logits, torch.autograd.grad(F.cross_entropy(logits, y), inputs)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_at_ratio_1_it_is_the_dense_network(images: Callable[..., Tensor]) -> None:
    dense, pruned = (
        build_model(text, 4, (3, 8, 8)) for text in ("resnet8(width=8)", "pruned(resnet8(width=8), ratio=1)")
    )
    names = {name for name in pruned.state_dict() if not name.endswith(".score")}
    pruned.load_state_dict(dense.state_dict(), strict=False)
    assert names == set(dense.state_dict())
    for training in (False, True):
        assert torch.equal(pruned.train(training)(images(6)), dense.train(training)(images(6)))


def test_half_of_the_filters_cost_half() -> None:
    """The six 3x3 convolutions of ResNet-8 (width 8, 8 pixels) at half; stem, two projections, head whole."""
    whole = 64 * 9 * 3 * 8 + 16 * 8 * 16 + 4 * 16 * 32 + 32 * 4
    routed = 64 * 9 * 2 * 8 * 8 + 16 * 9 * (8 * 16 + 16 * 16) + 4 * 9 * (16 * 32 + 32 * 32)
    assert costs("resnet8(width=8)", 4, (3, 8, 8)).macs == whole + routed
    assert costs(PRUNED, 4, (3, 8, 8)).macs == whole + routed // 2
    layers = resnet8(8).make(4, (3, 8, 8), Layers(lambda *sizes: PrunedConv(0.5, *sizes)))
    assert len(pruned_convs(layers)) == 6


def test_an_image_does_not_depend_on_its_batch_and_a_copy_is_apart(images: Callable[..., Tensor]) -> None:
    model, x = build_model(PRUNED, 4, (3, 8, 8)), images(6)
    lived_in(model)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(model(x[2:3]), logits[2:3], rtol=1e-5, atol=1e-6)
        twin = copy.deepcopy(model)
        for conv in pruned_convs(twin):
            conv.score.neg_().add_(torch.arange(len(conv.score)).view(-1, 1, 1, 1))
        assert torch.equal(model(x), logits)
        assert not torch.allclose(twin(x), logits)


@pytest.mark.parametrize("precision, tolerance", [("strict", 1e-5), ("fast", 0.05)])
def test_a_frozen_copy_is_the_model(precision: Any, tolerance: float, images: Callable[..., Tensor]) -> None:
    """Only what is behind the stem and the two projections folds: no pruned convolution does. Scores that bf16 cannot
    tell apart (1 + f / 1000) still keep the same filters.
    """
    model, x = build_model(PRUNED, 4, (3, 8, 8)), images(40)
    lived_in(model)
    with torch.no_grad():
        for conv in pruned_convs(model):
            conv.score.copy_((1 + torch.arange(len(conv.score)) / 1000).view(-1, 1, 1, 1).expand_as(conv.score))
    made = frozen_copy(model, x, precision)
    assert made.folded == 3
    kept = [conv.kept().tolist() for conv in pruned_convs(model)]
    assert kept == [list(range(conv.out_channels // 2, conv.out_channels)) for conv in pruned_convs(model)]
    assert [conv.kept().tolist() for conv in pruned_convs(made.climbed)] == kept
    with torch.no_grad():
        off = (made(x) - model(x)).abs().max() / model(x).abs().max()
    assert float(off) < tolerance
    if precision == "fast":
        assert {conv.weight.dtype for conv in pruned_convs(made.climbed)} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------ init

FIELDS: dict[str, Any] = {
    "model": "resnet8(width=4)",
    "data": "digits",
    "method": "trades(pgd(linf(0.1), steps=1, keep=last, start=near))",
    "optimizer": "sgd(lr=0.05)",
    "epochs": 1,
    "batch_size": 64,
    "max_steps": 4,
    "val_limit": 20,
    "threads": 1,
}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(Recipe(**FIELDS), tmp_path_factory.mktemp("dense") / "run")


def test_a_pruned_model_starts_from_a_dense_run(dense_run: Path, images: Callable[..., Tensor]) -> None:
    """At ratio 1 it answers as the run does; the scores are those of the loaded weights, not of the random ones."""
    dense, x = load_model(dense_run), images(6, 1, 8, 8)
    whole = build_model("pruned(resnet8(width=4), ratio=1)", 10, (1, 8, 8), seed=5)
    assert not torch.equal(whole(x), dense(x))
    start_from(whole, dense_run)
    assert torch.equal(whole(x), dense(x))
    half = build_model("pruned(resnet8(width=4), ratio=0.5)", 10, (1, 8, 8), seed=5)
    start_from(half, dense_run)
    for conv in pruned_convs(half):
        norms = conv.weight.detach().abs().sum((1, 2, 3))
        assert conv.kept().tolist() == sorted(norms.topk(conv.keep).indices.tolist())


def test_scores_of_the_run_are_kept(tmp_path: Path) -> None:
    fields = {**FIELDS, "model": "pruned(resnet8(width=4), ratio=0.5)"}
    run = train(Recipe(**fields), tmp_path / "run")
    model = build_model(fields["model"], 10, (1, 8, 8), seed=5)
    start_from(model, run)
    for conv, trained in zip(pruned_convs(model), pruned_convs(load_model(run)), strict=True):
        assert torch.equal(conv.score, trained.score)
        assert not torch.allclose(conv.score / conv.score.abs().max(), conv.weight / conv.weight.abs().max(), atol=1e-4)


def test_init_is_part_of_the_run_and_resume_does_not_apply_it_again(dense_run: Path, tmp_path: Path) -> None:
    """Stopped after two steps and resumed with the initial run gone: the weights of a run that was not stopped."""
    first = tmp_path / "first"
    first.mkdir()
    for name in ("config.json", "model.safetensors"):
        (first / name).write_bytes((dense_run / name).read_bytes())
    fields = {**FIELDS, "model": "pruned(resnet8(width=4), ratio=0.5)", "init": str(first), "ema": 0.5}
    straight = train(Recipe(**fields), tmp_path / "straight")
    random = train(Recipe(**{**fields, "init": None}), tmp_path / "random")
    train(Recipe(**{**fields, "max_steps": 2}), tmp_path / "stopped")
    with pytest.raises(UserError, match=r"was trained with init = '.*first', this command says None"):
        train(Recipe(**{**fields, "init": None}), tmp_path / "stopped", resume=True)
    for file in first.iterdir():
        file.unlink()
    stopped = train(Recipe(**fields), tmp_path / "stopped", resume=True)
    assert json.loads((stopped / "config.json").read_text())["init"] == str(first)
    states = [read_state(run / "state.pt")["model"] for run in (straight, stopped, random)]
    averages = [(run / "model.safetensors").read_bytes() for run in (straight, stopped, random)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert averages[1] == averages[0] != averages[2]
    assert not torch.equal(states[2]["network.head.weight"], states[0]["network.head.weight"])


@pytest.mark.parametrize(
    "model, message",
    [
        ("resnet8(width=8)", r"init: .*'network.stem.weight' has shape \(4, 1, 3, 3\), the model's is \(8, 1, 3, 3\)"),
        (
            "linear",
            r"'network.head.weight' has shape \(10, 16\), the model's is \(10, 64\); expected the run of a model",
        ),
    ],
)
def test_the_weights_of_another_architecture_are_refused(dense_run: Path, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        start_from(build_model(model, 10, (1, 8, 8)), dense_run)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_common_tensor_is_refused(dense_run: Path, tmp_path: Path) -> None:
    class Bare(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(64, 10)

        def body(self, x: Tensor, tape: Any) -> Tensor:
            return self.own(x.flatten(1))

    with pytest.raises(
        UserError, match="has no tensor of the model's; expected the run of a model with the same layers"
    ):
        start_from(Bare(), dense_run)
    with pytest.raises(UserError, match="nowhere: not a run folder"):
        train(Recipe(**{**FIELDS, "init": str(tmp_path / "nowhere")}), tmp_path / "run")
