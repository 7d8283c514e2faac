"""AdvMoE's Sparse baseline: a dense backbone that keeps a share of each convolution's filters, chosen by trained scores
(HYDRA, Sehwag et al. 2020, for whole filters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustmoe.models.backbone import Backbone, check_ratio
from robustmoe.models.base import ImageShape, NetworkSpec
from robustmoe.models.convolution import Conv, Handed, Layers


class PrunedConv(Conv):
    """A convolution that keeps ``ratio`` of its filters (rounded down, at least one): those whose scores have the
    largest L1 norm, of equal ones the first. The channels of the others are 0.

    In train mode every filter takes part: the filters are multiplied by 1 or 0, and d loss / d |score| is, number by
    number, what reaches that factor (straight-through), so that a dropped filter can come back. In eval mode only the
    filters that are kept are computed. Early in training, at large learning rates, filters come and go, and the
    running statistics of the BatchNorm behind one that has just come back are still those of zeros.
    """

    def __init__(self, ratio: float, inputs: int, outputs: int, kernel: int, stride: int, same: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, same)
        self.keep = max(1, int(ratio * outputs))
        self.score = nn.Parameter(torch.empty_like(self.weight))
        self.reset_score()

    @torch.no_grad()
    def reset_score(self) -> None:
        """Scores in proportion to the weights, the largest sqrt(6 / fan-in) (HYDRA, section 3.3)."""
        if self.weight.is_meta:  # there are no values
            return
        largest = self.weight.abs().amax().clamp(min=torch.finfo(self.weight.dtype).tiny)
        self.score.copy_(math.sqrt(6 / self.weight[0].numel()) * self.weight / largest)

    def kept(self) -> Int[Tensor, " kept"]:
        """Returns the filters that are kept, in ascending order."""
        norms = self.score.detach().abs().sum((1, 2, 3))
        return torch.argsort(norms, descending=True, stable=True)[: self.keep].sort().values

    def factor(self) -> Float[Tensor, "d c kh kw"]:
        """1 for the filters that are kept and 0 for the others, with the gradient of |score|."""
        mask = torch.zeros_like(self.score[:, :1, :1, :1]).index_fill(0, self.kept(), 1.0)
        size = self.score.abs()
        return mask + (size - size.detach())

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        if self.training:
            return self.convolved(x, self.weight * self.factor())
        kept = self.kept()
        part = self.convolved(x, self.weight[kept])
        shape = part.shape[0], self.out_channels, *part.shape[2:]
        out = part.new_zeros(shape).contiguous(memory_format=torch.channels_last)
        return out.index_copy_(1, kept, part)


@dataclass(frozen=True)
class Pruned(NetworkSpec):
    """AdvMoE's Sparse baseline: ``backbone`` with ``ratio`` of the filters of each convolution; the rest are pruned.

    In eval mode about ``ratio`` of the dense multiply-adds (`Slim` of that ratio: its square). What a pathway model
    does not route is not pruned: the stem, and the projections of a ResNet of the CIFAR form.

    The released code holds the layer alone, its weights frozen; the paper's schedule could not be found. Here weights
    and scores train together, under any method, from scratch or, with the recipe's ``init``, from a run of the dense
    backbone, whose weights then give the first scores.
    """

    backbone: Backbone
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def network(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        network = self.backbone.make(num_classes, image_shape, Layers(partial(PrunedConv, self.ratio)))
        reset_scores(network)  # the backbone gave its convolutions other weights after they were made
        return network


def reset_scores(model: nn.Module, known: frozenset[str] = frozenset()) -> None:
    """Makes the scores of every pruned convolution anew from its weights, but for those ``known`` by name."""
    for name, module in model.named_modules():
        if isinstance(module, PrunedConv) and f"{name}.score" not in known:
            module.reset_score()
