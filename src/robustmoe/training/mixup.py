"""mixup (Zhang et al., ICLR 2018): images and labels mixed with those of a partner.

Every image has a share of its own, drawn from its own stream; the paper's code draws one for the batch. The partner is
the next image of the batch (of this process's share of it, where there are several), the last one's the first: which
images meet depends on the data order alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.noise import Noise

CrossEntropy = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Labelled:
    """Images ``x`` (n, ch, h, w) in [0, 1], of the class ``y`` (n,) by the ``share`` (n,), of the class ``other`` (n,)
    by the rest; without a share of ``y`` alone.
    """

    x: Float[Tensor, "n ch h w"]
    y: Int[Tensor, " n"]
    other: Int[Tensor, " n"] | None = None
    share: Float[Tensor, " n"] | None = None

    @property
    def label(self) -> Int[Tensor, " n"]:
        """The class that has the larger share (of two equal ones the image's own)."""
        return self.y if self.other is None or self.share is None else torch.where(self.share < 0.5, self.other, self.y)

    def cross_entropy(
        self, logits: Float[Tensor, "n c"], label_smoothing: float = 0.0, of: CrossEntropy = "softmax"
    ) -> Float[Tensor, ""]:
        """Returns the mean of share * CE(y) + (1 - share) * CE(other): ``of`` the softmax, or of a sigmoid for each
        class, summed over the classes (see `sigmoid_cross_entropy`).
        """
        if of == "sigmoid":
            return sigmoid_cross_entropy(logits, self.target(logits.shape[1]), label_smoothing)
        if self.other is None or self.share is None:
            return F.cross_entropy(logits, self.y, label_smoothing=label_smoothing)
        own, other = (
            F.cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="none") for y in (self.y, self.other)
        )
        return (self.share * own + (1 - self.share) * other).mean()

    def target(self, classes: int) -> Float[Tensor, "n c"]:
        """Returns each class's share."""
        own = F.one_hot(self.y, classes).float()
        if self.other is None or self.share is None:
            return own
        return torch.lerp(F.one_hot(self.other, classes).float(), own, self.share[:, None])


def sigmoid_cross_entropy(
    logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"], label_smoothing: float
) -> Float[Tensor, ""]:
    """Returns the mean over images of the sum over classes of -t log s(z) - (1 - t) log s(-z), s the sigmoid and t the
    ``target`` with ``label_smoothing`` (1 - a) t + a / c: V-MoE's ``sigmoid_xent`` (Riquelme et al. 2021).
    """
    smooth = (target * (1 - label_smoothing) + label_smoothing / target.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, smooth, reduction="sum") / len(logits)


def mixed(x: Float[Tensor, "n ch h w"], y: Int[Tensor, " n"], noise: Noise, alpha: float) -> Labelled:
    """Returns each image share * x + (1 - share) * partner, the share from Beta(alpha, alpha)."""
    share = beta(noise.fold(MIXUP), alpha).to(x)
    partner, weight = torch.roll(x, -1, 0), share[:, None, None, None]
    return Labelled(weight * x + (1 - weight) * partner, y, torch.roll(y, -1, 0), share)


MIXUP = zlib.crc32(b"mixup")


def beta(noise: Noise, alpha: float) -> Float[Tensor, " n"]:
    """Returns a draw of Beta(alpha, alpha) an image: the inverse of its distribution function at a uniform number."""
    from scipy.special import betaincinv

    u = noise.uniform().double().cpu()
    return torch.from_numpy(betaincinv(alpha, alpha, u.numpy())).float().to(noise.state.device)
