"""Peers attack our models unwrapped, and agree with our attacks where they do the same thing.

`make crosscheck` installs them; without them this file is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MISSING = "needs pyautoattack, foolbox and torchattacks: run `make crosscheck`"
pytestmark = pytest.mark.crosscheck

pyautoattack = pytest.importorskip("pyautoattack", reason=MISSING)
foolbox = pytest.importorskip("foolbox", reason=MISSING)
torchattacks = pytest.importorskip("torchattacks", reason=MISSING)

from robustmoe.attacks import FGSM, PGD, Joint, l2, linf  # noqa: E402
from robustmoe.models import RoutedModel  # noqa: E402

EPS = 8 / 255


@pytest.fixture(params=["dense", "ensemble_soft", "ensemble_straight", "pathway"])
def attacked(
    request: pytest.FixtureRequest, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> tuple[RoutedModel, Tensor, Tensor]:
    """A model, images, and the model's own answers as labels, so that everything is there to be broken."""
    model, x = tiny(request.param), images(8)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def assert_valid(x: Tensor, x_adv: Tensor) -> None:
    assert x_adv.shape == x.shape
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def accuracy(model: RoutedModel, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def loss(model: RoutedModel, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("name", ["apgd-ce", "square"])
def test_autoattack_runs_on_our_models(name: str, attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version="custom", attacks=[name], seed=0)
    attack.apgd.n_iter, attack.apgd.n_restarts, attack.square.n_queries = 5, 1, 50
    result = attack.run_standard_evaluation(x, y, batch_size=8)
    x_adv = result[0] if isinstance(result, tuple) else result
    assert_valid(x, x_adv)
    assert accuracy(model, x_adv, y) <= accuracy(model, x, y)


def test_foolbox_runs_on_our_models(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, x_adv, fooled = foolbox.attacks.LinfPGD(steps=5, abs_stepsize=EPS / 4)(wrapped, x, y, epsilons=EPS)
    assert_valid(x, x_adv)
    with torch.no_grad():
        assert torch.equal(model(x_adv).argmax(1) != y, fooled)


def test_torchattacks_runs_on_our_models(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    x_adv = torchattacks.PGD(model, eps=EPS, alpha=2 / 255, steps=5)(x, y)
    assert_valid(x, x_adv)
    assert not model.training


# ------------------------------------------------------------------------------------------------ the same attack twice


@pytest.mark.parametrize("steps", [1, 7])
def test_our_pgd_is_torchattacks_pgd(steps: int, attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    """No random start, the last iterate: the same signs of the same gradient."""
    model, x, y = attacked
    theirs = torchattacks.PGD(model, eps=EPS, alpha=2 / 255, steps=steps, random_start=False)(x, y)
    ours = PGD(linf(EPS), steps=steps, step_size=2 / 255, start="clean", keep="last")(model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_our_pgd_is_foolboxs_pgd(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.LinfPGD(steps=7, abs_stepsize=2 / 255, random_start=False)
    theirs = peer(wrapped, x, y, epsilons=EPS)[1]
    ours = PGD(linf(EPS), steps=7, step_size=2 / 255, start="clean", keep="last")(model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_our_l2_pgd_is_torchattacks_l2_pgd(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    """They add 1e-10 to the norm of the gradient, and we rescale: equal to about 1e-5."""
    model, x, y = attacked
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=5, random_start=False)(x, y)
    ours = PGD(l2(0.5), steps=5, step_size=0.1, start="clean", keep="last")(model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_our_fgsm_is_torchattacks_fgsm(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    theirs = torchattacks.FGSM(model, eps=EPS)(x, y)
    torch.testing.assert_close(FGSM(linf(EPS))(model, x, y), theirs, rtol=0, atol=1e-6)


def test_our_best_iterate_is_no_weaker_than_their_last(attacked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    model, x, y = attacked
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    ours = PGD(linf(EPS), steps=10, start="clean", objective=Joint("ce"))(model, x, y)
    broken, ours_broken = loss_and_fooled(model, theirs, y), loss_and_fooled(model, ours, y)
    assert (ours_broken[1] | ~broken[1]).all()
    same = ours_broken[1] == broken[1]
    assert (ours_broken[0] >= broken[0] - 1e-5)[same].all()


def loss_and_fooled(model: RoutedModel, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return loss(model, x_adv, y), model(x_adv).argmax(1) != y
