"""Small classifiers as other people write them: one for each way in which a router hands on its decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, EXPERTS = 8, 4


class Experts(nn.ModuleList):
    """Four different small networks; ``mix`` runs each on the rows it gets, and no other."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(EXPERTS))

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x (m, d), index and weight (m, k)."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            rows, ranks = torch.where(index == number)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, ranks, None])
        return out

    def all(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (m, d), weight (m, e); an expert runs where some row needs it."""
        parts = [weight[:, i : i + 1] * e(x) for i, e in enumerate(self) if bool((weight[:, i] != 0).any())]
        return torch.stack(parts).sum(0)


class Gate(nn.Module):
    """Scores (m, e); subclasses say what they return."""

    def __init__(self, k: int = 2) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, EXPERTS)
        self.k = k


class TripleGate(Gate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.proj(x)
        weight, index = logits.softmax(-1).topk(self.k, dim=-1)
        return logits, weight / weight.sum(-1, keepdim=True), index


class BiasedGate(Gate):
    """Chooses by sigmoid plus a bias for balance, weights by the sigmoid alone."""

    def __init__(self, k: int = 2) -> None:
        super().__init__(k)
        self.register_buffer("bias", torch.tensor([0.3, -0.3, 0.2, -0.1]))

    @torch.no_grad()
    def select(self, scores: Tensor) -> Tensor:
        return (scores + self.bias).topk(self.k, dim=-1).indices

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.proj(x)
        scores = logits.sigmoid()
        index = self.select(scores)
        weight = scores.gather(-1, index)
        return logits, 2.5 * weight / weight.sum(-1, keepdim=True), index


class PairGate(Gate):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, index = torch.topk(self.proj(x).softmax(-1), self.k, dim=-1, sorted=False)
        return index, weight, None


class MaskGate(Gate):
    """Dense weights beside the probabilities, by a comparison with the k-th largest."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.proj(x).softmax(-1)
        return p, p * (p >= p.kthvalue(EXPERTS - self.k + 1, dim=-1, keepdim=True).values).detach()


class SoftGate(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.proj(x), dim=-1)


class NumberGate(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return torch.argmax(self.proj(x), dim=1)


class CapacityGate(Gate):
    """Dispatch and combine tensors (b, t, e, c), first come first served in each image."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        room = max(1, x.shape[1] * self.k // EXPERTS)
        p = self.proj(x).softmax(-1)
        weight, index = p.topk(self.k, dim=-1)
        chosen = F.one_hot(index, EXPERTS).sum(-2)
        place = (chosen.cumsum(1) - 1) * chosen
        kept = chosen * (place < room)
        dispatch = F.one_hot(place.clamp(max=room - 1), room) * kept[..., None]
        share = torch.zeros_like(p).scatter(-1, index, weight / weight.sum(-1, keepdim=True))
        return dispatch.to(p.dtype), dispatch * share[..., None], p.mean()


class Layer(nn.Module):
    """A routed layer on tokens (n, t, d)."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x.flatten(0, 1)).view_as(x)

    def flat(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TripleLayer(Layer):
    def flat(self, x: Tensor) -> Tensor:
        _, weight, index = self.gate(x)
        return self.experts.mix(x, index, weight)


class PairLayer(Layer):
    def flat(self, x: Tensor) -> Tensor:
        index, weight, _ = self.gate(x)
        return self.experts.mix(x, index, weight)


class DividingLayer(Layer):
    """Counts on k experts an item in its arithmetic, and takes another way at inference, without gradient."""

    def flat(self, x: Tensor) -> Tensor:
        index, weight, _ = self.gate(x)
        return self.train_way(x, index, weight) if self.training else self.eval_way(x, index, weight)

    def train_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.experts.mix(x, index, weight)

    @torch.no_grad()
    def eval_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = index.flatten().argsort(stable=True)
        for number, expert in enumerate(self.experts):
            pairs = order[index.flatten()[order] == number]
            if len(pairs):
                rows = pairs // self.gate.k
                out.index_add_(0, rows, expert(x[rows]) * weight.flatten()[pairs, None])
        return out


class DenseLayer(Layer):
    def flat(self, x: Tensor) -> Tensor:
        weight = self.gate(x)
        return self.experts.all(x, weight if isinstance(weight, Tensor) else weight[1])


class NumberLayer(Layer):
    def flat(self, x: Tensor) -> Tensor:
        return self.experts.mix(x, self.gate(x)[:, None], torch.ones(len(x), 1))


class CapacityLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine, _ = self.gate(x)
        given = torch.einsum("btd,btec->ebcd", x, dispatch)
        return torch.einsum("ebcd,btec->btd", torch.stack([e(g) for e, g in zip(self.experts, given)]), combine)


class BlockLayer(Layer):
    """The gate is a plain Linear; the layer itself takes the top-k: "renormalised", "values", or "softmax" of them."""

    def __init__(self, then: str, k: int = 2) -> None:
        super().__init__(nn.Linear(WIDTH, EXPERTS))
        self.then, self.k = then, k

    def flat(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        weight, index = torch.topk(
            logits if self.then == "softmax" else F.softmax(logits, 1, dtype=torch.float), self.k
        )
        if self.then == "softmax":
            weight = weight.softmax(-1)
        if self.then == "renormalised":
            weight /= weight.sum(dim=-1, keepdim=True)
        return self.experts.mix(x, index, weight)


class SlotLayer(Layer):
    """Soft MoE with two slots an expert."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.slots = nn.Parameter(torch.randn(EXPERTS, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("btd,esd->btes", x, self.slots)
        given = torch.einsum("btd,btes->ebsd", x, logits.softmax(dim=1))
        answers = torch.stack([e(g) for e, g in zip(self.experts, given)])
        combine = logits.flatten(2).softmax(-1).unflatten(2, (EXPERTS, 2))
        return torch.einsum("btes,ebsd->btd", combine, answers)


class TwiceLayer(TripleLayer):
    """Asks the same router twice in a pass."""

    def flat(self, x: Tensor) -> Tensor:
        x = x + super().flat(x)
        return x + super().flat(x)


class Classifier(nn.Module):
    """Four patches of an image (3, 8, 8), a routed layer, the mean, ten classes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.moe = layer
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((h + self.moe(h)).mean(1))


class Pathway(nn.Module):
    """A router of the whole image, whose scores are copied into every convolution; each decides by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, EXPERTS))
        self.convs = nn.ModuleList(PathConv(i, 4) for i in (3, 4))
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        for conv in self.convs:
            conv.scores = scores
            x = F.relu(conv(x))
        return self.head(x.mean((2, 3)))


class PathConv(nn.Conv2d):
    def __init__(self, given: int, width: int) -> None:
        super().__init__(given, width * EXPERTS, 3, padding=1)
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.scores is not None
        mask = Best.apply(self.scores)
        self.scores = None
        return (super().forward(x).unflatten(1, (EXPERTS, -1)) * mask[..., None, None, None]).sum(1)


class Best(torch.autograd.Function):
    """A one-hot of the best score; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter_(1, torch.argmax(scores, dim=1, keepdim=True), 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Case:
    """A foreign model, and what a user writes to wrap it: path and codec. ``k`` experts of each of ``items``."""

    make: Callable[[], nn.Module]
    path: str
    codec: str
    k: int = 2
    items: int = 4
    soft: bool = False


CASES = {
    "triple": Case(lambda: Classifier(TripleLayer(TripleGate())), "moe.gate", "triple"),
    "biased": Case(lambda: Classifier(TripleLayer(BiasedGate())), "moe.gate", "triple"),
    "pair": Case(lambda: Classifier(PairLayer(PairGate())), "moe.gate", "pair"),
    "dividing": Case(lambda: Classifier(DividingLayer(PairGate())), "moe.gate", "pair"),
    "dense": Case(
        lambda: Classifier(DenseLayer(MaskGate())),
        "moe.gate",
        "dense(k=2, output=1, logits=0, scores_are=probabilities)",
    ),
    "soft": Case(lambda: Classifier(DenseLayer(SoftGate())), "moe.gate", "dense", k=EXPERTS, soft=True),
    "index": Case(lambda: Classifier(NumberLayer(NumberGate())), "moe.gate", "index", k=1),
    "dispatch": Case(lambda: Classifier(CapacityLayer(CapacityGate())), "moe.gate", "dispatch"),
    "logits": Case(lambda: Classifier(BlockLayer("renormalised")), "moe.gate", "logits(k=2)"),
    "topk": Case(lambda: Classifier(BlockLayer("values")), "moe", "call(topk)"),
    "topk renormalised": Case(
        lambda: Classifier(BlockLayer("renormalised")), "moe", "call(topk, weights=renormalised)"
    ),
    "topk softmax": Case(lambda: Classifier(BlockLayer("softmax")), "moe", "call(topk, weights=softmax)"),
    "argmax": Case(lambda: Classifier(NumberLayer(NumberGate())), "moe.gate", "call(argmax)", k=1),
    "softmax": Case(lambda: Classifier(DenseLayer(SoftGate())), "moe.gate", "call(softmax)", k=EXPERTS, soft=True),
    "slots": Case(lambda: Classifier(SlotLayer()), "moe", "slots", k=EXPERTS, soft=True),
    "twice": Case(lambda: Classifier(TwiceLayer(TripleGate())), "moe.gate", "triple"),
    "pathway": Case(Pathway, "router", "logits(gating=hard)", k=1, items=1),
}
