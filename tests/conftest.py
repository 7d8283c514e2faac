"""Pinned threads, one seed, how many calls have their shapes checked, and tiny models for every test file.

`robustmoe` is imported inside the fixtures only: jaxtyping's import hook, which checks shapes under pytest, has to come
first.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import shapes
from tiny_models import CLASSES, IMAGE_SHAPE, TINY

if TYPE_CHECKING:
    from robustmoe.models import RoutedModel

os.environ["ROBUSTMOE_PROGRESS"] = "off"  # no line in the middle of what a slow test captures
gc.disable()  # until all is imported and collected: it stays, the collector would go through it again and again
shapes.install()
torch.set_num_threads(1)
with contextlib.suppress(
    RuntimeError
):  # too late where something ran in parallel already; one process is one thread then
    torch.set_num_interop_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-every-call", action="store_true", help="let the shape-checking hook never rest")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-every-call"):
        shapes.budget.calls = shapes.EVERY_CALL


SLOWEST = ["test_loop", "test_distributed", "test_engine", "test_demo", "test_auxiliary", "test_certified_training"]
"""Files with tests of many seconds: they start first, so that the last test to run is a short one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    gc.freeze()  # nor does a test's collection, or a fork's, look at it
    gc.set_threshold(10_000, 10, 10)  # at Python's 700 it is 4 % of a test's time
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    shapes.budget.start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    shapes.budget.start()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Torch's global generator starts every test at the same place."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed walks the whole stack, for CUDA's later messages
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    return 0


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in half precision is tested on every processor, also where float32 is faster and would be taken."""
    from robustmoe import compat

    monkeypatch.setattr(compat, "multiplies", lambda device, dtype: True)


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """images(n, *shape): n random images in [0, 1] of differing brightness and contrast, all from their own
    generator.
    """

    def make(n: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(17)
        shape = shape or IMAGE_SHAPE
        noise = torch.rand(n, *shape, generator=generator)
        level, contrast = torch.rand(2, n, shape[0], 1, 1, generator=generator)
        return (level + contrast * (noise - 0.5)).clamp(0.0, 1.0)

    return make


@pytest.fixture
def labels() -> Callable[[int], Tensor]:
    """labels(n): n labels, every class in turn."""
    return lambda n: torch.arange(n) % CLASSES


@pytest.fixture
def tiny(images: Callable[..., Tensor]) -> Callable[..., RoutedModel]:
    """tiny(name or spec, seed=0): a tiny model in eval mode, whose router (if any) uses every expert on ``images``.

    A fresh router sends every image to one expert; here its logits are shifted to mean 0 and scaled to deviation 1.
    """
    from robustmoe.models import RoutedModel, build_model

    def make(name: str, seed: int = 0) -> RoutedModel:
        model = build_model(TINY.get(name, name), CLASSES, IMAGE_SHAPE, seed=seed)
        for part in (model, *(half for half in model.children() if isinstance(half, RoutedModel))):
            head = getattr(getattr(part, "router", None), "head", None)
            if head is not None:
                with torch.no_grad():
                    logits = part.router(part.normalise(images(64)))
                    scale = 1.0 / logits.std(0)
                    head.weight.mul_(scale[:, None])
                    head.bias.copy_((head.bias - logits.mean(0)) * scale)
        return model

    return make


@pytest.fixture(params=sorted(TINY))
def model(request: pytest.FixtureRequest, tiny: Callable[..., RoutedModel]) -> RoutedModel:
    """Each tiny model in turn."""
    return tiny(request.param)


@pytest.fixture(params=sorted(set(TINY) - {"dense", "dual"}))
def routed(request: pytest.FixtureRequest, tiny: Callable[..., RoutedModel]) -> RoutedModel:
    """Each tiny model that has one router (a sparse transformer's is inside, and decides for 5 tokens)."""
    return tiny(request.param)
