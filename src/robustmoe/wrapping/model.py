"""A foreign model as a `RoutedModel`: `WrappedModel`, which `rm.wrap` makes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.foreign import left_alone
from robustmoe.models.token_layers import TokenLayer
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, detach
from robustmoe.wrapping.codecs import text_of
from robustmoe.wrapping.draws import Replayed
from robustmoe.wrapping.opening import Open
from robustmoe.wrapping.own import OwnGates
from robustmoe.wrapping.passes import Pass, Site
from robustmoe.wrapping.said import described

Gates = Literal["given", "own"]
Pick = Callable[[Any], Any] | str | int | None
"""How the logits are picked from a model's output: a function, a key, an attribute or a place; None: they are it, or
what a result called "logits" or the first of several holds."""

Climbs = tuple[str, ...] | Literal["opened"] | None

_switching = threading.RLock()


class WrappedModel(RoutedModel):
    """``model`` as it is, with its routers' decisions recorded and replayed.

    The model stays the user's own object: its weights are not copied, and hooks are on it during a pass only.
    ``sites``: where it decides; ``output``: how its logits are picked. ``climbs``: how a gradient is taken, where the
    way that the model goes in eval mode has none (the values are the exact ones, see `body`): None, as it is;
    "opened", by the same calls with gradients on; paths of modules, by the way that these go in training. ``draws``: 0,
    the model's random numbers are drawn as ever; 1, they are the same in every pass, for each image; more, that many
    passes are averaged. ``notes``: what a user should know of this model, one sentence each.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        output: Pick = None,
        climbs: Climbs = None,
        draws: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.sites = tuple(sites)
        self.output = output
        self.climbs = climbs
        self.draws = draws
        self.notes = tuple(notes)
        self.training = model.training  # not train(): the model's parts keep their own modes

    @property
    def foreign(self) -> bool:
        return True

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        """The logits of the model itself.

        With a way to climb, where a gradient is taken: the exact logits, and the gradient of a pass along that way, on
        the same route.
        """
        if self.climbs is None or not (torch.is_grad_enabled() and x.requires_grad):
            return self._averaged(x, tape)
        with Open() if self.climbs == "opened" else self._training(self.climbs):
            climbed = self._averaged(x, tape)
        with torch.no_grad():
            exact = self._averaged(x, Tape(detach(tape.trace)))
        return exact + (climbed - climbed.detach())

    def run(
        self,
        x: Float[Tensor, "n ch h w"],
        forced: Mapping[str, Routing] | None = None,
        noise: Noise | None = None,
        gates: Gates = "given",
    ) -> Output:
        """Runs one pass (see `RoutedModel.run`). ``gates``: "given", a forced router uses the forced index and weight;
        "own", the forced index with the weights that the router itself gives to these experts for this input, so that
        the gradient flows through the gate. UserError where these are not known.
        """
        if gates == "given":
            return super().run(x, forced, noise)
        tape = OwnGates(forced)
        logits = self.ask(x, tape)
        if unknown := set(tape.forced) - set(tape.trace):
            raise ValueError(f"forced routing for {sorted(unknown)}, but this model's are {sorted(tape.trace)}")
        return Output(logits, tape.trace)

    def layers(self) -> dict[str, TokenLayer]:
        """None: a foreign model's layers are known by their decisions alone."""
        return {}

    def extra_repr(self) -> str:
        lines = [f"{site.name}: {text_of(site.codec)}" for site in self.sites]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    # -------------------------------------------------------------------------------------------- passes

    def _averaged(self, x: Tensor, tape: Tape) -> Tensor:
        if self.draws == 0:
            return self._pass(x, tape)
        logits = []
        for draw in range(self.draws):
            with Replayed(len(x), draw):
                logits.append(self._pass(x, tape if self.draws == 1 else tape.under(f"draw{draw}")))
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]

    def _pass(self, x: Tensor, tape: Tape) -> Tensor:
        with Pass(self.model, self.sites, tape, len(x)):
            output = left_alone(self, x, self.model)
        return picked(output, self.output, len(x))

    @contextlib.contextmanager
    def _training(self, paths: Sequence[str]) -> Iterator[None]:
        """Inside, the modules to climb say that they train; they alone, their parts do not."""
        with _switching:
            modules = [self.model.get_submodule(path) for path in paths]
            before = [module.training for module in modules]
            try:
                for module in modules:
                    module.training = True
                yield
            finally:
                for module, was in zip(modules, before):
                    module.training = was


def picked(output: Any, pick: Pick, images: int) -> Tensor:
    """The logits (n, c) in a model's output for so many images. UserError where there are none."""
    try:
        logits = _pick(output, pick)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"output={pick!r} is not in what the model gives, {described(output)}: {error}") from error
    if isinstance(logits, Tensor) and logits.ndim == images == 1:  # squeezed
        logits = logits[None]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(
            f"the model gives {described(output)}; expected logits (images, classes), or output= to pick them: a "
            'function, a name ("logits") or a place (0)'
        )
    return logits


def _pick(output: Any, pick: Pick) -> Any:
    if callable(pick):
        return pick(output)
    if isinstance(pick, str):
        return output[pick] if isinstance(output, dict) and pick in output else getattr(output, pick)
    if pick is not None:
        return output[pick]
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", None) if hasattr(output, "logits") else output[0]
