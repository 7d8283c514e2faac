"""Our APGD is AutoAttack's, bit for bit, where it is asked to draw the same random numbers.

`make crosscheck` installs the peer; without it this file is skipped.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MISSING = "needs pyautoattack: run `make crosscheck`"
pytestmark = pytest.mark.crosscheck

pytest.importorskip("pyautoattack", reason=MISSING)

from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection  # noqa: E402

from robustmoe.attacks import Joint, Targeted, Threat  # noqa: E402
from robustmoe.attacks.apgd import APGD, TargetedAPGD  # noqa: E402
from robustmoe.attacks.l1 import fitted, l1_excess  # noqa: E402
from robustmoe.models.plain import Plain  # noqa: E402

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
EPS = {"linf": 0.012, "l2": 0.12, "l1": 1.0}
"""Radii at which some of the images below break at once, some late and some never."""

CLASSES, SIZE, N = 6, 8, 24
SEED = 5


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIZE**2, CLASSES)).eval()


@pytest.fixture
def attacked() -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN, images, and its own answers as labels, two of them made wrong; the logits differ as widely as those
    of a trained network would."""
    model = network()
    x = torch.rand(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % CLASSES
    return model, x, y


def peer(model: Any, threat: Threat, **settings: Any) -> dict[str, Any]:
    quiet = logging.getLogger("peer")  # else it warns of zero gradients
    return {"predict": model, "logger": quiet, "norm": NORMS[threat.norm], "eps": threat.eps, "seed": SEED} | settings


def missed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def assert_same(model: nn.Module, x: Tensor, y: Tensor, theirs: Tensor, ours: Tensor) -> None:
    """The same images broken, and these to the bit (theirs may leave the box by a rounding)."""
    broken = missed(model, theirs, y)
    assert 4 < int(broken.sum()) < N
    assert torch.equal(missed(model, ours, y), broken)
    assert torch.equal(ours[broken], theirs[broken].clamp(0, 1))
    assert torch.equal(theirs[~broken], x[~broken])


CASES = [
    (norm, largereps, steps, restarts)
    for norm, largereps in (("linf", False), ("l2", False), ("l1", False), ("l1", True))
    for steps, restarts in ((20, 2), (3, 1))
]


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm, largereps, steps, restarts", CASES)
def test_apgd_is_autoattacks(
    norm: str, largereps: bool, steps: int, restarts: int, loss: str, attacked: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, y = attacked
    threat = Threat(norm, EPS[norm])
    settings = {"n_iter": steps, "n_restarts": restarts, "loss": loss, "use_largereps": largereps}
    theirs = APGDAttack(**peer(model, threat, **settings)).perturb(x, y)
    attack = APGD(threat, steps, restarts, Joint(loss), keep="best", largereps=largereps, rng="autoattack", seed=SEED)
    assert_same(model, x, y, theirs, attack(model, x, y))


@pytest.mark.parametrize("norm, largereps, steps, restarts", [(*case[:2], 10, 2) for case in CASES[::2]])
def test_targeted_apgd_is_autoattacks(
    norm: str, largereps: bool, steps: int, restarts: int, attacked: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, y = attacked
    threat = Threat(norm, EPS[norm])
    settings = {"n_iter": steps, "n_restarts": restarts, "n_target_classes": 3, "use_largereps": largereps}
    theirs = APGDAttack_targeted(**peer(model, threat, **settings)).perturb(x, y)
    attack = TargetedAPGD(threat, 3, steps, restarts, keep="best", largereps=largereps, rng="autoattack", seed=SEED)
    assert_same(model, x, y, theirs, attack(model, x, y))


@pytest.mark.parametrize("norm, rho", [("linf", 0.75), ("l2", 0.75), ("l1", 0.75), ("linf", 0.3), ("l2", 1.0)])
def test_the_best_iterate_of_an_image_that_holds_is_theirs(
    norm: str, rho: float, attacked: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """`perturb` of the original returns it clean; its single run tells. In l1 its float32 sums leave the ball by more
    than check H2 allows, where ours are trimmed.
    """
    model, x, y = attacked[0], attacked[1][2:], attacked[2][2:]
    threat = Threat(norm, EPS[norm] / 2)
    theirs = APGDAttack(**peer(model, threat, n_iter=40, loss="ce", rho=rho))
    theirs.init_hyperparam(x)
    torch.manual_seed(SEED)
    best, held, _, _ = theirs.attack_single_run(x, y)
    ours = APGD(threat, 40, rho=rho, keep="best", largereps=False, rng="autoattack", seed=SEED)(model, x, y)
    assert int(held.sum()) > 4
    best = best.clamp(0, 1)
    if norm == "l1":
        over = (best - x).flatten(1).abs().sum(1, dtype=torch.float64) / threat.eps - 1
        assert 1e-5 < float(over[held].max()) < 1e-4
        best = fitted(x, best, threat.eps)
    assert torch.equal(ours[held], best[held])


class Trembling(nn.Module):
    """A network whose every pass is another one, in a fixed order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.passes = network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.inner(x + 0.02 * torch.sin(torch.arange(x[0].numel()) * (self.passes % 7 + 1.0)).view(x[0].shape))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_eot_is_autoattacks(norm: str, attacked: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A random defence: three passes a gradient, the last one's score. Both ask as often, in the same order."""
    _, x, y = attacked
    threat = Threat(norm, EPS[norm])
    first, second = Trembling(), Trembling()
    theirs = APGDAttack(**peer(first, threat, n_iter=9, loss="ce", eot_iter=3)).perturb(x, y)
    ours = APGD(threat, 9, eot=3, keep="best", largereps=False, rng="autoattack", seed=SEED)(second, x, y)
    assert first.passes == second.passes == 1 + 3 * 10
    broken = (theirs != x).flatten(1).any(1)
    assert int(broken.sum()) > 4
    assert torch.equal(ours[broken], theirs[broken].clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_leaving_at_once_breaks_the_same_images(norm: str, attacked: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = attacked
    threat = Threat(norm, EPS[norm])
    settings = {"n_iter": 20, "n_restarts": 2, "loss": "ce", "use_largereps": norm == "l1"}
    theirs = APGDAttack(**peer(model, threat, **settings)).perturb(x, y)
    ours = APGD(threat, 20, 2, rng="autoattack", seed=SEED)(model, x, y)
    assert torch.equal(missed(model, ours, y), missed(model, theirs, y))


def test_our_losses_are_theirs_to_the_bit(attacked: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = attacked
    logits, routed = model(x), Plain(model)
    theirs = APGDAttack_targeted(**peer(model, Threat("linf", 0.1)))
    theirs.y_target = logits.sort(dim=1)[1][:, -3]
    assert torch.equal(Joint("dlr")(routed, x, y)(x).loss, theirs.dlr_loss(logits, y))
    assert torch.equal(Targeted(3)(routed, x, y)(x).loss, theirs.dlr_loss_targeted(logits, y))


@pytest.mark.parametrize("eps", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_our_l1_projection_is_theirs(eps: float, spread: float) -> None:
    """To the bit with their sums; with float64 sums, to float32's rounding of theirs."""
    x = torch.rand(16, 3, SIZE, SIZE)
    delta = spread * torch.randn_like(x) * (torch.rand_like(x) < torch.rand(16, 1, 1, 1))
    theirs = -L1_projection(x, delta, eps)
    assert torch.equal(l1_excess(x, delta, eps, wide=False), theirs)
    torch.testing.assert_close(l1_excess(x, delta, eps), theirs, rtol=1e-5, atol=1e-5 * max(spread, 0.1))
