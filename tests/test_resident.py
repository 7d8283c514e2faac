"""Images that lie on the device as they are stored, or are sent from page-locked memory: the batches are the CPU's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretended import DEVICE, Pretending, place
from robustmoe.data import Batch, ImageSet, InMemory, as_data, batches
from robustmoe.data.base import resident
from robustmoe.recipe import Recipe
from robustmoe.training import loop, parts, train


def levels(n: int = 20) -> InMemory:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return InMemory(images, torch.arange(n) % 5, torch.arange(n) * 7)


def test_batches_made_on_the_device_are_those_of_the_host_and_the_images_are_sent_once() -> None:
    here = levels()
    order = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    expected = list(batches(here, 3, order))
    _ = here.fingerprint
    with Pretending() as mode:
        there = resident(here, DEVICE, 8 * here.images.nbytes)
        assert isinstance(there, InMemory)
        assert (mode.copies, there.images.dtype, place(there.images)) == (1, torch.uint8, "there")
        made = list(batches(there, 3, order, DEVICE))
        assert {place(each) for batch in made for each in (batch.x, batch.y, batch.index)} == {"there"}
        assert mode.copies == 1 + 3 * len(made), "places, labels and indices, and no image"
        assert mode.syncs == {}
    assert there.fingerprint == here.fingerprint
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.y, theirs.y)
        assert torch.equal(ours.index, theirs.index)


def test_a_set_stays_where_it_is_on_a_cpu_and_where_it_does_not_fit() -> None:
    here = levels()
    assert resident(here, torch.device("cpu"), 10**9) is here
    with Pretending():
        assert resident(here, DEVICE, 8 * here.images.nbytes - 1) is here
        assert resident(here, DEVICE, None) is here


def test_a_training_holds_its_images_on_its_device() -> None:
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    data = as_data(x, y)
    with Pretending():
        held = parts._resident(data, DEVICE)
        for split in (held.train, held.val):
            assert isinstance(split, InMemory)
            assert place(split.images) == "there"
        assert held.train.fingerprint == data.train.fingerprint
    assert parts._resident(data, torch.device("cpu")).train is data.train


class Read(ImageSet):
    """A set that is read, as files are."""

    def __init__(self, images: InMemory) -> None:
        super().__init__(images.labels, images.index)
        self.images = images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.image_shape

    def batch(self, positions: Any) -> Batch:
        return self.images.batch(positions)

    def subset(self, positions: Any) -> ImageSet:
        return Read(self.images.subset(positions))

    def _contents(self) -> Any:
        return self.images._contents()


@pytest.mark.parametrize("read", [False, True])
def test_what_is_sent_to_a_gpu_is_page_locked_and_not_waited_for(read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    sent: list[tuple[str, bool]] = []

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        locked.append(copy.data_ptr())
        return copy

    real = Tensor.to

    def send(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        if not str(device).startswith("cuda"):
            return real(tensor, device)
        sent.append((str(device), non_blocking))
        return tensor

    images: ImageSet = Read(levels()) if read else levels()
    expected = list(batches(images, 8))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in locked)
    monkeypatch.setattr(Tensor, "to", send)
    assert expected[0].pinned("cpu") is expected[0]
    made = list(batches(images, 8, device="cuda:0"))
    assert all(torch.equal(ours.x, theirs.x) for ours, theirs in zip(made, expected, strict=True))
    assert len(locked) == 3 * len(expected)
    assert sent == 3 * len(expected) * [("cuda:0", True)]
    assert expected[0].to("cuda:0").x is expected[0].x
    assert sent[-1] == ("cuda:0", False), "what is not page-locked"


def test_a_training_keeps_its_filters_in_channels_last_memory(tmp_path: Path) -> None:
    """When they are built, where steps have moved them, with the optimiser's momentum, and in a run that goes on."""
    kept: list[parts.RunParts] = []

    def build(*given: Any, **more: Any) -> parts.RunParts:
        kept.append(parts.build_parts(*given, **more))
        assert_channels_last(kept[-1].model)
        return kept[-1]

    recipe = Recipe(
        model="pathway(resnet8(width=4), experts=2, router=small_cnn(width=4))",
        data="digits",
        method="standard",
        epochs=1,
        batch_size=16,
        max_steps=2,
        val_limit=8,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_parts", build)
        train(recipe, tmp_path)
        train(dataclasses.replace(recipe, max_steps=3), tmp_path, resume=True)
    assert len(kept) == 2
    for each in kept:
        assert_channels_last(each.model)
        momentum = [state["momentum_buffer"] for state in each.optimisers[0].state.values()]
        wide = [buffer for buffer in momentum if buffer.dim() == 4]
        assert len(wide) > 5
        assert all(buffer.is_contiguous(memory_format=torch.channels_last) for buffer in wide)


def assert_channels_last(model: torch.nn.Module) -> None:
    filters = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    assert len(filters) > 5
    assert [name for name, p in filters.items() if not p.is_contiguous(memory_format=torch.channels_last)] == []
