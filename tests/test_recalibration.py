"""BatchNorm's statistics taken anew: the means over the batches, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustmoe.attacks import PGD, linf
from robustmoe.errors import UserError
from robustmoe.models import BatchNorm2d, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.training import MiniBatch, train
from robustmoe.training.checkpoint import read_weights
from robustmoe.training.recalibration import recalibrate

Images, Labels, Tiny = Callable[..., Tensor], Callable[[int], Tensor], Callable[..., RoutedModel]


def minibatches(images: Images, labels: Labels, count: int = 3, n: int = 8) -> list[MiniBatch]:
    x, y = images(count * n), labels(count * n)
    noise = Noise.of(torch.arange(count * n), 1)
    return [MiniBatch(x[i : i + n], y[i : i + n], noise[i : i + n]) for i in range(0, count * n, n)]


@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("kind", ["dense", "pathway"])
def test_the_statistics_are_means_over_the_batches(
    kind: str, attacked: bool, images: Images, labels: Labels, tiny: Tiny
) -> None:
    """A second copy passes each batch alone with a rate of 1, and its statistics are averaged by hand."""
    model, twin, before = tiny(kind), tiny(kind), tiny(kind)
    attack = PGD(linf(0.1), steps=1, keep="last") if attacked else None
    given = minibatches(images, labels)
    recalibrate(model, given, attack)
    sums: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, BatchNorm2d)}
    assert layers
    for layer in layers.values():
        layer.momentum = 1.0
    for batch in given:
        twin.train()
        with torch.no_grad():
            twin.run(batch.x if attack is None else attack(before, *batch))
        for name, layer in layers.items():
            for part in ("running_mean", "running_var"):
                sums[f"{name}.{part}"] = sums.get(f"{name}.{part}", 0) + getattr(layer, part).clone() / len(given)
    own = dict(model.named_buffers())
    for name, value in sums.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
    assert [layer.momentum for layer in model.modules() if isinstance(layer, BatchNorm2d)] == [0.1] * len(layers)


def test_modes_stay_and_what_has_none_is_left_alone(images: Images, labels: Labels) -> None:
    model = build_model("vit(patch=4, width=8, depth=1, heads=2)", 3, (3, 8, 8))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, iter(()))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    net = build_model("small_cnn(width=2)", 10, (3, 8, 8)).eval()
    recalibrate(net, minibatches(images, labels, 1))
    assert not any(module.training for module in net.modules())


FIELDS: dict[str, Any] = {
    "model": "resnet8(width=2)",
    "data": "digits(val=0.55)",
    "method": "at(pgd(linf(0.1), steps=1, keep=last))",
    "epochs": 2,
    "batch_size": 128,
    "val_limit": 8,
    "threads": 1,
    "max_steps": 7,
}


def test_what_is_kept_has_them_and_training_goes_on_without(tmp_path: Path) -> None:
    """The weights are those of the run without; only what is kept has other statistics. Resumed bit for bit."""
    plain, clean, attacked = (
        read_weights(train(Recipe(**FIELDS, recalibrate=how), tmp_path / str(how)) / "model.safetensors")
        for how in (None, "clean", "attacked")
    )
    moved = [name for name in plain if not torch.equal(plain[name], clean[name])]
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    assert any(not torch.equal(clean[name], attacked[name]) for name in clean)
    stopped = train(Recipe(**{**FIELDS, "max_steps": 3}, recalibrate="clean"), tmp_path / "stopped")
    train(Recipe(**FIELDS, recalibrate="clean"), stopped, resume=True)
    again = read_weights(stopped / "model.safetensors")
    assert all(torch.equal(again[name], clean[name]) for name in clean)


def test_attacked_needs_an_attack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recalibrate=attacked takes the method's attack, and this method has none"):
        train(Recipe(**{**FIELDS, "method": "standard"}, recalibrate="attacked"), tmp_path / "run")
