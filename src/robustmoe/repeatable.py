"""The same bits again on a GPU: torch's deterministic algorithms, where a user asks for them. On a CPU a run gives the
same bits anyway.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch

from robustmoe.errors import UserError, first_line

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Inside, where it is ``asked`` for, torch takes algorithms that give the same bits in every run on the same GPU,
    drivers and versions: cuDNN's and cuBLAS's choice is fixed, sums are made in one order. What is set is put back. An
    operation that has no such algorithm ends the work in one line (UserError).
    """
    if not asked:
        yield
        return
    cudnn, fill = torch.backends.cudnn, cast(Any, torch.utils.deterministic)  # its attribute is one of a module's class
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kept = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory, os.environ.get(WORKSPACE)
    try:
        os.environ[WORKSPACE] = kept[3] or ":4096:8"
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = True, False, False
        torch.use_deterministic_algorithms(True)
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"deterministic: {first_line(error)} expected a model without it, or no --deterministic"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = kept[:3]
        if kept[3] is None:
            os.environ.pop(WORKSPACE, None)
