"""Attacks at the ends of what they are given: large images, tiny radii, few classes, experts that are not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks.l1 import SLACK, fitted

L1 = (
    "fgsm(l1({}))",
    "pgd(l1({}), steps=2)",
    "apgd(l1({}), steps=3)",
    "apgd(l1({}), steps=3, rng=autoattack)",
    "square(l1({}), steps=3)",
    "fab(l1({}), steps=2)",
    "fmn(l1({}), steps=3)",
)


def linear(shape: tuple[int, ...], classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), classes)).eval()
    x = torch.rand(2, *shape)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("side, eps", [(96, 0.5), (96, 20.0), (32, 0.01), (16, 1e-7), (16, 1e-320), (16, 0.0)])
def test_l1_steps_stay_in_their_ball(side: int, eps: float) -> None:
    """In float64, whatever the roundings of 27,648 sums x + delta come to."""
    net, x, y = linear((3, side, side), 4)
    for text in L1:
        x_adv = rm.build_attack(text.format(eps))(net, x, y)
        length = (x_adv - x).double().abs().flatten(1).sum(1)
        assert (length <= eps * (1 + 1.01 * SLACK)).all(), (text, length - eps)


def test_the_smallest_moves_are_undone_and_no_more_than_it_takes() -> None:
    x = torch.full((2, 1, 1, 4), 0.5)
    delta = torch.tensor([[0.25, -0.125, 0.0625, 0.0], [0.25, -0.125, 0.0625, 0.03125]]).view(2, 1, 1, 4)
    moved = (fitted(x, x + delta, 0.4375) - x).flatten(1).tolist()
    assert moved == [[0.25, -0.125, 0.0625, 0.0], [0.25, -0.125, 0.0625, 0.0]]
    assert (fitted(x, x + delta, 0.4) - x).flatten(1).tolist() == [[0.25, -0.125, 0.0, 0.0]] * 2
    assert torch.equal(fitted(x, x + delta, 0.0), x)


EVERY = (
    "fgsm(linf(0.02), objective=joint(loss=dlr))",
    "pgd(linf(0.02), steps=2, objective=joint(loss=kl))",
    "pgd(linf(0.02), steps=2, objective=targeted)",
    "apgd(linf(0.02), steps=3, objective=joint(loss=dlr))",
    "apgd_t(linf(0.02), steps=3)",
    "fab(linf(0.02), steps=3)",
    "fab(linf(0.02), steps=3, targets=9)",
    "square(linf(0.02), steps=3)",
    "fmn(linf(0.02), steps=3)",
    "autoattack(linf(1))",
    "autoattack(linf(1), version=plus)",
)


@pytest.mark.parametrize("text", EVERY)
def test_few_classes(text: str) -> None:
    """With two and three classes every attack works, and breaks a linear net in a ball of all images (two steps on a
    KL may not: it also grows with the confidence); with one class it says in one line that it cannot.
    """
    for classes in (2, 3):
        net, x, y = linear((1, 8, 8), classes)
        x_adv = rm.build_attack(text.replace("0.02", "1"))(net, x, y)
        assert (net(x_adv).argmax(1) != y).any() or "kl" in text, classes
        assert torch.isfinite(x_adv).all()
        assert not torch.equal(x_adv, x)
    net, x, y = linear((1, 8, 8), 1)
    with pytest.raises(rm.UserError, match="two at least"):
        rm.build_attack(text)(net, x, y)


@pytest.mark.parametrize(
    "text, message",
    [
        ("through(expert(99), fgsm(linf(0.1)))", "expert 99 does not exist at 'router': it has experts 0 to 1"),
        ("through(expert(-1), fgsm(linf(0.1)))", "expert -1 does not exist"),
        ("autoattack_routing(linf(0.1), temperatures=[0])", "temperature must be above 0"),
        ("through(soft(1e999), fgsm(linf(0.1)))", "temperature must be above 0"),
        ("through(soft(1e-40), fgsm(linf(0.1)))", "temperature must be above 0"),
        ("pgd(linf(0.1), objective=targeted(rank=11))", "rank must be from 2 to the number of classes, 10; got 11"),
        ("pgd(linf(0.1), objective=router_hinge(cap=-1))", "cap must be 0 or more"),
        ("pgd(linf(0.1), objective=diluted(weight=1e999))", "weight must be 0 or more, and finite; got inf"),
        ("pgd(linf(0.1), objective=joint_normalised(weight=1e999))", "weight must be 0 or more, and finite; got inf"),
        ("pgd(linf(0.1), step_size=1e999)", "step_size must be above 0"),
        ("fmn(linf(0.1), step_size=1e999)", "step_size must be above 0"),
        ("route_flip(linf(0.1), step_size=1e999)", "step_size must be above 0"),
        ("fab(linf(0.1), eta=1e999)", "eta must be a number, at least 1"),
        ("pgd(l2(1e30))", "eps must be 0 or more, in pixels"),
    ],
)
def test_what_an_attack_cannot_have_is_one_line(text: str, message: str) -> None:
    model = rm.build_model("pathway(resnet8(width=4), experts=2, ratio=0.5, router=small_cnn)", 10, (1, 8, 8), seed=0)
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(rm.UserError, match=message) as error:
        rm.build_attack(text)(model, x, torch.zeros(2, dtype=torch.long))
    assert "\n" not in str(error.value)
