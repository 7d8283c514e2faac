"""What a model is known by: a hash of its weights, and of everything that an attack must leave as it was."""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """sha256 over every parameter and buffer: the model's identity in a result."""
    digest = hashlib.sha256()
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: nn.Module, logits: Tensor) -> str:
    """`weights_hash`; for a plain function, which has no weights that we could see, a hash of its ``logits`` on some
    images.
    """
    if next(itertools.chain(model.parameters(), model.buffers()), None) is not None:
        return weights_hash(model)
    return hashlib.sha256(logits.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Weights, buffers, modes of every submodule, and which parameters have or want a gradient."""
    modes = "".join("t" if module.training else "e" for module in model.modules())
    grads = "".join(f"{int(p.grad is not None)}{int(p.requires_grad)}" for p in model.parameters())
    return f"{weights_hash(model)}/{hashlib.sha256((modes + grads).encode()).hexdigest()}"
