"""Gradients through code that turns them off: the same calls, with gradients left on."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Open(TorchFunctionMode):
    """Inside, `torch.no_grad` and `torch.inference_mode` turn no gradient off. Values are the same: the same calls run.
    The forward of an autograd function stays as it is, its own backward says how it moves. A sum that is scattered in
    place again and again (DeepSeek's ``moe_infer``) is taken by `torch.Tensor.scatter_add_`, whose backward does not
    ask for what was overwritten.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return None
        if (
            name == "scatter_reduce_"
            and "sum" in (kwargs.get("reduce"), *args[4:])
            and kwargs.get("include_self", True)
        ):
            places = ("dim", "index", "src")
            func, args = torch.Tensor.scatter_add_, (*args[:4], *(kwargs[key] for key in places[len(args) - 1 :]))
            kwargs = {}
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.enable_grad():
                return func(*args, **kwargs)
        return func(*args, **kwargs)
