"""A device that is not there: every tensor carries where it would lie, and an operation that mixes places fails as it
would with a GPU. The arithmetic is the CPU's.

`DEVICE` is written "cpu:7", which torch takes for the CPU. Inside `Pretending`, what is made there or moved there lies
there, and says so (``x.device == DEVICE``); the rest lies on the host. What torch makes by itself inside an operation,
and in a backward pass, lies where it is wanted. As on CUDA, tensors without dimensions and indices may be the host's;
copies may cross; ``numpy()`` of what lies there fails, and so does a generator of the host that draws there.

Host synchronisations are counted: values that Python asks for, and results whose size the host must know.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cpu", 7)
THERE, HERE, ANYWHERE = "there", "here", "anywhere"

CREATION = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor"}
FACTORIES = {
    "zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "rand", "randn", "randint", "randperm",
    "tril_indices", "triu_indices", "hann_window", "complex", "range", "normal",
}  # fmt: skip
MADE = FACTORIES | CREATION
MOVES = {"to", "cpu", "type", "pin_memory"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "unique2", "_unique2", "unique_consecutive", "unique_dim"}
ASKED = {*SIZED_BY_VALUES, "_local_scalar_dense"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_GET_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
FREE = {"copy_", "_to_copy", "lift_fresh", "detach", "alias", "set_"}
"""Operations that may take tensors of both places (and whose result is placed by hand)."""


class MixedDevicesError(RuntimeError):
    """What torch says where tensors of a GPU and of the host meet in one operation."""


def place(tensor: Tensor) -> str:
    return str(getattr(tensor.untyped_storage(), "place", HERE)) if tensor.device.type == "cpu" else ANYWHERE


def put(result: Any, where: str) -> Any:
    """Notes where the tensors of a result lie; by their storage, which views share."""
    for leaf in tensors(result):
        if leaf.layout is torch.strided and leaf.device.type == "cpu":
            leaf.untyped_storage().place = where  # type: ignore[attr-defined]
    return result


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of what operations take and give: nested lists, tuples and dicts. (`torch.utils._pytree` looks up the
    type of every number among them.)
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [leaf for part in tree for leaf in tensors(part)]


def asked_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call of `to` or of a factory names, if it names one."""
    for value in (kwargs.get("device"), *args[1:2], *tensors([kwargs.get("other")])):
        if isinstance(value, torch.device | str) and str(value) != "":
            try:
                return torch.device(value)
            except RuntimeError:
                return None  # a text that is no device, such as that of `type`
        if isinstance(value, Tensor):
            return DEVICE if place(value) == THERE else torch.device("cpu")
    return None


class Pretending(TorchDispatchMode):
    """The mode: a context manager. ``syncs`` counts what would wait for the device, by the name of the operation,
    ``copies`` what is sent there, ``operations`` all there is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.copies = self.operations = 0
        self.calls: list[str] = []
        self._python = _FromPython(self)

    def __enter__(self) -> Pretending:
        super().__enter__()
        self._python.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._python.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.operations += 1
        given = tensors((args, kwargs))
        exact = [place(leaf) for leaf in given]
        where = [ANYWHERE if at == HERE and leaf.dim() == 0 else at for leaf, at in zip(given, exact)]
        if name in INDEXING:
            self._indices(args[1])
            after = len(tensors(args[1])) + 1
            given, exact, where = (each[:1] + each[after:] for each in (given, exact, where))
        if THERE in where and name in ASKED and self.calls[-1:] != ["one_hot"]:
            self.syncs[name] += 1
        if THERE in where and HERE in where and name not in FREE:
            shapes = [f"{tuple(leaf.shape)} {at}" for leaf, at in zip(given, where)]
            raise MixedDevicesError(f"{name}: expected all tensors to be on the same device, got {', '.join(shapes)}")
        result = func(*args, **kwargs)
        if name in ("copy_", "set_"):
            self.copies += name == "copy_" and where[0] == THERE and HERE in where
            return result
        return put(result, self._place_of(name, where, exact, kwargs))

    def _place_of(self, name: str, where: list[str], exact: list[str], kwargs: dict[str, Any]) -> str:
        device = kwargs.get("device")
        if device is not None and torch.device(device) == DEVICE:
            if (generator := kwargs.get("generator")) is not None and generator.device != DEVICE:
                raise MixedDevicesError(f"{name}: expected a generator of the device, got one of the host")
            return THERE
        if THERE in where:
            return THERE  # a copy to the host that Python asks for is placed by `_moved`
        if where or device is None:
            return HERE if HERE in exact else ANYWHERE
        return HERE if self.calls and self.calls[-1] in MADE else ANYWHERE

    def _indices(self, indices: Any) -> None:
        """Counts a mask that lies there: how many it takes is known there alone."""
        for index in tensors(indices):
            if index.dtype is torch.bool and place(index) == THERE:
                self.syncs["boolean index"] += 1


class _FromPython(TorchFunctionMode):
    """What Python calls, before it falls apart into operations."""

    def __init__(self, mode: Pretending) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == _GET_DEVICE:
            real = func(*args)
            return DEVICE if real.type == "cpu" and place(args[0]) == THERE else real
        if name in ("numpy", "__array__") and place(args[0]) == THERE:
            raise MixedDevicesError("numpy: the tensor is on the device; copy it to the host first, with cpu()")
        if name == "tolist" and place(args[0]) == THERE:
            self.mode.syncs["tolist"] += 1
        self.mode.calls.append(name)
        try:
            result = func(*args, **kwargs)
        finally:
            self.mode.calls.pop()
        if name == "__deepcopy__":
            return put(result, place(args[0]))
        if name in CREATION:
            return self._made(result, args, kwargs)
        return self._moved(name, result, args, kwargs) if name in MOVES else result

    def _made(self, result: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device = kwargs.get("device")
        if device is None:
            shared = isinstance(args[0], Tensor) and result.data_ptr() == args[0].data_ptr()
            return result if shared else put(result, HERE)
        there = torch.device(device) == DEVICE
        self.mode.copies += there
        if isinstance(args[0], Tensor) and place(args[0]) != (THERE if there else HERE):
            result = result.clone()
        return put(result, THERE if there else HERE)

    def _moved(self, name: str, result: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A copy where torch, for which both are the CPU, made none."""
        device = torch.device("cpu") if name == "cpu" else asked_device(args, kwargs)
        if device is None or not isinstance(result, Tensor) or result.device.type != "cpu":
            return result
        wanted = THERE if device == DEVICE else HERE
        if place(args[0]) == THERE and wanted == HERE:
            self.mode.syncs["copy to the host"] += 1
        self.mode.copies += place(args[0]) == HERE and wanted == THERE
        return result if place(result) == wanted else put(result.clone(), wanted)
