"""Several processes, one run: the few collectives the project uses, over torch.distributed (gloo on CPU, nccl on
CUDA).

There is no DistributedDataParallel here: a method moves different parameters in different phases, attacks
differentiate with respect to images, and an expert may get no image at all; averaging a phase's own gradients behind
its backward pass (`average_gradients`) is correct in all these cases and is a few lines. While the pass runs
(`Averaging`) it is where the pass makes no collectives. Run under ``torchrun``; one process needs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustmoe import compat
from robustmoe.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(minutes=10)

_sessions = 0  # how many were opened in this process: each needs names of its own in torchrun's store

_meshes: list[DeviceMesh] = []


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def local_device(device: torch.device) -> torch.device:
    """This process's own device: ``cuda`` becomes ``cuda:LOCAL_RANK`` under torchrun."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextlib.contextmanager
def session(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for the length of a ``with`` block; alone, do nothing.

    The block's process groups end with it, whether it returns or raises: their threads are gone afterwards (see
    `_end`). A peer that dies ends the others with one line (`UserError`) instead of a traceback: nothing of the last
    checkpoint is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    global _sessions
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The functions of this module have the default group as a default argument, which holds it for the life of the
    # process if they are first imported inside the block (every optimiser's first step does so).
    importlib.import_module("torch.distributed.nn.functional")

    _sessions += 1
    store, place, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(_name(), store),
        rank=place,
        world_size=size,
        timeout=TIMEOUT,
    )
    try:
        yield
    except BaseException as error:
        if not isinstance(error, RuntimeError) or not _peer_lost(error):
            _end(error)
            raise
        # torchrun may be sending SIGTERM to us at this moment; the line below already says what happened.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(error)
        raise UserError(
            f"process {place} of {size} stopped: another process of this run died; start the same "
            "command again (train: with --resume) to go on from what is saved"
        ) from error
    _end(None)


def _name() -> str:
    """Under which the processes of a session meet. torchrun keeps its store when it starts them anew: under the old
    name still stand the addresses of those that died.
    """
    return f"robustmoe {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {_sessions}"


def _end(error: BaseException | None) -> None:
    """End the process groups of a session that ``error`` ended (None: nothing did), and with them gloo's threads.

    A thread of gloo drops the tensors of a collective after it has told the caller that the collective is done, and
    needs Python's lock for it. A process that leaves at once ends its interpreter in between; the thread is then
    unwound out of a destructor, which is ``terminate called without an active exception``. A group waits for its
    threads when its last reference goes. So no reference may stay: not in an error's frames, whose locals are cleared.
    """
    if error is not None and dist.get_backend() == "nccl":
        return  # a shutdown could wait for a dead peer; that abort was seen with gloo, and nccl was not tried
    cause = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    while _meshes:
        compat.groups_of(_meshes.pop()).clear()
    gc.collect()  # a model that is spread holds its groups, in circles
    dist.destroy_process_group()


def _peer_lost(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    words = ("connection closed by peer", "connection reset by peer", "gloo", "broken pipe", "timed out waiting")
    return any(word in str(error).lower() for word in words)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over processes, in place; the same tensor alone."""
    if active():
        dist.all_reduce(value)
    return value


def mesh(device: torch.device, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A device mesh of all processes of this session. torch's caches hold meshes for ever: their groups end with it."""
    from torch.distributed.device_mesh import init_device_mesh

    made = init_device_mesh(device.type, shape, mesh_dim_names=names)
    _meshes.append(made)
    return made


def is_spread(value: Tensor) -> bool:
    """Whether each process holds a part of this tensor (torch's DTensor, whose import is slow)."""
    return hasattr(value, "to_local")


def own_part(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of it, where it is not spread."""
    spread: Any = value
    part: Tensor = spread.to_local() if is_spread(value) else value
    return part


def average_gradients(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the mean of each gradient over processes: in place, in one collective a dtype; what is spread, added up
    by torch.
    """
    if not active():
        return list(gradients)
    _average_plain([gradient for gradient in gradients if not is_spread(gradient)])
    return [_mean(gradient) if is_spread(gradient) else gradient for gradient in gradients]


def _mean(gradient: Any) -> Any:
    from torch.distributed.tensor import Replicate

    total = gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in gradient.placements])
    total.to_local().div_(world())
    return total


def _average_plain(gradients: Sequence[Tensor]) -> None:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for group in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in group])
        dist.all_reduce(flat)
        flat /= world()
        for gradient, part in zip(group, flat.split([gradient.numel() for gradient in group])):
            gradient.copy_(part.view_as(gradient))


BUCKET = 25 * 2**20
"""Bytes of gradients that are sent together while a backward pass runs: as many as torch's own DDP sends."""


class _Bucket:
    """Gradients of some parameters in one piece of memory, ``parts`` of it one each; ``left``: how many are to come."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = parameters[0].new_zeros(sum(sizes))
        self.parts = [part.view(p.shape) for part, p in zip(self.flat.split(sizes), parameters)]
        self.left = len(parameters)

    def send(self) -> None:
        self._work = dist.all_reduce(self.flat, async_op=True)

    def mean(self) -> None:
        if self._work is not None:
            self._work.wait()
        self.flat /= world()


class Averaging:
    """The means over the processes of the gradients of ``parameters``, sent bucket by bucket while the backward pass
    inside ``with`` (torch.autograd.grad of these parameters) still runs.

    A bucket is sent when its gradients are there and those before it are sent, so in one order on every process,
    whatever took no part in which; what is left then is sent at the end. So the pass must make no collectives of its
    own: between which buckets they fall would differ. ``early``: how many buckets were sent before the end.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._buckets: list[_Bucket] = []
        self._places: dict[int, tuple[_Bucket, Tensor]] = {}
        for places in _bucketed(parameters):
            bucket = _Bucket([parameters[place] for place in places])
            self._buckets.append(bucket)
            self._places.update({place: (bucket, part) for place, part in zip(places, bucket.parts)})
        self.early = 0

    def __enter__(self) -> Averaging:
        noted = (functools.partial(self._came, place) for place in range(len(self._parameters)))
        self._hooks = [parameter.register_hook(note) for parameter, note in zip(self._parameters, noted)]
        return self

    def _came(self, place: int, gradient: Tensor) -> None:
        bucket, part = self._places[place]
        part.copy_(gradient)
        bucket.left -= 1
        while self.early < len(self._buckets) and self._buckets[self.early].left == 0:
            self._buckets[self.early].send()
            self.early += 1

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def means(self) -> list[Tensor]:
        """Returns the means, once the pass is over; zero for a parameter that took no part in any process."""
        for bucket in self._buckets[self.early :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.mean()
        return [self._places[place][1] for place in range(len(self._parameters))]


def _bucketed(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Returns the places of the parameters, the last first, as their gradients come, in groups of one dtype and at most
    `BUCKET` bytes (or of a single one).
    """
    groups: list[list[int]] = []
    room, dtype = 0, None
    for place in reversed(range(len(parameters))):
        parameter = parameters[place]
        size = parameter.numel() * parameter.itemsize
        if size > room or parameter.dtype != dtype:
            groups.append([])
            room, dtype = BUCKET, parameter.dtype
        groups[-1].append(place)
        room -= size
    return groups


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Make every process hold the first one's values, in place."""
    if active():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
