"""Experts of tokens that are spread over processes: each holds some of them, and the tokens travel (expert parallelism,
Lepikhin et al. 2021, GShard).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.tokens import Dispatch, Masks, TokenExperts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread_experts(experts: TokenExperts, mesh: DeviceMesh) -> None:
    """Leaves this process its share of the experts. ``mesh``: of the dimensions "data" and "expert"; the processes of
    one row share the experts out, in order, and every row holds all of them.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, weight in list(experts.named_parameters()):
        spread = distribute_tensor(weight.detach(), mesh, [Replicate(), Shard(0)])
        experts.register_parameter(name, nn.Parameter(spread, weight.requires_grad))
    experts.__class__ = SpreadExperts


class SpreadExperts(TokenExperts):
    """`TokenExperts` whose tensors are DTensors, spread by their first dimension. Every process of a row has to make
    the same passes; with how many tokens is its own affair.
    """

    def forward(
        self,
        x: Float[Tensor, "m d"],
        index: Tensor,
        weight: Tensor,
        kept: Tensor | None = None,
        dispatch: Dispatch = "auto",
        masks: Masks | None = None,
    ) -> Float[Tensor, "m d"]:
        """As `TokenExperts`; ``dispatch`` changes nothing."""
        return self._sorted(x, index, weight, kept, False, masks)

    def apart(self, x: Float[Tensor, "e m d"], masks: Masks | None = None) -> Float[Tensor, "e m d"]:
        """Runs each expert on its own items, as many for each process."""
        there = None if masks is None else Masks(*map(self._to_experts, masks))
        answers = self._held().apart(self._to_experts(x), there).unflatten(1, (self._holders, -1))
        return self._travelled(answers.transpose(0, 1).flatten(0, 1).to(x.dtype))

    def _to_experts(self, x: Float[Tensor, "e m d"]) -> Tensor:
        """The items of all processes, (own experts, holders * m, d)."""
        return self._travelled(x).unflatten(0, (self._holders, -1)).transpose(0, 1).flatten(1, 2)

    def _split(self, given: Tensor, sizes: list[int], masks: Masks | None) -> Tensor:
        """Answers the items ``given``, so many for each expert in turn."""
        sent = torch.tensor(sizes, device=given.device)
        taken = torch.empty_like(sent)
        dist.all_to_all_single(taken, sent, group=self._group)
        give, take = (counts.view(self._holders, -1).sum(1).tolist() for counts in (sent, taken))
        own = torch.arange(self.num // self._holders, device=given.device)
        expert = own.repeat(self._holders).repeat_interleave(taken)[:, None]
        there = None if masks is None else Masks(*(self._travelled(mask, give, take)[:, None] for mask in masks))
        arrived = self._travelled(given, give, take)
        answers = self._held()(arrived, expert, torch.ones_like(expert, dtype=arrived.dtype), masks=there)
        return self._travelled(answers.to(given.dtype), take, give)

    def _held(self) -> TokenExperts:
        """This process's experts, as ordinary tensors."""
        from torch.distributed.tensor import Partial, Shard

        held = TokenExperts.__new__(TokenExperts)
        nn.Module.__init__(held)
        held.kind = self.kind
        for name, weight in self.named_parameters():
            part: Any = weight
            vars(held)[name] = part.to_local(grad_placements=[Partial(), Shard(0)])  # what it computes, no parameter
        return held

    @property
    def _mesh(self) -> DeviceMesh:
        weight: Any = self.w1
        mesh: DeviceMesh = weight.device_mesh
        return mesh

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._mesh.get_group("expert")

    @property
    def _holders(self) -> int:
        return dist.get_world_size(self._group)

    def _travelled(self, x: Tensor, give: list[int] | None = None, take: list[int] | None = None) -> Tensor:
        """The rows that come, ``take`` of each process, for ``give`` to each; by default as many of each."""
        even = [len(x) // self._holders] * self._holders
        moved: Tensor = _Travelled.apply(x, give or even, take or even, self._group)
        return moved


class _Travelled(torch.autograd.Function):
    """Rows to other processes; their gradients come back. (torch's own, in distributed.nn, is deprecated.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, give: list[int], take: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = take, give, group
        out = x.new_empty(sum(take), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), take, give, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Travelled.apply(*gradients, *ctx.back), None, None, None
