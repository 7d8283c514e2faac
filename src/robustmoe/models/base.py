"""`RoutedModel`: a classifier that says which experts it used; `ModelSpec`: its description, from which it is built
anywhere.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.foreign import blaming, first_look, foreign_pass, is_foreign
from robustmoe.models.norm import Normalise, at_least_float32
from robustmoe.models.parts import Leaf, Part, through
from robustmoe.models.token_layers import TokenLayer
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, Trace


class Output(NamedTuple):
    """What one pass gives: ``logits`` (n, c) in float32 or wider, and the ``trace``, one `Routing` a router."""

    logits: Tensor
    trace: Trace


class Carried:
    """The tape that a function's pass over ``images`` images hands to each `RoutedModel` inside. ``calls``: how many
    have run; the routers of the second are named "call2.router", and so on.
    """

    def __init__(self, tape: Tape, images: int) -> None:
        self.tape, self.images, self.calls = tape, images, 0

    def next(self, images: int) -> Tape:
        """The tape of the next model that runs, on so many images. It is one of its own where these are not the
        function's images one by one: such decisions cannot be told, nor replayed.
        """
        if images != self.images:
            return Tape()
        self.calls += 1
        return self.tape if self.calls == 1 else self.tape.under(f"call{self.calls}")


_CARRIED: ContextVar[Carried | None] = ContextVar("carried", default=None)


@contextlib.contextmanager
def carrying(tape: Tape, images: int) -> Iterator[Carried]:
    """Inside, every `RoutedModel` that runs on its own routes hands its decisions to ``tape``."""
    token = _CARRIED.set(carried := Carried(tape, images))
    try:
        yield carried
    finally:
        _CARRIED.reset(token)


class RoutedModel(nn.Module, ABC):
    """A classifier of images x (n, ch, h, w) in [0, 1]; write `body`, get `run` and `forward`.

    ``model(x)`` is one plain logits tensor (n, c), so AutoAttack, foolbox, torchattacks and ART take it unwrapped.
    ``model.run(x)`` tells the routes too, and ``model.run(x, forced=trace)`` replays given ones. A model without
    routers has the trace ``{}``. In `body`, hand every decision to the tape: ``routing = tape("router", top_k(logits,
    k))``, named by the router's module path.
    """

    @abstractmethod
    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        """Returns the logits of the images; each routing decision goes through ``tape``."""

    @property
    def foreign(self) -> bool:
        """Whether it runs code that is not of this package."""
        return is_foreign(self)

    def ask(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        """Returns the logits of `body` in float32 or wider. Everything here that runs a model calls this, or `run`.

        A foreign model cannot change the images, gives (1, c) also where it squeezes one image, and fails in one line:
        see `robustmoe.models.foreign`.
        """
        look = None if torch.compiler.is_compiling() else first_look(self)
        with contextlib.nullcontext() if look is None else blaming(self, x):
            logits = at_least_float32(foreign_pass(self, x, tape) if self.foreign else self.body(x, tape))
        if look is not None:
            look.see(x, logits)
        return logits

    def run(
        self,
        x: Float[Tensor, "n ch h w"],
        forced: Mapping[str, Routing] | None = None,
        noise: Noise | None = None,
    ) -> Output:
        """Runs one pass. Routers named in ``forced`` replay that decision; the others decide freely. ``noise``: one
        random stream an image; given (in training), routers that have training noise decide with it.

        Raises ValueError where ``forced`` names a router that this model does not have, or is of another batch or
        number of experts.
        """
        outer = None if torch.compiler.is_compiling() else _CARRIED.get()
        if outer is not None and forced is None and noise is None:
            tape = outer.next(len(x))
            return Output(self.ask(x, tape), tape.trace)
        tape = Tape(forced, noise)
        logits = self.ask(x, tape)
        unknown = set(tape.forced) - set(tape.trace)
        if unknown:
            raise ValueError(f"forced routing for {sorted(unknown)}, but this model's routers are {sorted(tape.trace)}")
        return Output(logits, tape.trace)

    def forward(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n c"]:
        """Returns the logits alone."""
        if torch.compiler.is_compiling() or _CARRIED.get() is not None:
            return self.run(x).logits
        return self.ask(x, Tape(read=False))

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        """Returns the routers' decisions alone. A model whose routers need no expert may run none."""
        return self.run(x).trace

    def layers(self) -> dict[str, TokenLayer]:
        """Returns the routed layers on tokens, by the names of their routers in the trace: what is measured layer by
        layer.

        These are all `TokenLayer`s inside, each with its router's name: its own path and ".router". Override it where
        the trace has other names. A model without such layers gives {}.
        """
        layers = {name: module for name, module in self.named_modules() if isinstance(module, TokenLayer)}
        return {f"{name}.router": layer for name, layer in layers.items()}

    def parts(self) -> Part:
        """Returns the networks and routers that the model consists of, for certificates. Raises UserError where they
        are not known; a model of your own says them by overriding this.
        """
        raise UserError(
            f"no certificate knows how {type(self).__name__} routes: expected a dense network, an ensemble, an image "
            "or stage pathway, or a dual of these (or a model with its own parts()); smoothing(...) certifies any model"
        )


class NetworkModel(RoutedModel):
    """What a model that is one ``network`` on normalised images has; subclasses write `body` with `answer`."""

    def __init__(self, network: nn.Module, normalise: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network

    def answer(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n c"]:
        """Returns the network's logits of images in [0, 1]."""
        return self.network(to_channels_last(self.normalise(x)))


class Dense(NetworkModel):
    """One network, no router: ``network`` on normalised images."""

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        return self.answer(x)

    def parts(self) -> Part:
        return Leaf(through(self.normalise, self.network))


def to_channels_last(x: Tensor) -> Tensor:
    """Channels-last memory, which convolutions prefer on CPU and CUDA alike; values unchanged. The gradient comes back
    in ordinary memory (the two reshapes): peers' attacks call ``view`` on it.
    """
    return x.flatten(1).unflatten(1, x.shape[1:]).contiguous(memory_format=torch.channels_last)


ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


class ModelSpec(ABC):
    """A model's description. Every subclass is a frozen dataclass that stands in `robustmoe.models.MODELS` under the
    name users write.
    """

    @abstractmethod
    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        """Returns the model, freshly initialised from torch's global generator (see `robustmoe.models.build_model` for
        a seeded one).
        """


class NetworkSpec(ModelSpec):
    """A plain network: usable alone, as an expert, and as a router (with one "class" an expert)."""

    @abstractmethod
    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """Returns an nn.Module from normalised images (n, ch, h, w) to (n, num_classes)."""

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        return Dense(self.network(num_classes, image_shape), normalise)
