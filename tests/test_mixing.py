"""Sparse dispatch: equal to the reference mix in value and every gradient, and it runs the chosen experts alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustmoe.models import RoutedModel, build_model, mix_reference, mix_sparse
from robustmoe.routing import to_expert

EXPERTS = 4


class Expert(nn.Module):
    """A convolution, a non-linearity and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Linear(3, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


CASES = {
    "top-1": torch.tensor([[2], [0], [2], [1], [3], [0]]),
    "one expert gets all": torch.full((6, 1), 2),
    "k = 2, expert 1 empty": torch.tensor([[0, 2], [3, 0], [2, 3], [0, 3], [2, 0], [3, 2]]),
    "k = E": torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(i)) for i in range(6)]),
    "one expert twice": torch.tensor([[1, 1], [0, 1], [3, 3]]),
    "batch of one": torch.tensor([[3, 1]]),
    "batch of zero": torch.zeros(0, 2, dtype=torch.long),
}


@pytest.mark.parametrize("case", CASES)
def test_sparse_equals_reference_in_values_and_gradients(case: str) -> None:
    index = CASES[case]
    experts = [Expert() for _ in range(EXPERTS)]
    x = torch.randn(len(index), 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(len(index), 5, dtype=torch.float64)
    parameters = [p for expert in experts for p in expert.parameters()]
    found = []
    for mix in (mix_reference, mix_sparse):
        out = mix(experts, x, index, weight)
        gradients = torch.autograd.grad((out * direction).sum(), [x, weight, *parameters], materialize_grads=True)
        found.append([out, *gradients])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_reference_is_the_definition() -> None:
    """Experts that multiply by 1, 10, 100: sum_j weight_j 10^index_j, by hand."""
    experts = [lambda x, s=s: x * s for s in (1.0, 10.0, 100.0)]
    x, index, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 2], [1, 0.25]])
    for mix in (mix_reference, mix_sparse):
        assert mix(experts, x, index, weight).tolist() == [[0.5 * 100 + 2 * 1], [1 * 2 * 10 + 0.25 * 2 * 100]]


def test_an_expert_sees_its_own_items_only_and_in_their_order() -> None:
    seen: dict[int, list[float]] = {}

    def expert(i: int, x: Tensor) -> Tensor:
        seen[i] = x[:, 0].tolist()
        return x

    experts = [lambda x, i=i: expert(i, x) for i in range(3)]
    mix_sparse(experts, torch.arange(5.0)[:, None], torch.tensor([[2], [0], [2], [2], [0]]), torch.ones(5, 1))
    assert seen == {0: [1.0, 4.0], 2: [0.0, 2.0, 3.0]}


def test_the_order_of_experts_does_not_matter() -> None:
    experts = [Expert() for _ in range(EXPERTS)]
    x, index = torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.randint(EXPERTS, (9, 2))
    weight, order = torch.rand(9, 2, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    renamed = mix_sparse([experts[i] for i in order], x, torch.argsort(order)[index], weight)
    torch.testing.assert_close(renamed, mix_sparse(experts, x, index, weight))


# ------------------------------------------------------------------------------------------------ what is executed


def flops(function: Callable[..., object], *args: object, **kwargs: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def small_cnn_flops(n: int, width: int, outputs: int, channels: int = 3, side: int = 8) -> int:
    """Twice the multiply-adds of the two strided convolutions and the head, a filter tap a multiply-add."""
    conv1 = (side // 2) ** 2 * width * channels * 9
    conv2 = (side // 4) ** 2 * 2 * width * width * 9
    return 2 * n * (conv1 + conv2 + 2 * width * outputs)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sparse_runs_exactly_the_chosen_pairs(k: int) -> None:
    """n * k passes of d * o multiply-adds, where the reference makes n * E."""
    n, d, o = 32, 7, 5
    experts = [nn.Linear(d, o) for _ in range(EXPERTS)]
    x, weight = torch.randn(n, d), torch.ones(n, k)
    index = torch.argsort(torch.rand(n, EXPERTS), -1)[:, :k]
    with torch.no_grad():
        assert flops(mix_sparse, experts, x, index, weight) == 2 * n * k * d * o
        assert flops(mix_reference, experts, x, index, weight) == 2 * n * EXPERTS * d * o


@pytest.mark.parametrize(
    "experts, k, gate", [(2, 1, "hard"), (8, 1, "straight_through"), (8, 3, "vmoe"), (4, 4, "soft")]
)
def test_an_ensemble_executes_its_router_and_k_experts(
    experts: int, k: int, gate: str, images: Callable[..., Tensor]
) -> None:
    spec = f"ensemble(small_cnn(width=4), experts={experts}, k={k}, gate={gate}, router=small_cnn(width=2))"
    model, x = build_model(spec, 4, (3, 8, 8)), images(16)
    with torch.no_grad():
        assert flops(model, x) == small_cnn_flops(16, 2, experts) + k * small_cnn_flops(16, 4, 4)


def conv_flops(n: int, side: int, inputs: int, outputs: int, kernel: int) -> int:
    return 2 * n * side * side * inputs * outputs * kernel * kernel


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_a_pathway_executes_one_pathway_whatever_the_number_of_experts(
    experts: int, images: Callable[..., Tensor]
) -> None:
    """ResNet-8 of width 8 and ratio 1/2 on 8x8 images: the stem has 8 channels, the stages 4, 8, 16."""
    spec = f"pathway(resnet8(width=8), experts={experts}, router=small_cnn(width=2))"
    model, n = build_model(spec, 4, (3, 8, 8)), 24
    x, pathway, inputs = images(n), conv_flops(n, 8, 3, 8, 3), 8
    for side, width in ((8, 4), (4, 8), (2, 16)):
        pathway += conv_flops(n, side, inputs, width, 3) + conv_flops(n, side, width, width, 3)
        pathway += conv_flops(n, side, inputs, width, 1)  # the shared 1x1 shortcut
        inputs = width
    pathway += 2 * n * 16 * 4
    with torch.no_grad():
        trace = model.run(x).trace
        assert flops(model, x) == pathway + small_cnn_flops(n, 2, experts)
        spread = trace["router"]
        spread.index.copy_(torch.arange(n)[:, None, None] % experts)  # every expert is used: still one pathway an image
        assert flops(model.run, x, forced=trace) == pathway + small_cnn_flops(n, 2, experts)
        assert flops(model.run, x, forced=to_expert(trace, 0)) == pathway + small_cnn_flops(n, 2, experts)


def test_an_image_is_answered_alike_in_any_batch(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    """Eval mode: alone, in another order, with others. Convolutions of another batch size may round differently."""
    x = images(12)
    order = torch.randperm(12)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(model(x[order]), whole[order], rtol=0, atol=1e-5)
        alone = torch.cat([model(x[i : i + 1]) for i in range(12)])
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_an_empty_batch_has_no_answers(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    for mode in (False, True):
        assert model.train(mode)(images(0)).shape == (0, 4)
