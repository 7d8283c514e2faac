"""`robustmoe.train`: recipes by name, and a module and images in hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe import spec
from robustmoe.attacks import FGSM, PGD, linf
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.models import BatchNorm2d, SmallCNN
from robustmoe.training import Loss, Method, Phase, at, standard
from robustmoe.training.checkpoint import read_weights
from robustmoe.training.parts import share_statistics

FIELDS: dict[str, Any] = {"epochs": 2, "batch_size": 32, "threads": 1}


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    batch = spec.build("digits", "data").train.batch(list(range(120)))
    return batch.x, batch.y


def net() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return nn.Sequential(*layers)


def test_a_module_is_trained_where_it_is(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = net(), *digits
    before = copy.deepcopy(model.state_dict())
    run = rm.train(model, x, y, out=tmp_path / "run", method=at(FGSM(linf(0.1))), val_attack=FGSM(linf(0.1)), **FIELDS)
    kept = read_weights(run / "model.safetensors")
    assert all(torch.equal(kept[f"function.{name}"], value) for name, value in model.state_dict().items()), "the best"
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert type(model[1]) is nn.BatchNorm2d
    config = json.loads((run / "config.json").read_text())
    assert config["in_python"] == ["data", "method", "model"], "what has a spec is written as one"
    assert (config["model"], config["val_attack"], config["threat"]) == ("Sequential", "fgsm(linf(0.1))", "linf(0.1)")
    (record,) = rm.evaluate(model, x, y, attacks=PGD(linf(0.1), steps=1), limit=8, curve=())
    assert len(record.rows) == 8


def test_it_is_the_same_training_as_by_spec(
    digits: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description, its text in a recipe, and the module that it builds: the same weights, bit for bit."""
    data = rm.as_data(*digits)
    described = rm.train(SmallCNN(2), data, out=tmp_path / "a", method="standard", **FIELDS)
    module = rm.build_model("small_cnn(width=2)", 10, (1, 8, 8), data.mean, data.std)
    in_hand = rm.train(module, data, out=tmp_path / "b", method=standard(), **FIELDS)
    recipe = rm.Recipe(model="small_cnn(width=2)", data="digits", method="standard", **FIELDS)
    of_recipe = rm.train(recipe, tmp_path / "c", data=data)
    first, *others = (read_weights(run / "model.safetensors") for run in (described, in_hand, of_recipe))
    for weights in others:
        assert all(torch.equal(first[name], value) for name, value in weights.items())
    assert torch.equal(rm.load_model(described)(data.val.batch([0]).x), module(data.val.batch([0]).x))
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text('model = "linear"\ndata = "digits"\nmethod = "standard"\nepochs = 9\n')
    assert rm.train("short.toml", epochs=1, batch_size=256, threads=1) == Path("runs/short")


def test_a_stopped_training_of_a_module_goes_on(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    straight, stopped, out = net(), net(), tmp_path / "stopped"
    given: dict[str, Any] = {**FIELDS, "method": "standard"}
    rm.train(straight, *digits, out=tmp_path / "straight", **given)
    rm.train(stopped, *digits, out=out, max_steps=2, **given)
    other = net()
    rm.train(other, *digits, out=out, resume=True, **given)
    assert all(torch.equal(*pair) for pair in zip(straight.parameters(), other.parameters()))
    with pytest.raises(UserError, match="stopped was trained with data_hash"):
        rm.train(net(), digits[0].flip(0), digits[1], out=out, resume=True, **given)


def test_a_loss_of_ones_own_in_python(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    def loss(model: Any, x: Tensor, y: Tensor, noise: Any) -> Loss:
        logits = model.run(x).logits
        return Loss(logits.logsumexp(1).mean() - logits[:, 0].mean(), None)

    model = net()
    fields = {**FIELDS, "epochs": 8}
    rm.train(model, *digits, out=tmp_path / "run", method=Method((Phase("all", "", loss),)), **fields)
    assert float((model(digits[0]).argmax(1) == 0).float().mean()) > 0.9, "everything is a nought"


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda x, y: rm.train(net(), x), "images were given without labels"),
        (lambda x, y: rm.train(net()), r"a model is trained on images; expected train\(model, x, y\)"),
        (lambda x, y: rm.train(net(), "digits", y), "labels were given beside a data set"),
        (lambda x, y: rm.train(net(), x, y), "method and epochs must be given, such as method="),
        (lambda x, y: rm.train(net(), x, y, method="standard", epoch=1), "unknown argument 'epoch'; did you mean 'ep"),
        *(
            (lambda x, y, each=each: rm.train(net(), x, y, method="standard", **{"epochs": 1, **each}), message)
            for each, message in (
                ({"batch_size": "x"}, "batch_size: expected int or 'auto', got 'x'"),
                ({"batch_size": None}, "batch_size: expected int or 'auto', got None"),
                ({"epochs": "x"}, "epochs: expected int, got 'x'"),
                ({"sharding": "foo"}, "sharding: expected .*'none'.*, got 'foo'"),
            )
        ),
        (lambda x, y: rm.train(lambda x: x, x, y), "cannot train a function; expected a recipe, its name or file"),
        (lambda x, y: rm.train("digits_moe", x, y), r"a recipe is trained as train\(recipe, folder\)"),
        (lambda x, y: rm.train("digits_moe", "runs/a"), "there is no recipe 'digits_moe'"),
        (lambda x, y: rm.train(net(), 255 * x, y), r"the images range from .* expected \[0, 1\]"),
        (
            lambda x, y: rm.as_data(x, y, x[:, :, 1:], y),
            r"the test images are \(1, 7, 8\), those of training \(",
        ),
        (lambda x, y: rm.as_data(x, y, x), r"labels of shape \(0,\)"),
    ],
)
def test_mistakes_are_one_line(ask: Callable[..., Any], message: str, digits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match=message):
        ask(*digits)


def test_what_python_alone_made_is_said_so(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    run = rm.train(net(), *digits, out=tmp_path / "run", method="standard", **{**FIELDS, "max_steps": 1})
    with pytest.raises(UserError, match="run was trained from a Sequential in Python, which no spec builds"):
        rm.load_model(run)
    run = rm.train(SmallCNN(2), rm.as_data(*digits), out=tmp_path / "two", method="standard", **FIELDS)
    with pytest.raises(UserError, match="two was trained on images in Python, which no spec builds"):
        rm.evaluate_run(run)
    assert len(rm.evaluate_run(run, data="digits", limit=4, attacks="fgsm(linf(0.1))", curve=())[0].rows) == 4


def test_own_images_as_a_data_set(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    data = rm.as_data(x[:100].numpy(), y[:100].tolist(), x[100:], y[100:], classes=list("abcdefghij"), val=0.2)
    assert isinstance(data, Data)
    assert (len(data.train) + len(data.val), len(data.test), data.num_classes) == (100, 20, 10)
    assert data.mean[0] == pytest.approx(float(data.train.batch(list(range(len(data.train)))).x.mean()), abs=1e-6)
    assert set(data.train.index.tolist()).isdisjoint(data.val.index.tolist())
    assert len(rm.as_data(x, y).test) == 0


def test_batchnorms_of_a_users_module_share_their_statistics() -> None:
    model = net()
    switched = share_statistics(model)
    assert type(model[1]) is BatchNorm2d
    assert switched == {model[1]: nn.BatchNorm2d}
