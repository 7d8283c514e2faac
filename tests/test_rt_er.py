"""RT-ER: the loss against a loop over images and experts, who is protected, and the identities of C14 and C15."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, ExpertTransition, Threat, linf
from robustmoe.errors import UserError
from robustmoe.models import EnsembleModel, Normalise, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import to_rank
from robustmoe.training import Method, MiniBatch, at, build_method, rt_er, train_step
from robustmoe.training.optimisation import SGD
from robustmoe.training.rt_er import RTER, Label, Protect, unstable

EPS, STEP, STEPS = 0.1, 0.05, 3
CLEAN_PGD = PGD(linf(EPS), steps=STEPS, step_size=STEP, keep="last", start="clean")
PGD_2 = PGD(linf(EPS), steps=2, keep="last")
PROTECT: list[Protect] = ["second", "random", "reachable", "all"]
LABEL: list[Label] = ["kl", "ce"]
N, CLASSES = 12, 3


@pytest.fixture
def linear() -> EnsembleModel:
    """Four linear experts on six pixels and a linear router, all larger than fresh ones."""
    model = build_model("ensemble(linear, experts=4, router=linear, gate=hard)", CLASSES, (1, 2, 3), seed=3)
    assert isinstance(model, EnsembleModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture
def batch(images: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Noise]:
    return images(N, 1, 2, 3), torch.arange(N) % CLASSES, Noise.of(torch.arange(N) + 40, 1)


def climb(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """PGD on the cross-entropy of one image, from the image itself."""
    z = x.clone()
    for _ in range(STEPS):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(f(z), y), z)
        z = torch.minimum(torch.maximum(z + STEP * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
    return z.detach()


def gates(model: EnsembleModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gates (n, e) and the slope of every difference of two gates, sum_j |w_k - w_i|_j / 0.5, in float64."""
    weight, bias = (p.detach().double() for p in model.router.head.parameters())
    g = ((x.double() - 0.5) / 0.5).flatten(1) @ weight.T + bias
    return g, (weight[:, None] - weight[None]).abs().sum(-1) / 0.5


def within_reach(model: EnsembleModel, x: Tensor) -> list[set[int]]:
    """Expert i, unless some k is ahead of it by more than the ball can change."""
    g, slope = gates(model, x)
    every = range(g.shape[1])
    return [{i for i in every if not any(row[k] - row[i] > EPS * slope[k, i] for k in every)} for row in g]


def protected(model: EnsembleModel, x: Tensor, noise: Noise, protect: Protect) -> list[set[int]]:
    """The experts that each image's further terms are of, by their definition."""
    order = gates(model, x)[0].argsort(1, descending=True).tolist()
    if protect == "second":
        return [{row[1]} for row in order]
    if protect == "random":
        draws = noise.fold(2).uniform().tolist()
        return [{row[1 + int(3 * u)]} for row, u in zip(order, draws)]
    if protect == "reachable":
        return [near - {row[0]} for near, row in zip(within_reach(model, x), order)]
    return [set(range(4)) for _ in order]


def by_loop(
    model: EnsembleModel, x: Tensor, y: Tensor, noise: Noise, beta: float, protect: Protect, loss: Label
) -> Tensor:
    """RT-ER, one image at a time through one expert at a time, as the released code runs."""
    total = torch.zeros(())
    for n, others in enumerate(protected(model, x, noise, protect)):
        one, label = x[n : n + 1], y[n : n + 1]

        def whole(z: Tensor) -> Tensor:
            return model.experts[int(gates(model, z.detach())[0].argmax())](model.normalise(z))

        total = total + F.cross_entropy(whole(climb(whole, one, label)), label)
        for i in sorted(others):

            def expert(z: Tensor, i: int = i) -> Tensor:
                return model.experts[i](model.normalise(z))

            moved = expert(climb(expert, one, label))
            if loss == "ce":
                total = total + beta * F.cross_entropy(moved, label)
            else:
                clean = expert(one)
                total = total + beta * F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="sum")
    return total / len(x)


@pytest.mark.parametrize("loss", LABEL)
@pytest.mark.parametrize("protect", PROTECT)
def test_the_loss_is_that_of_a_loop_over_images(
    protect: Protect, loss: Label, linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """Value and every gradient. BatchNorm is absent: with it a batch of one is another loss, which is the point."""
    linear.train()
    found = RTER(CLEAN_PGD, 6.0, protect, loss)(linear, *batch).value
    expected = by_loop(linear, *batch, 6.0, protect, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    experts = list(linear.experts.parameters())
    ours, theirs = (torch.autograd.grad(value, experts, allow_unused=True) for value in (found, expected))
    for mine, other in zip(ours, theirs):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_four_choices_of_whom_to_protect_differ_here(
    linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """So that the test above tells them apart: some image reaches one expert alone, some reaches three or more."""
    x, _, noise = batch
    sizes = [len(near) for near in within_reach(linear, x)]
    assert min(sizes) == 1
    assert max(sizes) >= 3
    assert protected(linear, x, noise, "random") != protected(linear, x, noise, "second")
    values = {RTER(CLEAN_PGD, 6.0, protect)(linear, *batch).value.item() for protect in PROTECT}
    assert len(values) == 4


# ------------------------------------------------------------------------------------------------ C14


def after(
    method: Method, model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """The model's state after one step on 16 images."""
    optimisers = [SGD(0.1).make(phase.parameters(model).values()) for phase in method.phases]
    train_step(model, method, optimisers, MiniBatch(images(16), labels(16), Noise.of(torch.arange(16), 5)))
    return model.state_dict()


@pytest.mark.parametrize(
    "spec, beta",
    [
        ("ensemble(resnet8(width=4), experts=3, gate=straight_through, router=small_cnn(width=4))", 0.0),
        ("pathway", 0.0),
        ("ensemble(resnet8(width=4), experts=1, router=small_cnn(width=4))", 6.0),
        ("dense", 6.0),
    ],
)
@pytest.mark.parametrize("protect", PROTECT)
def test_c14_without_beta_or_a_second_expert_it_is_at(
    spec: str,
    beta: float,
    protect: Protect,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """Bit for bit, weights and buffers, with the attack's random start."""
    ours = after(rt_er(PGD_2, beta=beta, protect=protect), tiny(spec), images, labels)
    theirs = after(at(PGD_2), tiny(spec), images, labels)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("protect", PROTECT)
def test_c14_the_kl_is_0_for_the_image_itself_and_above_it_elsewhere(
    protect: Protect, linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """eps = 0: the loss is the clean cross-entropy, whatever beta. eps > 0: every term adds."""
    x, y, _ = batch
    still = PGD(linf(0.0), steps=2, step_size=0.1, keep="last")
    found = RTER(still, 6.0, protect)(linear, *batch).value
    assert torch.equal(found, F.cross_entropy(linear(x), y))
    for attack in (CLEAN_PGD, PGD_2):
        assert RTER(attack, 1.0, protect)(linear, *batch).value > RTER(attack, 0.0, protect)(linear, *batch).value


def test_c14_the_second_ranked_masks_are_a_partition_of_the_batch(
    linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    trace = linear.route(x)
    second = to_rank(trace, 1)["router"].index[:, 0, 0]
    masks = torch.stack([second == i for i in range(4)])
    assert torch.equal(masks.sum(0), torch.ones(N, dtype=torch.long))
    assert not (second == trace["router"].index[:, 0, 0]).any()
    ((rows, forced),) = RTER(PGD_2, 6.0)._experts(linear, x, trace, noise)
    assert torch.equal(rows, torch.arange(N))
    assert torch.equal(forced["router"].index[:, 0, 0], second)


def test_the_random_expert_is_uniform_among_the_others_and_belongs_to_the_image(
    linear: EnsembleModel, images: Callable[..., Tensor]
) -> None:
    """3000 images, three others each: every rank 1000 times, within four deviations, 4 sqrt(3000 * 2 / 9) = 103."""
    x, noise = images(3000, 1, 2, 3), Noise.of(torch.arange(3000), 9)
    loss, trace = RTER(PGD_2, 6.0, "random"), linear.route(x)
    ((_, forced),) = loss._experts(linear, x, trace, noise)
    drawn = forced["router"].index[:, 0, 0]
    order = trace["router"].logits[:, 0].argsort(1, descending=True)
    rank = (order == drawn[:, None]).long().argmax(1)
    counts = rank.bincount(minlength=4).tolist()
    assert counts[0] == 0
    assert all(abs(count - 1000) < 103 for count in counts[1:])
    some = torch.tensor([2017, 5, 444])
    ((_, alone),) = loss._experts(linear, x[some], linear.route(x[some]), noise[some])
    assert torch.equal(alone["router"].index[:, 0, 0], drawn[some])
    ((_, again),) = loss._experts(linear, x, trace, Noise.of(torch.arange(3000), 10))
    assert not torch.equal(again["router"].index[:, 0, 0], drawn)


def test_reachable_protects_exactly_the_experts_within_reach(
    linear: EnsembleModel, images: Callable[..., Tensor]
) -> None:
    """The linear router's own closed form, in float64, on 500 images (none within rounding of a tie)."""
    x = images(500, 1, 2, 3)
    entries = RTER(CLEAN_PGD, 6.0, "reachable")._experts(linear, x, linear.route(x), Noise.of(torch.arange(500)))
    assert len(entries) == 4
    found: list[set[int]] = [set() for _ in range(500)]
    for k, (rows, forced) in enumerate(entries):
        assert (forced["router"].index == k).all()
        assert len(forced["router"].index) == len(rows)
        for row in rows.tolist():
            found[row].add(k)
    first = gates(linear, x)[0].argmax(1).tolist()
    assert found == [near - {own} for near, own in zip(within_reach(linear, x), first)]


def test_an_expert_that_protects_nobody_gets_no_gradient(
    linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """The gate of expert 3 is 100 below the others: never first, second or within reach. "all" trains it."""
    with torch.no_grad():
        linear.router.head.bias[3] -= 100
    for protect in PROTECT[:1] + PROTECT[2:]:
        value = RTER(CLEAN_PGD, 6.0, protect)(linear, *batch).value
        gradients = torch.autograd.grad(value, list(linear.experts[3].parameters()), allow_unused=True)
        assert all(g is None or not g.any() for g in gradients) == (protect != "all")


# ------------------------------------------------------------------------------------------------ C15


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1)[:, :1]


def two_constants() -> EnsembleModel:
    """Images of one pixel p, gates (p, 1 - p): expert 0, which says class 0, above 0.5; expert 1, class 1, below."""
    router = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        router[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        router[1].bias.copy_(torch.tensor([0.0, 1.0]))
    experts: list[nn.Module] = [Constant(2.0, 0.0), Constant(0.0, 2.0)]
    return EnsembleModel(router, experts, "hard", 1, "logits", Normalise((0.0,), (1.0,)))


def test_c15_a_wrong_but_steady_second_expert_costs_nothing_and_breaks_the_image() -> None:
    """The image 0.55 of class 0, eps 0.1: expert 1 is second-ranked, wrong, and constant. Its KL is 0 and so is every
    gradient of it; its cross-entropy is log(1 + e^2). The expert-transition attack takes the image into its cell; PGD
    from the image sees no gradient at all.
    """
    x, y, noise = torch.full((1, 1, 1, 1), 0.55), torch.tensor([0]), Noise.of(torch.arange(1))
    attack = PGD(linf(0.1), steps=5, start="clean")
    model = two_constants()
    base = RTER(attack, 0.0)(model, x, y, noise).value
    assert torch.equal(RTER(attack, 6.0, loss="kl")(model, x, y, noise).value, base)
    added = RTER(attack, 1.0, loss="ce")(model, x, y, noise).value - base
    assert added.item() == pytest.approx(torch.tensor(1 + torch.e**2).log().item(), rel=1e-5)
    assert int(model(attack(model, x, y)).argmax()) == 0
    assert int(model(ExpertTransition(linf(0.1))(model, x, y)).argmax()) == 1


@pytest.mark.parametrize("loss, safe", [("kl", False), ("ce", True)])
def test_c15_training_by_kl_leaves_that_expert_wrong(loss: Label, safe: bool) -> None:
    """15 steps: the KL does not move the wrong expert by a bit; the labelled term turns it."""
    x, y = torch.full((4, 1, 1, 1), 0.55), torch.zeros(4, dtype=torch.long)
    model = two_constants()
    method = rt_er(PGD(linf(0.1), steps=2, start="clean"), beta=1.0, loss=loss)
    optimiser = SGD(1.0, momentum=0.0, weight_decay=0.0).make(model.parameters())
    for step in range(15):
        train_step(model, method, [optimiser], MiniBatch(x, y, Noise.of(torch.arange(4), step)))
    assert torch.equal(model.experts[1].logits, torch.tensor([0.0, 2.0])) != safe
    model.eval()
    x_adv = ExpertTransition(linf(0.1))(model, x, y)
    assert bool((model(x_adv).argmax(1) == y).all()) == safe


# ------------------------------------------------------------------------------------------------ stability


@pytest.mark.parametrize("norm, order", [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_the_stability_penalty_of_a_linear_router(
    norm: str, order: float, linear: EnsembleModel, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """mean max(0, 1 - r / eps), r = (g_1 - g_2) / ||w_1 - w_2|| in the dual norm, w in pixels (std 0.5)."""
    x, y, noise = batch
    attack = PGD(Threat(norm, 0.2), steps=1, keep="last")  # type: ignore[arg-type]
    weight = linear.router.head.weight.detach().double() / 0.5
    expected = []
    for row in gates(linear, x)[0]:
        first, second = row.argsort(descending=True)[:2].tolist()
        radius = (row[first] - row[second]) / torch.linalg.vector_norm(weight[first] - weight[second], order)
        expected.append(max(0.0, 1 - float(radius) / 0.2))
    assert min(expected) == 0 or norm != "linf"
    mean = sum(expected) / N
    assert 0 < mean < 1
    assert unstable(linear, x, attack).item() == pytest.approx(mean, rel=1e-5)
    with_it, without = (RTER(attack, 0.0, stability=s)(linear, x, y, noise).value for s in (3.0, 0.0))
    assert (with_it - without).item() == pytest.approx(3 * mean, rel=1e-4)
    # A hard gate has no other gradient for its router
    router = list(linear.router.parameters())
    assert all(g is not None and g.any() for g in torch.autograd.grad(with_it, router))
    assert all(g is None for g in torch.autograd.grad(without, router, allow_unused=True))


def test_the_penalty_widens_the_margins_until_routes_hold(linear: EnsembleModel, images: Callable[..., Tensor]) -> None:
    """By it alone (beta 0), on images of which few hold their route in the ball at first."""
    x, y = images(64, 1, 2, 3), torch.arange(64) % CLASSES
    alone = [sum(len(near) == 1 for near in within_reach(linear, x))]
    method = rt_er(CLEAN_PGD, beta=0.0, stability=5.0)
    optimiser = SGD(0.2, weight_decay=0.0).make(linear.parameters())
    for step in range(30):
        train_step(linear, method, [optimiser], MiniBatch(x, y, Noise.of(torch.arange(64), step)))
    alone.append(sum(len(near) == 1 for near in within_reach(linear, x)))
    assert alone[1] > alone[0] + 16


def test_where_no_expert_is_left_out_there_is_no_penalty(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    for name in ("dense", "ensemble_soft"):
        assert unstable(tiny(name), images(4), PGD_2).item() == 0.0


# ------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    "text, said",
    [
        ("rt_er(pgd(linf(0.1)), beta=-1.0)", r"beta must be 0 or more; got -1\.0"),
        ("rt_er(pgd(linf(0.1)), stability=-0.5)", r"stability must be 0 or more; got -0\.5"),
        ("rt_er(pgd(linf(0.1)), protect=third)", "second"),
        ("rt_er(pgd(linf(0.1)), loss=mse)", "kl"),
        ("rt_er(expert_transition(linf(0.1)))", "rt_er turns its attack on single experts; .* got a ExpertTransition"),
        ("rt_er(autoattack(linf(0.1)))", "rt_er turns its attack on single experts; .* got a AutoAttack"),
    ],
)
def test_bad_specs_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_method(text)
