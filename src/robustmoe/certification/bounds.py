"""Bounds of a network over all images of a ball inside the pixel box: intervals (IBP) and linear bounds (CROWN).

Everything is batched, differentiable in the network's weights (certified training needs it), and in the dtype of the
images. Real arithmetic is bounded, not rounding: see `robustmoe.certification.certify` for the slack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustmoe.attacks.threat import Norm
from robustmoe.certification.graph import Graph, Node
from robustmoe.certification.nonlinear import Elementwise
from robustmoe.certification.operations import (
    Adding,
    Affine,
    Cast,
    Convolution,
    Interval,
    Operation,
    Round,
    Scaling,
    by_image,
)
from robustmoe.certification.windows import Coefficients, Windows, along, count, dense, dot, flat, plus, sizes
from robustmoe.models.norm import full_precision

Bounding = Literal["ibp", "crown_ibp", "crown"]
"""How: intervals alone; linear bounds of the result, whose relaxations come from intervals (Zhang et al. 2020); linear
bounds of every layer (Zhang et al. 2018)."""

KEEPING = (Scaling, Cast, Adding, Elementwise)
"""Operations whose output at a place of a map depends on the inputs at that place."""

WHOLE = (2**20, 2**20)
"""A window larger than any map."""

MEMORY = 32 * 2**20
"""Bytes of coefficients held at a time, about: more would not stay in a CPU's cache (twice as slow at 256 MiB)."""

_TOLD: ContextVar[Callable[[str], None]] = ContextVar("told", default=lambda text: None)


@contextlib.contextmanager
def telling(prefix: str = "", tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, ``tell`` (by default whoever is told outside) hears in words how far the bounds of every layer are, which
    can take minutes, with ``prefix`` before them.
    """
    outer = tell or _TOLD.get()
    token = _TOLD.set(lambda text: outer(prefix + text))
    try:
        yield
    finally:
        _TOLD.reset(token)


@dataclass(frozen=True)
class Ball:
    """All images within ``eps`` (n,) of x (n, ch, h, w) in ``norm``, inside the box [0, 1]; a radius an image."""

    x: Float[Tensor, "n ch h w"]
    norm: Norm
    eps: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"bounds are for linf and l2 balls; got {self.norm!r}")

    def __getitem__(self, select: Tensor | slice) -> Ball:
        """Of some of the images."""
        return Ball(self.x[select], self.norm, self.eps[select])

    @property
    def box(self) -> Interval:
        """Bounds of every pixel."""
        eps = self.eps.view(-1, 1, 1, 1)
        ball = Round(self.x, torch.ones_like(self.x), self.eps) if self.norm == "l2" else None
        return Interval((self.x - eps).clamp(min=0.0), (self.x + eps).clamp(max=1.0), ball)

    def lowest(self, slope: Coefficients) -> Float[Tensor, "s n"]:
        """The minimum over the ball of the sum of slope times image: exact in linf; in l2 exact but for the steps of a
        search, and never above the minimum.

        In l2 with the box, for every price m >= 0 of a step's square, min over the box of (slope . d + m d^2) - m eps^2
        is a lower bound (weak duality); m is searched by bisection, and m = 0 and no box are tried too.
        """
        box = self.box
        cube = _lowest(slope, box)
        if self.norm == "linf":
            return cube
        values, x = flat(slope), along(slope, self.x)
        low, high = along(slope, box.lower) - x, along(slope, box.upper) - x
        at = dot(slope, self.x)
        plain = at - self.eps * torch.linalg.vector_norm(values, dim=2)
        return torch.maximum(torch.maximum(cube, plain), at + self._priced(values, low, high))

    def _priced(self, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The best of the bounds of `lowest` by weak duality, without slope . x; for slopes (s, n, pixels) and steps
        between ``low`` and ``high``.
        """
        budget = self.eps.square()
        with torch.no_grad():
            size = torch.linalg.vector_norm(slope, dim=2)
            tiny = torch.finfo(size.dtype).tiny
            least, most = torch.zeros_like(size), size / (2 * self.eps).clamp(min=tiny)  # at the most, d is in the ball
            for _ in range(25):
                price = 0.5 * (least + most)
                step = (-slope / (2 * price.clamp(min=tiny))[..., None]).clamp(low, high)
                outside = step.square().sum(2) > budget
                least, most = torch.where(outside, price, least), torch.where(outside, most, price)
            price = most
        step = (-slope / (2 * price.clamp(min=tiny))[..., None]).clamp(low, high)
        value: Tensor = (slope * step).sum(2) + price * (step.square().sum(2) - budget)
        return value


class Bounded:
    """The bounds of every step of ``graph`` over ``ball``, as ``how`` makes them."""

    def __init__(self, graph: Graph, ball: Ball, how: Bounding = "crown_ibp") -> None:
        self.graph = graph
        self.ball = ball
        self.how = how
        self.interval: dict[Node, Interval] = {graph.image: ball.box}
        reached = reached_in_a_box(graph) if ball.norm == "linf" else set()
        with full_precision(ball.x):
            for node in graph.nodes[1:]:
                assert node.operation is not None
                if how == "crown" and not node.operation.affine and node.inputs[0] not in reached:
                    for main in node.operation.mains:
                        self._tighten(node.inputs[main], node.operation)
                self.interval[node] = node.operation.interval(*(self.interval[each] for each in node.inputs))

    def lower(self, rows: Float[Tensor, "s n c"]) -> Float[Tensor, "s n"]:
        """A lower bound over the ball of the sum of ``rows`` times the network's outputs, for s rows an image."""
        with full_precision(rows):
            return self._lower(self.graph.output, rows)

    def settled(self) -> Bool[Tensor, " n"]:
        """Of each image, whether every decision inside the network is the same in the whole ball."""
        same = torch.ones_like(self.ball.eps, dtype=torch.bool)
        for node in self.graph.nodes[1:]:
            if node.operation is not None and node.operation.chooses:
                same = same & ~node.operation.open(self.interval[node.inputs[0]]).flatten(1).any(1)
        return same

    def linear(self, rows: Float[Tensor, "s n c"]) -> tuple[Float[Tensor, "s n ch h w"], Float[Tensor, "s n"]]:
        """slope . x + offset, below the sum of ``rows`` times the outputs everywhere in the ball."""
        with full_precision(rows):
            left, offset = self._pull(self.graph.output, rows, through=True)
        return dense(left[self.graph.image]), offset

    def _lower(self, node: Node, rows: Tensor) -> Tensor:
        left, bound = self._pull(node, rows, through=False)
        for each, above in left.items():
            bound = bound + _least(dense(above), self.interval[each], self.ball if each is self.graph.image else None)
        if self.how == "ibp":
            return bound
        left, offset = self._pull(node, rows, through=True)
        return torch.maximum(bound, self.ball.lowest(left[self.graph.image]) + offset)

    def _pull(self, node: Node, rows: Coefficients, through: bool) -> tuple[dict[Node, Coefficients], Tensor]:
        """``rows`` (s, n, ...) of a step as coefficients of earlier ones, and what they leave over: of the image alone,
        or, unless ``through``, of the steps that are not affine.
        """
        above = {node: rows}
        offset = self.ball.x.new_zeros(count(rows), len(self.ball.x))
        left: dict[Node, Coefficients] = {}
        for each in reversed(self.graph.nodes[: self.graph.nodes.index(node) + 1]):
            if each not in above:
                continue
            own = above.pop(each)
            if each.operation is None or not (through or each.operation.affine):
                left[each] = own
                continue
            inputs = [self.interval[source] for source in each.inputs]
            coefficients, bias = (
                each.operation.pull_windows(own, inputs)
                if isinstance(own, Windows)
                else each.operation.pull(own, inputs)
            )
            if bias is not None:
                offset = offset + bias
            for source, coefficient in zip(each.inputs, coefficients, strict=True):
                above[source] = plus(above[source], coefficient) if source in above else coefficient
        if through and self.graph.image not in left:
            left[self.graph.image] = self.ball.x.new_zeros(count(rows), *self.ball.x.shape)
        return left, offset

    def _tighten(self, node: Node, operation: Operation) -> None:
        """Linear bounds of a step that enters ``operation``, which is not affine, where that matters in some image."""
        own = self.interval[node]
        open_ = operation.open(own).any(0).flatten()
        places = open_.nonzero()[:, 0]
        lower, upper = own.lower.flatten(1).clone(), own.upper.flatten(1).clone()
        field = own.lower.ndim == 4
        held = _held(self.graph, node) if field else max(each.shape.numel() for each in self.graph.nodes)
        at_once = max(1, MEMORY // (held * lower.element_size() * 4))
        of = f"step {self.graph.nodes.index(node)} of {len(self.graph.nodes) - 1}"
        for i, part in enumerate(places.split(at_once) if len(places) else ()):
            _TOLD.get()(f"{of}, {i * at_once:,} of {len(places):,} neurons")
            rows = (Windows.units if field else _units)(part, own.lower)
            lower[:, part] = torch.maximum(lower[:, part], self._crown(node, rows).T)
            upper[:, part] = torch.minimum(upper[:, part], -self._crown(node, -rows).T)
        self.interval[node] = Interval(lower.view_as(own.lower), upper.view_as(own.upper), own.round, own.joint)

    def _crown(self, node: Node, rows: Coefficients) -> Tensor:
        left, offset = self._pull(node, rows, through=True)
        return self.ball.lowest(left[self.graph.image]) + offset


def _units(numbers: Tensor, like: Tensor) -> Tensor:
    """(s, n, ...) coefficients that are 1 at each of ``numbers`` (s,), counted through ``like`` (n, ...)."""
    rows = torch.zeros(len(numbers), len(like), like[0].numel(), dtype=like.dtype, device=like.device)
    rows[torch.arange(len(numbers)), :, numbers] = 1.0
    return rows.view(-1, *like.shape)


def _held(graph: Graph, node: Node) -> int:
    """How many coefficients one row of windows of a step has at most on its way to the image, over all images."""
    windows, most = {node: (1, 1)}, 1
    for each in reversed(graph.nodes[: graph.nodes.index(node) + 1]):
        if each not in windows:
            continue
        window = windows.pop(each)
        whole = each.shape[2:].numel() if each.shape[2:] else 1
        most = max(most, each.shape.numel() // whole * min(whole, window[0] * window[1]))
        if isinstance(each.operation, Convolution):
            window = each.operation.sliding.field(window)
        elif each.operation is not None and not isinstance(each.operation, KEEPING):
            window = WHOLE
        for source in each.inputs:
            windows[source] = max(windows.get(source, (1, 1)), window)
    return most


def reached_in_a_box(graph: Graph) -> set[Node]:
    """The steps whose intervals over a box are reached at both ends, so that nothing closer can be found: an affine
    function of one step, each of whose numbers is one of a pixel of its own.
    """
    apart, reached = {graph.image}, {graph.image}
    for node in graph.nodes[1:]:
        if not isinstance(node.operation, Affine) or len(node.inputs) != 1:
            continue
        (source,) = node.inputs
        if source in apart or (node.operation.by_number and source in reached):
            reached.add(node)
        if source in apart and node.operation.by_number:
            apart.add(node)
    return reached


def _least(above: Tensor, interval: Interval, ball: Ball | None) -> Tensor:
    """(s, n) the minimum of the sum of ``above`` times a value within the interval (within the ball, of the image)."""
    if ball is not None:
        return ball.lowest(above)
    if interval.joint is not None:
        return by_image(interval.joint.lowest(above))
    return _lowest(above, interval)


def _lowest(above: Coefficients, interval: Interval) -> Tensor:
    """(s, n) the minimum of the sum of ``above`` times a value within the interval of each number."""
    middle, reach = 0.5 * (interval.lower + interval.upper), 0.5 * (interval.upper - interval.lower)
    return dot(above, middle) - dot(sizes(above), reach)
