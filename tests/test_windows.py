"""Windows of coefficients beside whole maps: the same bounds, by two ways of holding them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks.threat import Norm
from robustmoe.certification import Ball, Bounded
from robustmoe.certification import bounds as module
from robustmoe.certification.graph import record
from robustmoe.certification.windows import Sliding, Windows, dense, plus


class Residual(nn.Module):
    """Two branches whose windows differ, with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, 1, 1)
        self.shortcut = nn.Conv2d(4, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.gelu(self.norm(self.first(x)))) - self.shortcut(x))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strides": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, (2, 1), (1, 2)), nn.LeakyReLU(0.1), nn.Conv2d(6, 4, 3),
        nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ),
    "groups and dilation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 2, dilation=2), nn.ReLU(), nn.Conv2d(4, 8, (3, 1), 1, (1, 0), groups=2, bias=False),
        nn.SiLU(), nn.Conv2d(8, 4, 2, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ),
    "branches": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), Residual(), nn.Conv2d(6, 4, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ),
    "maxima": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_bound_every_step_as_whole_maps_do(name: str, norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 10, 9, dtype=torch.float64)
    network = NETWORKS[name]().double().eval()
    network(x)
    ball = Ball(x, norm, torch.tensor([0.02, 0.05], dtype=torch.float64) * (1 if norm == "linf" else 5))
    graph = record(network, x)
    windows = Bounded(graph, ball, "crown")
    monkeypatch.setattr(module.Windows, "units", module._units)
    maps = Bounded(graph, ball, "crown")
    assert any(len(node.shape) == 4 and node.operation is not None for node in graph.nodes)
    for node in graph.nodes:
        torch.testing.assert_close(windows.interval[node].lower, maps.interval[node].lower, rtol=0, atol=1e-12)
        torch.testing.assert_close(windows.interval[node].upper, maps.interval[node].upper, rtol=0, atol=1e-12)


def test_bounds_by_windows_move_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    network = NETWORKS["branches"]().double().eval()
    network(x)
    ball = Ball(x, "linf", torch.full((2,), 0.02, dtype=torch.float64))
    rows = torch.eye(3, dtype=torch.float64)[:, None].expand(-1, 2, -1)

    def gradients() -> list[Tensor]:
        bound = Bounded(record(network, x), ball, "crown").lower(rows).sum()
        return list(torch.autograd.grad(bound, list(network.parameters())))

    windows = gradients()
    monkeypatch.setattr(module.Windows, "units", module._units)
    for ours, theirs in zip(windows, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert sum(float(each.abs().sum()) for each in windows) > 0


@pytest.mark.parametrize(
    "sliding", [Sliding((3, 3), (1, 1), (1, 1), (1, 1), 1), Sliding((3, 2), (2, 3), (0, 2), (2, 1), 2)]
)
def test_what_enters_a_convolution_is_its_transpose_of_what_leaves(sliding: Sliding) -> None:
    """Against autograd, from windows of one field and of several."""
    torch.manual_seed(2)
    kernel, stride, padding, dilation, groups = sliding
    x = torch.rand(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64)
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    z = F.conv2d(y, last := torch.randn(5, 6, 2, 2, dtype=torch.float64), padding=1)
    rows = Windows.units(torch.arange(z[0].numel()), z.detach())
    above = rows.before(Sliding((2, 2), (1, 1), (1, 1), (1, 1), 1), last, (y.shape[2], y.shape[3]))
    below = above.before(sliding, weight, (9, 8))
    assert below.window < (9, 8), "a window, no whole map"
    (expected,) = torch.autograd.grad(z, x, rows.dense(), is_grads_batched=True)
    torch.testing.assert_close(below.dense(), expected, rtol=0, atol=1e-12)


def test_windows_of_two_branches_are_added_where_they_lie() -> None:
    torch.manual_seed(3)
    place = torch.tensor([[0, 0], [3, 4]])
    one = Windows(1, torch.rand(1, 2, 3, 3, 2), place, (8, 9), (2, 2), (-1, -1)).inside()
    other = Windows(1, torch.rand(1, 2, 1, 2, 2), place, (8, 9), (2, 2), (0, 1)).inside()
    strided = Windows(1, torch.rand(1, 2, 1, 2, 2), place, (8, 9), (1, 1), (0, 1)).inside()
    both = plus(one, other)
    assert isinstance(both, Windows)
    assert both.window == (3, 4)
    assert torch.equal(both.dense(), one.dense() + other.dense())
    assert torch.equal(dense(plus(one, strided)), one.dense() + strided.dense())


def test_constants_without_a_dimension_are_of_the_networks_precision() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            inside = self.second(F.relu(2 - self.first(x) / 2 * self.scale) * 0.5 + 0.1)
            return F.relu(inside).flatten(1)

    torch.manual_seed(4)
    x, network = torch.rand(2, 3, 6, 6), Shifted().eval()
    low, high = (
        Bounded(record(network.to(dtype), x.to(dtype)), ball, "crown").interval
        for dtype in (torch.float32, torch.float64)
        for ball in [Ball(x.to(dtype), "linf", torch.full((2,), 0.02, dtype=dtype))]
    )
    for ours, theirs in zip(low.values(), high.values(), strict=True):
        assert ours.lower.dtype == torch.float32
        torch.testing.assert_close(ours.lower.double(), theirs.lower, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.upper.double(), theirs.upper, rtol=0, atol=1e-5)
