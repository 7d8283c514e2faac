"""Our Square Attack with ``rng="autoattack"`` is pyautoattack's, image by image.

`make crosscheck` installs the peer; without it this file is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.crosscheck
peer = pytest.importorskip("pyautoattack.square", reason="needs pyautoattack: run `make crosscheck`")

from robustmoe.attacks import Threat, l1, l2, linf  # noqa: E402
from robustmoe.attacks.square import Square  # noqa: E402

NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def attacked(images: Callable[..., Tensor], shape: tuple[int, int, int]) -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN whose logits are centred, so that its answers differ, and the images it is right on."""
    x = images(12, *shape)
    network = nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * -(-shape[1] // 4) * -(-shape[2] // 4), 4),
    ).eval()
    with torch.no_grad():
        network[-1].bias -= network(x).mean(0)
        y = network(x).argmax(1)
    y[3] = (y[3] + 1) % 4  # missed from the start
    return network, x, y


@pytest.mark.parametrize(
    "threat, shape, loss, restarts",
    [
        (linf(0.03), (3, 10, 10), "margin", 1),
        (linf(0.03), (1, 16, 16), "ce", 2),
        (l2(0.3), (3, 10, 10), "margin", 1),
        (l2(0.3), (1, 16, 16), "ce", 2),
        (l1(2.0), (3, 10, 10), "ce", 1),
        (l1(2.0), (1, 16, 16), "margin", 1),
    ],
)
def test_same_fooled_images_and_same_perturbations(
    threat: Threat, shape: tuple[int, int, int], loss: str, restarts: int, images: Callable[..., Tensor]
) -> None:
    model, x, y = attacked(images, shape)
    theirs = peer.SquareAttack(
        model, norm=NAMES[threat.norm], n_queries=200, eps=threat.eps, n_restarts=restarts, seed=7, loss=loss,
        resc_schedule=False,
    ).perturb(x, y)  # fmt: skip
    ours = Square(threat, steps=200, restarts=restarts, loss=loss, rng="autoattack", seed=7)(model, x, y)
    with torch.no_grad():
        fooled = model(theirs).argmax(1) != y
        assert torch.equal(model(ours).argmax(1) != y, fooled)
    assert 2 <= int(fooled.sum()) < len(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_rescaled_schedule_is_theirs(images: Callable[..., Tensor]) -> None:
    model, x, y = attacked(images, (3, 10, 10))
    theirs = peer.SquareAttack(model, n_queries=150, eps=0.03, seed=1, resc_schedule=True).perturb(x, y)
    ours = Square(linf(0.03), steps=150, rescale=True, rng="autoattack", seed=1)(model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    theirs_schedule = peer.SquareAttack(model, n_queries=150, eps=0.03, resc_schedule=True)
    for iteration in range(150):
        share = theirs_schedule.p_selection(iteration)
        side = min(max(round((share * 100) ** 0.5), 1), 10)
        assert Square(linf(0.03), steps=150, rescale=True).side_at(iteration, 10, 10) == side


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 15])
def test_the_pattern_is_theirs(norm: str, side: int) -> None:
    from robustmoe.attacks.square import pattern

    theirs = peer.SquareAttack(None, norm=NAMES[norm], eps=1.0, device="cpu")
    torch.manual_seed(0)
    pattern = pattern(norm, side)
    found = theirs.eta(side)
    assert any(torch.allclose(found, one, rtol=0, atol=1e-7) for one in pattern)
