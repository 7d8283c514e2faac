"""The private names of torch that this package reads, each behind a function that says what it is for.

No other module reads one (tests/test_compat.py). Such a name may change with any release of torch; what works is what
pyproject.toml promises and constraints.txt pins.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Returns whether anybody has registered a hook, of forward or backward passes, on this module itself."""
    return any(getattr(module, name) for name in _HOOKS)


def compiled(model: object) -> nn.Module | None:
    """Returns the module that torch.compile was given, where ``model`` is what it made of it; else None."""
    inner = dict(model.named_children()).get("_orig_mod") if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) else None


def computes_as_conv2d(kind: type[nn.Conv2d]) -> bool:
    """Returns whether a class of convolutions computes as torch's own does, with its forward in no part replaced."""
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


def in_function_transform() -> bool:
    """Returns whether a transform of torch.func (vmap, grad, jvp) is running."""
    return bool(torch._C._functorch.maybe_current_level())


def times_written(x: Tensor) -> int:
    """Returns how often a tensor's memory was written into, as far as autograd counts it."""
    return x._version


def groups_of(mesh: Any) -> dict[str, Any]:
    """Returns the process groups that a device mesh keeps alive, by name. Without them it asks for them by name."""
    groups: dict[str, Any] = mesh._pg_registry
    return groups


def unseen() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which no torch function mode sees what is called."""
    context: contextlib.AbstractContextManager[object] = torch._C.DisableTorchFunction()
    return context


def grouped_product() -> Any:
    """Returns the operator that torch.nn.functional.grouped_mm calls, by which a counter of operations knows it."""
    return torch.ops.aten._grouped_mm


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether a device has products of bf16 (or fp16) numbers. Where it has none, torch puts them together from
    others, and they take many times what float32 takes.
    """
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    known = torch.ops.mkldnn
    asked = known._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported
    return torch.backends.mkldnn.is_available() and bool(asked())
