"""Lipschitz constants of a network over a ball, from bounds of its Jacobian there: intervals of derivatives, pushed
backwards step by step (the chain rule in interval arithmetic; Zhang et al. 2019, RecurJac, is a sharper form of it).

The ball is convex, inside the box [0, 1] too, so two images of it are joined by a line of it, and along that line a
function changes by its derivative (Clarke's, where there is a corner): a bound of the gradient's dual norm over the
ball is a Lipschitz constant on the ball.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.certification.bounds import MEMORY, Ball, Bounded, Bounding
from robustmoe.certification.graph import Node, record
from robustmoe.certification.operations import Slopes
from robustmoe.models.norm import full_precision
from robustmoe.models.parts import Function


def lipschitz(bounded: Bounded, rows: Float[Tensor, "s n c"]) -> Float[Tensor, "s n"]:
    """Lipschitz constants over the ball, in its norm, of the sums of ``rows`` times the network's outputs.

    In linf the sum over the pixels of the largest size of the derivative, in l2 the root of the sum of its square.
    Exact for an affine network.
    """
    widest = max(node.shape.numel() for node in bounded.graph.nodes)
    at_once = max(1, MEMORY // (widest * rows.element_size() * 8))
    with full_precision(rows):
        return torch.cat([_lipschitz(bounded, part) for part in rows.split(at_once)])


def _lipschitz(bounded: Bounded, rows: Tensor) -> Tensor:
    graph = bounded.graph
    above: dict[Node, Slopes] = {graph.output: Slopes(rows, rows)}
    for node in reversed(graph.nodes[1 : graph.nodes.index(graph.output) + 1]):
        if node not in above:
            continue
        own = above.pop(node)
        assert node.operation is not None
        products = node.operation.slopes(own, [bounded.interval[each] for each in node.inputs])
        for each, slopes in zip(node.inputs, products, strict=True):
            known = above.get(each)
            above[each] = slopes if known is None else Slopes(known.lower + slopes.lower, known.upper + slopes.upper)
    at_image = above.get(graph.image)
    if at_image is None:  # the image itself is not used
        return rows.new_zeros(rows.shape[:2])
    size = torch.maximum(at_image.lower.abs(), at_image.upper.abs()).flatten(2)
    return size.sum(2) if bounded.ball.norm == "linf" else torch.linalg.vector_norm(size, dim=2)


def pair_slopes(bounded: Bounded) -> Float[Tensor, "n c c"]:
    """Lipschitz constants over the ball of every difference of two outputs, [i, k] of z_i - z_k."""
    c = bounded.graph.output.shape[1]
    i, k = torch.triu_indices(c, c, 1, device=bounded.ball.x.device)
    unit = torch.eye(c, dtype=bounded.ball.x.dtype, device=bounded.ball.x.device)
    rows = (unit[i] - unit[k])[:, None].expand(-1, len(bounded.ball.x), -1)
    pairs = unit.new_zeros(len(bounded.ball.x), c, c)
    if len(i):
        pairs[:, i, k] = lipschitz(bounded, rows).T
    return pairs + pairs.transpose(1, 2)


def steepness(router: Function, ball: Ball, how: Bounding = "crown_ibp") -> Float[Tensor, "n e"]:
    """Of each expert i, the largest Lipschitz constant over the ball of g_i - g_k over the others k, g the router's
    logits.
    """
    return pair_slopes(Bounded(record(router, ball.x), ball, how)).amax(2)
