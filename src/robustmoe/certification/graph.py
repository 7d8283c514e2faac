"""What a network computes, as a list of operations that bounds can be pushed through: recorded while it runs.

The network's own code runs once on real images, and every torch function that touches something made of them is written
down. There is no second description of a network that could differ from the first, and nothing to add for a new one. A
function without a rule in `robustmoe.certification.functions.RULES` is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from robustmoe.certification.definitions import MADE_OF
from robustmoe.certification.functions import RULES
from robustmoe.certification.operations import Operation, Slot, Unbounded
from robustmoe.errors import UserError
from robustmoe.models.foreign import ours
from robustmoe.models.norm import full_precision
from robustmoe.spec import said

Network = Callable[[Tensor], Tensor]

_ABOUT = {
    Tensor.dim,
    Tensor.size,
    Tensor.__len__,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.new_zeros,
    Tensor.new_ones,
    torch.zeros_like,
    torch.ones_like,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "requires_grad")),
}
"""What may be asked of a tensor that is no part of its values."""


@dataclass(frozen=True, eq=False)
class Node:
    """One step: ``operation`` of the values of ``inputs``; None is the image itself. ``shape`` is (n, ...)."""

    operation: Operation | None
    inputs: tuple[Node, ...]
    shape: torch.Size


@dataclass(frozen=True)
class Graph:
    """The steps in the order in which they were made; the first is the image (n, ch, h, w), ``output`` the result."""

    nodes: list[Node]
    output: Node

    @property
    def image(self) -> Node:
        return self.nodes[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The recorded steps on other images of the same batch size."""
        values: dict[Node, Tensor] = {self.image: x}
        for node in self.nodes[1:]:
            assert node.operation is not None
            values[node] = node.operation(*(values[each] for each in node.inputs))
        return values[self.output]


class _Recorder(TorchFunctionMode):
    """``moving``: whether gradients are asked of what is made of weights alone, such as a class token an image."""

    def __init__(self, x: Tensor, moving: bool) -> None:
        super().__init__()
        self.moving = moving
        self.nodes = [Node(None, (), x.shape)]
        self.known: dict[int, tuple[Tensor, Node]] = {id(x): (x, self.nodes[0])}  # holds the tensors: ids stay theirs

    def node(self, value: object) -> Node | None:
        entry = self.known.get(id(value))
        return None if entry is None else entry[1]

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs: list[Node] = []
        slots = [self._slot(each, inputs) for each in args]
        named = {name: self._slot(each, inputs) for name, each in kwargs.items()}
        if not inputs:
            with torch.set_grad_enabled(self.moving):
                return function(*args, **kwargs)
        if function in _ABOUT:
            return function(*args, **kwargs)
        if function in MADE_OF:
            with self:
                return self._known(function, MADE_OF[function], args, kwargs)
        result = function(*args, **kwargs)
        rule = RULES.get(function)
        if rule is None:
            raise Unbounded(f"{resolve_name(function) or function}")
        operations = self._known(function, rule, slots, named)
        several = isinstance(result, tuple)
        for each, operation in zip(result, operations, strict=True) if several else [(result, operations)]:
            if self.node(each) is None:  # flatten, contiguous: sometimes the tensor itself
                self.nodes.append(Node(operation, tuple(inputs), each.shape))
                self.known[id(each)] = (each, self.nodes[-1])
        return result

    @staticmethod
    def _known(function: Callable[..., Any], rule: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return rule(*args, **kwargs)
        except TypeError as error:  # an argument that the rule does not know: out=, dtype=
            raise Unbounded(f"{resolve_name(function) or function} as it is called: {error}") from None

    def _slot(self, value: Any, inputs: list[Node]) -> Any:
        """The argument, with a `Slot` in the place of every recorded value; their steps go to ``inputs``."""
        if isinstance(value, list):
            return [self._slot(each, inputs) for each in value]
        if type(value) is tuple:
            return tuple(self._slot(each, inputs) for each in value)
        node = self.node(value)
        if node is None:
            return value
        inputs.append(node)
        return Slot(node.shape)


def record(network: Network, x: Tensor) -> Graph:
    """The steps of ``network`` (in eval mode) on images x (n, ch, h, w). Raises UserError where one has no bounds."""
    x, moving = x.detach().clone(), torch.is_grad_enabled()
    with torch.no_grad(), full_precision(x), _Recorder(x, moving) as recorder:
        try:
            result = network(x)
        except Unbounded as error:
            raise UserError(
                f"no bounds are known through {error}; expected convolutions, linear layers, BatchNorm, "
                "LayerNorm, ReLU, GELU, attention, pooling and sums. smoothing(...) certifies any model"
            ) from None
        except Exception as error:  # whatever it is, where it comes from the user's own network
            if isinstance(error, UserError) or ours(error, __name__):
                raise
            raise UserError(
                f"the network fails on images of {x.dtype} ({said(error)}), in which it is bounded; give the nn.Module "
                "itself, of which a copy is made in that dtype, and not a function around it, or bounds(..., "
                "dtype=float32)"
            ) from error
    output = recorder.node(result)
    if output is None:
        raise UserError("the network's result does not depend on its images by recorded steps; it cannot be bounded")
    return Graph(recorder.nodes, output)


@torch.no_grad()
def check(graph: Graph, network: Network, elsewhere: Tensor) -> None:
    """UserError unless the recorded steps are the network on other images too: a network that looks at values to decide
    what it computes, or computes outside of torch's functions, has no graph.
    """
    with full_precision(elsewhere):
        ours, theirs = graph(elsewhere), network(elsewhere)
    scale = theirs.abs().amax().clamp(min=1.0)
    if not bool(((ours - theirs).abs() <= 1e-4 * scale).all()):
        raise UserError(
            "the network does not compute the same steps for every image (it looks at values, or computes outside of "
            "torch's functions), so no bounds are known of it; smoothing(...) certifies any model"
        )
