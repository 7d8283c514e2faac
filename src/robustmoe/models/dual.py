"""A standard and a robust model blended by alpha (Zhang et al., ICML 2025), in probabilities as their theory and the
mixed classifiers before it have it (Bai et al., arXiv 2301.12554), or in logits as their released code does.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models.base import Dense, ImageShape, ModelSpec, NetworkSpec, RoutedModel
from robustmoe.models.norm import Normalise, at_least_float32
from robustmoe.models.parts import Mixed, Part
from robustmoe.routing import Tape, Trace

Mix = Literal["probabilities", "logits"]

ALPHA = 0.7
"""The robust half's share unless told: that of Zhang et al."""

SHIFT = 2.0
"""How far a mixer moves the logit of alpha at most: from 0.7 to between 0.24 and 0.95."""


class Sharpening(ABC):
    """What is done to the robust half's logits before they are blended. Subclasses are frozen dataclasses and stand in
    `SHARPENINGS`.
    """

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Returns the sharpened logits."""


@dataclass(frozen=True)
class Scaled(Sharpening):
    """Logits times ``scale``: a temperature of 1 / scale. Every prediction stays what it was."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return self.scale * logits


@dataclass(frozen=True)
class Nuts(Sharpening):
    """MixedNUTS (Bai et al., TMLR 2024, arXiv 2402.02263): scale * sign(u) |u|^power with u = GELU(v + shift), v the
    logits of an image with mean 0 and variance 1 over the classes. ``scale``, ``shift``, ``power``: the numbers in it.

    The defaults are the values they tuned for CIFAR-10, to be used with alpha = 0.99875. Predictions stay what they
    were where the largest v is above -shift: its u is then above 0. Below, they may change, as GELU falls towards its
    minimum at -0.752: with two classes v is (1, -1), and the default shift turns every prediction round.
    """

    scale: float = 5.0
    shift: float = -1.1
    power: float = 4.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not self.power > 0:
            raise ValueError(f"power must be above 0; got {self.power}")

    def __call__(self, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        u = F.gelu(F.layer_norm(logits, logits.shape[1:]) + self.shift)
        return self.scale * u.sign() * u.abs().clamp(min=torch.finfo(u.dtype).tiny) ** self.power


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be above 0; got {scale}")


SHARPENINGS: dict[str, Callable[..., Sharpening]] = {"scaled": Scaled, "nuts": Nuts}


def blend_logits(
    standard: Float[Tensor, "n c"], robust: Float[Tensor, "n c"], alpha: float | Float[Tensor, " n"], mix: Mix
) -> Float[Tensor, "n c"]:
    """Returns the blend of two logits: log((1 - alpha) softmax(standard) + alpha softmax(robust)) in log space, or (1 -
    alpha) standard + alpha robust. ``alpha``: the robust half's share, in [0, 1], one for all or one an image; 0 and 1
    (as numbers) give the half itself.
    """
    if isinstance(alpha, float | int):
        if alpha in (0, 1):
            return robust if alpha else standard
        alpha = standard.new_full(standard.shape[:1], alpha)
    share = alpha[:, None].to(standard.dtype).clamp(max=1 - torch.finfo(standard.dtype).eps)  # log1p has a gradient
    if mix == "logits":
        return (1 - share) * standard + share * robust
    log_standard, log_robust = torch.log_softmax(standard, 1), torch.log_softmax(robust, 1)
    return torch.logaddexp(torch.log1p(-share) + log_standard, torch.log(share) + log_robust)


class DualModel(RoutedModel):
    """``standard`` and ``robust``, two models for the same images and classes, blended by ``alpha``.

    ``alpha`` may be set at any time. At 0 and 1 the logits are those of the half alone (the robust one's before any
    ``sharpen``). With a ``mixer`` (a network from images to one number), alpha belongs to the image:
    sigmoid(logit(alpha) + 2 tanh(mixer(x))). The routers are named "standard.…" and "robust.…".
    """

    def __init__(
        self,
        standard: RoutedModel,
        robust: RoutedModel,
        alpha: float = ALPHA,
        mix: Mix = "probabilities",
        sharpen: Sharpening | None = None,
        mixer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if mix not in ("probabilities", "logits"):
            raise ValueError(f"mix must be 'probabilities' or 'logits'; got {mix!r}")
        self.standard = standard
        self.robust = robust
        self.mixer = mixer
        self.mix: Mix = mix
        self.sharpen = sharpen
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        """The robust half's share, in [0, 1]."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha(value)
        self._alpha = float(value)

    def at(self, alpha: float) -> DualModel:
        """Returns the same halves (the same modules, not copies) at another alpha, in the mode they are in."""
        other = DualModel(self.standard, self.robust, alpha, self.mix, self.sharpen, self.mixer)
        other.training = self.training
        return other

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        standard = self.standard.ask(x, tape.under("standard"))
        robust = self.robust.ask(x, tape.under("robust"))
        return self.blended(x, standard, robust)

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        """Returns the decisions of both halves' routers."""
        halves = {"standard": self.standard.route(x), "robust": self.robust.route(x)}
        return {f"{half}.{name}": routing for half, trace in halves.items() for name, routing in trace.items()}

    def parts(self) -> Part:
        if self.alpha in (0.0, 1.0):
            return (self.robust if self.alpha else self.standard).parts()
        if not (self.sharpen is None or isinstance(self.sharpen, Scaled)):
            raise UserError(
                f"no bounds are known through the sharpening {self.sharpen}; expected none or scaled(...), or use "
                "smoothing(...), which certifies any model"
            )
        scale = 1.0 if self.sharpen is None else self.sharpen.scale
        centre, shift = math.log(self.alpha / (1 - self.alpha)), 0.0 if self.mixer is None else SHIFT
        least, most = (1 / (1 + math.exp(-(centre + side * shift))) for side in (-1, 1))
        return Mixed(self.standard.parts(), self.robust.parts(), (least, most), self.mix, scale)

    def blended(
        self, x: Float[Tensor, "n ch h w"], standard: Float[Tensor, "n c"], robust: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Returns the logits of the images x, given those of the two halves."""
        if self.alpha in (0.0, 1.0):
            return blend_logits(standard, robust, self.alpha, self.mix)
        robust = robust if self.sharpen is None else self.sharpen(robust)
        return blend_logits(standard, robust, self.alphas(x), self.mix)

    def alphas(self, x: Float[Tensor, "n ch h w"]) -> float | Float[Tensor, " n"]:
        """Returns the alpha of each image; one number without a mixer."""
        if self.mixer is None or self.alpha in (0.0, 1.0):
            return self.alpha
        own = at_least_float32(self.mixer(x))[:, 0]
        return torch.sigmoid(math.log(self.alpha / (1 - self.alpha)) + SHIFT * torch.tanh(own))


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless it is a number from 0 to 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the robust half's share, a number from 0 (standard) to 1 (robust); got {alpha}")


@dataclass(frozen=True)
class Dual(ModelSpec):
    """``standard`` and ``robust`` (any models) blended by ``alpha``, the robust one's share.

    ``mix``: "probabilities", whose robustness the robust half alone can vouch for, or "logits" (the released code's),
    where the standard half's scale decides. ``sharpen``: of the robust half's logits, `scaled` or `nuts`. ``mixer``:
    a network that sets alpha for each image, about the given one.
    """

    standard: ModelSpec
    robust: ModelSpec
    alpha: float = ALPHA
    mix: Mix = "probabilities"
    sharpen: Sharpening | None = None
    mixer: NetworkSpec | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        halves = [
            half.build(num_classes, image_shape, copy.deepcopy(normalise)) for half in (self.standard, self.robust)
        ]  # each its own: they may come from runs on different data
        mixer = None if self.mixer is None else Dense(self.mixer.network(1, image_shape), normalise)
        return DualModel(halves[0], halves[1], self.alpha, self.mix, self.sharpen, mixer)
