"""X11: how far one token moves the others in a Soft MoE layer, as the learned scale sharpens its routing (LIP-9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustmoe import generators
from robustmoe.models.token_layers import SlotMoE, SlotRouter
from robustmoe.models.tokens import TokenExperts
from robustmoe.records.theory import Chart, ChartLine, Comparison, Experiment
from robustmoe.routing import Tape
from robustmoe.theory.draws import normal


def layer(seed: int, experts: int, slots: int, width: int, hidden: int) -> SlotMoE:
    """This library's Soft MoE layer in float64, weights drawn with variance 1 / inputs."""
    with generators.seeded(0):  # what the constructors draw is overwritten
        made = SlotMoE(SlotRouter(width, experts * slots), TokenExperts(experts, width, hidden)).double()
    with torch.no_grad():
        made.router.mu.copy_(normal(seed, "x11 mu", width, experts * slots))
        made.experts.w1.copy_(normal(seed, "x11 w1", experts, width, hidden) / math.sqrt(width))
        made.experts.w2.copy_(normal(seed, "x11 w2", experts, hidden, width) / math.sqrt(hidden))
        made.experts.b1.copy_(0.5 * normal(seed, "x11 b1", experts, hidden))
    return made.requires_grad_(False)


def jacobian(made: SlotMoE, tokens: Tensor) -> Tensor:
    """(t, o, t, d): every output token by every input token."""
    blocks: Tensor = torch.autograd.functional.jacobian(
        lambda x: made(x[None], Tape())[0], tokens, vectorize=True, strategy="reverse-mode"
    )
    return blocks


def sizes(full: Tensor) -> tuple[float, float]:
    """The spectral norm of the whole Jacobian, and the mean one of a block between two different tokens."""
    t, o, _, d = full.shape
    blocks = torch.linalg.matrix_norm(full.transpose(1, 2), ord=2)
    apart = blocks[~torch.eye(t, dtype=torch.bool)]
    return float(torch.linalg.matrix_norm(full.reshape(t * o, t * d), ord=2)), float(apart.mean())


def at_scale_0(made: SlotMoE, tokens: Tensor) -> float:
    """||J|| at scale 0, where all routing is even: every slot is the mean token, so J is the mean of the experts'
    Jacobians there, one block a pair of tokens, divided by their number: its norm is that of the mean Jacobian.
    """
    mean = tokens.mean(0)
    hidden = mean @ made.experts.w1 + made.experts.b1
    density = torch.exp(-0.5 * hidden.square()) / math.sqrt(2 * math.pi)
    slope = torch.special.ndtr(hidden) + hidden * density
    each = torch.einsum("edh,eh,eho->eod", made.experts.w1, slope, made.experts.w2)
    return float(torch.linalg.matrix_norm(each.mean(0), ord=2))


X11_PUBLISHED = {0: (0.81, 0.081), 1: (0.84, 0.082), 5: (1.52, 0.145), 20: (7.28, 0.192), 100: (22.6, 0.067)}
"""scale -> ||J||, block between two tokens (of which, or of how many, is not said); of other random weights."""


def x11(
    seed: int = 0,
    scales: Sequence[float] = tuple(X11_PUBLISHED),
    tokens: int = 10,
    experts: int = 4,
    slots: int = 2,
    width: int = 16,
) -> Experiment:
    """LIP-9: Soft MoE is smooth, but every output token depends on every input token, at any scale."""
    made = layer(seed, experts, slots, width, 4 * width)
    x = normal(seed, "x11 tokens", tokens, width)
    rows, measured, largest = [], [], 0.0
    for scale in scales:
        made.router.scale.fill_(scale)
        measured.append(sizes(jacobian(made, x)))
        largest = max(largest, float(made.router(x[None]).abs().max()) / max(scale, 1e-12))
    form = at_scale_0(made, x)
    if scales[0] == 0:
        rows += [
            Comparison("scale 0: ||J||, that of the experts' mean Jacobian", "equal", measured[0][0], form,
                       tolerance=1e-9),
            Comparison("scale 0: block between tokens, that / tokens", "equal", measured[0][1], form / tokens,
                       tolerance=1e-9),
        ]  # fmt: skip
    for scale, (norm, block) in zip(scales, measured):
        published = X11_PUBLISHED.get(int(scale), (None, None))
        rows += [
            Comparison(f"scale {scale:g}: ||J||", "measured only", norm, published=published[0], near=None),
            Comparison(f"scale {scale:g}: mean block between two tokens", "at least", block, 1e-6,
                       published=published[1], near=None),
        ]  # fmt: skip
    rows += [
        Comparison("||J|| at the largest scale / at the smallest", "at least", measured[-1][0] / measured[0][0], 2.0),
        Comparison("|logit| / scale, largest", "at most", largest, 1.0, tolerance=1e-9),
    ]
    chart = Chart(
        f"Soft MoE, {tokens} tokens, {experts} x {slots} slots",
        "scale (+1)",
        "spectral norm",
        (
            ChartLine("||J||, all tokens", tuple((s + 1, norm) for s, (norm, _) in zip(scales, measured))),
            ChartLine(
                "mean block between two tokens", tuple((s + 1, block) for s, (_, block) in zip(scales, measured))
            ),
        ),
        log_x=True,
        log_y=True,
    )
    says = (
        "Soft MoE has no jumps, but a large learned scale makes it as steep as a hard router, and one patch moves all "
        "output tokens at every scale."
    )
    return Experiment("X11", "Soft MoE and its scale", tuple(rows), says, seed, charts=(chart,))
