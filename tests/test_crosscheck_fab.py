"""FAB is pyautoattack's FAB to the bit, and FMN is foolbox's where the box does not stop a gradient.

`make crosscheck` installs the peers; without them this file is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

MISSING = "needs pyautoattack and foolbox: run `make crosscheck`"
pytestmark = pytest.mark.crosscheck

fab_pt = pytest.importorskip("pyautoattack.fab_pt", reason=MISSING)
fab_projections = pytest.importorskip("pyautoattack.fab_projections", reason=MISSING)
foolbox = pytest.importorskip("foolbox", reason=MISSING)

from robustmoe.attacks import Threat, size  # noqa: E402
from robustmoe.attacks.boundary import projection  # noqa: E402
from robustmoe.attacks.fab import FAB  # noqa: E402
from robustmoe.attacks.fmn import FMN  # noqa: E402
from robustmoe.models import RoutedModel  # noqa: E402

NORMS = ("linf", "l2", "l1")
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.fixture
def cnn(images: Callable[..., Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN with random weights, 24 images whose logits it spreads, and its own answers."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
    ).eval()
    x = images(24)
    with torch.no_grad():
        network[-1].bias.sub_(network(x).mean(0))  # else one class takes nearly all images
    return network, x, answers(network, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [3, 48, 192, 3072])
def test_the_projection_is_theirs_to_the_bit(norm: str, d: int) -> None:
    peer = getattr(fab_projections, f"projection_{norm}")
    for corner in (False, True):
        t = torch.rand(40, d)
        t = (3 * t - 1).clamp(0, 1) if corner else t
        w = torch.randn(40, d) * torch.rand(40, 1) * 3
        b = (w * t).sum(1) + torch.randn(40) * d**0.5 * (5.0 if corner else 0.3)
        assert torch.equal(projection(norm, t, w, b), peer(t, w, b))


# medians of the distances of this CNN's images, so that about half are broken
RADII = {"linf": 0.012, "l2": 0.11, "l1": 0.9}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets, restarts", [(0, 1), (5, 1), (0, 3), (2, 2)])
def test_our_fab_is_theirs_to_the_bit(
    norm: str, targets: int, restarts: int, cnn: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Untargeted and FAB-T, restarts included, at an equal batch; some images are broken and some are not."""
    network, x, y = cnn
    peer = fab_pt.FABAttack_PT(
        network,
        norm=THEIRS[norm],
        n_restarts=restarts,
        n_iter=12,
        eps=RADII[norm],
        seed=5,
        targeted=targets > 0,
        n_target_classes=targets,
        device="cpu",
    )
    theirs = peer.perturb(x, y)
    attack = FAB(
        Threat(norm, RADII[norm]), steps=12, restarts=restarts, targets=targets, keep="best", rng="autoattack", seed=5
    )
    ours = attack(network, x, y)
    assert torch.equal(ours, theirs)
    broken = answers(network, ours) != y
    assert 3 <= int(broken.sum()) <= 21


@pytest.mark.parametrize("name", ["dense", "ensemble_soft", "pathway"])
def test_our_fab_is_theirs_on_routed_models(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny(name), images(12)
    y = answers(model, x)
    peer = fab_pt.FABAttack_PT(
        model, norm="L2", n_iter=8, eps=0.3, seed=0, targeted=True, n_target_classes=3, device="cpu"
    )
    ours = FAB(Threat("l2", 0.3), steps=8, targets=3, keep="best", rng="autoattack")(model, x, y)
    assert torch.equal(ours, peer.perturb(x, y))


class L2FMN(foolbox.attacks.L2FMNAttack):
    """With the projection that foolbox 3.3.4 means: its own divides a norm by itself, and projects nothing."""

    def project(self, x, x0, epsilon):  # type: ignore[no-untyped-def]
        delta = x - x0
        length = delta.flatten(start=1).norms.l2(axis=-1).maximum(1e-12)
        return x0 + delta * (epsilon / length).minimum(1.0).reshape((-1, 1, 1, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_our_fmn_is_foolboxs_away_from_the_box(norm: str, cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Where no pixel gets to 0 or 1 they do the same; the last look of ours can only be nearer. In float64, where a
    rounding seldom decides which side of a boundary a step ends on. An image of 24 may be out of reach of 40 steps: of
    both alike (which image, and whether there is one, differed between CPUs).
    """
    network, x, _ = cnn
    network, x = network.double(), (0.3 + 0.4 * x).double()
    y = answers(network, x)
    kind = {"linf": foolbox.attacks.LInfFMNAttack, "l2": L2FMN, "l1": foolbox.attacks.L1FMNAttack}[norm]
    peer = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    _, found, broken = kind(steps=40, max_stepsize=0.1)(peer, x, y, epsilons=None)
    theirs = size(norm, found - x).masked_fill(~broken, torch.inf)
    ours = FMN(Threat(norm, 1.0), steps=40, step_size=0.1).distances(network, x, y)
    reached = torch.isfinite(theirs)
    assert int(reached.sum()) >= 22
    assert (ours <= theirs * (1 + 1e-3)).all()
    assert (ours >= theirs * (1 - 0.01))[reached].all()
    assert ours.median().item() == pytest.approx(theirs.median().item(), rel=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_our_fmn_is_no_worse_at_the_box(norm: str, cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Images with many pixels at 0 and 1, where the paper's step is held up: the median is no larger (2 %)."""
    network, x, _ = cnn
    x = (4 * x - 1.5).clamp(0, 1)
    y = answers(network, x)
    kind = {"linf": foolbox.attacks.LInfFMNAttack, "l2": L2FMN, "l1": foolbox.attacks.L1FMNAttack}[norm]
    peer = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    _, found, broken = kind(steps=40)(peer, x, y, epsilons=None)
    theirs = size(norm, found - x).masked_fill(~broken, torch.inf)
    ours = FMN(Threat(norm, 1.0), steps=40).distances(network, x, y)
    assert torch.isfinite(ours).sum() >= torch.isfinite(theirs).sum()
    assert ours.median() <= theirs.median() * 1.02
