"""Generated images of a file: read as numpy reads it, of every batch their share, the same whoever asks."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustmoe import spec
from robustmoe.data import batches, digits, generated
from robustmoe.data.generated import FIRST, WithGenerated
from robustmoe.errors import UserError
from robustmoe.noise import permutation
from robustmoe.recipe import Recipe
from robustmoe.records import read_jsonl
from robustmoe.training import train
from robustmoe.training.checkpoint import read_weights

N = 300
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (N, 8, 8, 1), dtype=np.uint8)
LABELS = RANDOM.integers(0, 10, N)
DATA = digits()


def file_of(folder: Path, compressed: bool = False, **arrays: Any) -> Path:
    path = folder / "made.npz"
    (np.savez_compressed if compressed else np.savez)(path, **{"image": IMAGES, "label": LABELS, **arrays})
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_a_batch_is_what_numpy_reads(compressed: bool, tmp_path: Path) -> None:
    made = generated(DATA, file_of(tmp_path, compressed), 0.5)
    assert isinstance(made.train, WithGenerated)
    assert isinstance(made.train.images, np.memmap) != compressed
    assert (made.val, made.test, made.mean) == (DATA.val, DATA.test, DATA.mean)
    n = len(DATA.train)
    batch = made.train.batch([n + 7, 3, n + 299, 0])
    real = DATA.train.batch([3, 0])
    assert torch.equal(batch.x[[1, 3]], real.x)
    assert batch.y.tolist() == [LABELS[7], int(real.y[0]), LABELS[299], int(real.y[1])]
    assert batch.index.tolist() == [FIRST + 7, int(real.index[0]), FIRST + 299, int(real.index[1])]
    torch.testing.assert_close(batch.x[0], torch.from_numpy(IMAGES[7]).permute(2, 0, 1) / 255)
    assert torch.equal(made.train.subset([5]).batch([0]).x, DATA.train.batch([5]).x)


def test_every_batch_has_its_share(tmp_path: Path) -> None:
    """The real ones are those of the same places of the order without; generated ones come about equally often."""
    train_set, steps, size = generated(DATA, file_of(tmp_path), 0.7).train, 20, 50
    order = train_set.order(steps, size, 3, 1, 0).view(steps, size)
    real = permutation(len(DATA.train), 3, 1, 0)[: steps * size].view(steps, size)
    assert torch.equal(order[:, :15], real[:, 35:])
    made = order[:, 15:] - len(DATA.train)
    assert 0 <= int(made.min()) <= int(made.max()) < N
    counts = torch.bincount(made.flatten(), minlength=N).float()
    assert float(counts.sum()) == 700
    assert float(((counts - 700 / N) ** 2 / (700 / N)).sum()) < N + 5 * (2 * N) ** 0.5, "chi square, five deviations"
    assert torch.equal(order, train_set.order(steps, size, 3, 1, 0).view(steps, size))
    assert not torch.equal(made, train_set.order(steps, size, 3, 1, 1).view(steps, size)[:, 15:] - len(DATA.train))
    for share, count in ((0.01, 1), (0.99, 4)):
        few = generated(DATA, file_of(tmp_path), share).train.order(2, 5, 0).view(2, 5)
        assert (few >= len(DATA.train)).sum(1).tolist() == [count, count], "one real and one generated at least"


def test_a_training_sees_them_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"generated(digits(val=0.55), file='{file_of(tmp_path)}', share=0.5)"
    fields: dict[str, Any] = {"model": "small_cnn(width=4)", "method": "standard", "epochs": 2, "batch_size": 64}
    recipe = Recipe(data=data, augment="crop_flip(padding=1)", threads=1, **fields)
    whole = train(recipe, tmp_path / "whole")
    stopped = train(Recipe(**{**vars(recipe), "max_steps": 4}), tmp_path / "stopped")
    train(recipe, stopped, resume=True)
    once, again = (read_weights(run / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(once[name], again[name]) for name in once)
    plain = train(Recipe(data="digits(val=0.55)", threads=1, **fields), tmp_path / "plain")
    steps = [read_jsonl(run / "metrics.jsonl")[-1]["step"] for run in (whole, plain)]
    assert steps[0] == steps[1], "an epoch is as long as without"
    with pytest.raises(UserError, match="trained with data_hash"):
        train(Recipe(**{**vars(recipe), "data": data.replace("0.5)", "0.6)")}), stopped, resume=True)
    shown = next(iter(batches(generated(DATA, file_of(tmp_path)).train, 4, torch.tensor([len(DATA.train), 0, 1, 2]))))
    assert shown.index[0] == FIRST


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"image": IMAGES[:, :7]}, r"holds image uint8 \(300, 7, 8, 1\).* expected image uint8 \(N, 8, 8, 1\)"),
        ({"image": IMAGES.astype(np.float32)}, "holds image float32"),
        ({"label": LABELS[:5]}, r"label \(5,\)"),
        ({"label": LABELS + 1}, "label must be integers from 0 to 9"),
        ({"label": LABELS / 1.0}, "label must be integers"),
        ({"label": np.array([{}] * N)}, "damaged, or no .npz of arrays"),
        ({"image": np.asfortranarray(IMAGES)}, "damaged, or no .npz of arrays"),
    ],
)
def test_what_does_not_fit_is_one_line(arrays: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        generated(DATA, file_of(tmp_path, **arrays))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        spec.build(f"generated(digits, file='{tmp_path}/none.npz')", "data")
    with pytest.raises(UserError, match="share is 1"):
        generated(DATA, path, 1.0)
    content = path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged, or no"):
        generated(DATA, tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    with pytest.raises(UserError, match="has no array 'image'"):
        generated(DATA, tmp_path / "other.npz")
