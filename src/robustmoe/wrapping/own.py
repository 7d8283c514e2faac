"""A forced choice with the router's own weights: the experts are given, what they count is worked out anew, by the
router's own code where that can be, so that the gradient flows through the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustmoe.errors import UserError
from robustmoe.routing import Routing, Tape
from robustmoe.wrapping.said import Codec, Said, dense
from robustmoe.wrapping.watching import dimension, tensors_of


class OwnGates(Tape):
    """A tape that forces the index alone. ``own``: the weights that the router of this moment gives to an index; the
    pass sets it.
    """

    def __init__(self, forced: Mapping[str, Routing] | None = None) -> None:
        super().__init__(forced)
        self.own: Callable[[Tensor], Tensor] | None = None

    def __call__(self, name: str, fresh: Routing) -> Routing:
        used = super().__call__(name, fresh)
        if used is fresh:
            return used
        if self.own is None:
            raise ValueError(f"nobody said what weights the router {name!r} gives; expected a wrapped model")
        if used.index.shape != fresh.index.shape:
            raise UserError(
                f"the forced routing of {name!r} has {used.k} experts an item, the router chooses {fresh.k}; its own "
                "weights are known for as many as it chooses"
            )
        with_own = replace(used, weight=self.own(used.index))
        self.trace[next(full for full, routing in self.trace.items() if routing is used)] = with_own
        return with_own


def own_weights(
    codec: Codec, said: Said, module: nn.Module, args: tuple[tuple[Any, ...], dict[str, Any]], index: Tensor
) -> Tensor:
    """What the router gives to the experts ``index`` (n, t, k): its forward runs again, and its top-k (or argmax) takes
    these. ``args``: what it was called with, by place and by name. UserError where its code has no such call.
    """
    experts = codec.read(said).num_experts
    with Choosing(said, index, experts) as choosing:
        again = module.forward(*args[0], **args[1])
    if not choosing.done:
        raise UserError(
            f"a {type(module).__name__} takes its decision by no top-k of its own, so its weights for other experts "
            "are not known; force index and weight, with gates='given'"
        )
    return dense(codec.read(replace(said, output=again))).gather(-1, index)


class Choosing(TorchFunctionMode):
    """Top-k and argmax among so many ``experts`` take the given ones: the first call the first columns, the next call
    the next ones.
    """

    def __init__(self, said: Said, index: Tensor, experts: int) -> None:
        super().__init__()
        self.said, self.index, self.experts = said, index, experts
        self._next = 0

    @property
    def done(self) -> bool:
        """Whether all experts have been taken."""
        return self._next >= self.index.shape[-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        given = next(tensors_of((args, kwargs)), None)
        if name not in ("topk", "argmax", "max") or given is None or given.shape[-1:] != (self.experts,):
            return result
        dim = dimension(name, args, kwargs)
        if self.done or dim is None or given.ndim < 2 or dim % given.ndim != given.ndim - 1:
            return result
        flat = result if name == "argmax" else result[1]
        width = flat.shape[-1] if flat.ndim == given.ndim else 1
        columns = self.index[..., self._next : self._next + width]
        self._next += width
        chosen = self.said.back(columns, given[..., :width])
        chosen = chosen.to(flat.dtype)
        if name == "argmax":
            return chosen.reshape(flat.shape)
        values = given.gather(-1, chosen).reshape(flat.shape)
        return type(result)((values, chosen.reshape(flat.shape)))
