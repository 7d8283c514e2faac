"""Routes over a ball: linear programmes against other ones, closed forms and samples."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from robustmoe.attacks import Threat, l2, linf
from robustmoe.certification import Ball, router_bounds, routes, rules
from robustmoe.certification.routes import exact_margin, reachable_exactly, route_radius
from robustmoe.errors import UserError
from robustmoe.lipschitz.parts import routing_radius
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.parts import Fork

SHAPE = (1, 4, 4)
LINEAR = "ensemble(linear, experts={}, k={}, gate={}, router=linear)"
PATH = "pathway(resnet8(width=4), experts=2, router=small_cnn(width=2), standardise=True, {})"


def images(n: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(n, *SHAPE, generator=generator)).double()


def made(spec: str, seed: int = 0) -> RoutedModel:
    return build_model(spec, 3, SHAPE, seed=seed).double()


def linear(experts: int = 4, k: int = 1, gate: str = "hard", seed: int = 0) -> RoutedModel:
    """Linear experts and a linear router whose logits have mean 0 over the images."""
    model = made(LINEAR.format(experts, k, gate), seed)
    with torch.no_grad():
        model.router.head.bias.sub_(model.router(model.normalise(images(200, seed=5))).mean(0))
    return model


def lively(spec: str) -> RoutedModel:
    """The running statistics, of the standardised routers too, are those of images."""
    model = made(spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(images(64, seed=5))
    return model.eval()


def matrix(model: RoutedModel) -> tuple[Tensor, Tensor]:
    """The router's weight and bias on pixels, by hand: normalisation (x - 0.5) / 0.5 folded in."""
    weight, bias = model.router.head.weight.detach(), model.router.head.bias.detach()
    return weight / 0.5, bias - weight.sum(1)


def feasible(model: RoutedModel, x: Tensor, eps: float, ahead: list[int], behind: list[int]) -> bool:
    """Whether somewhere in the ball every expert ``ahead`` is not behind any expert ``behind``: no objective."""
    weight, bias = matrix(model)
    pairs = [(i, k) for i in ahead for k in behind]
    rows = torch.stack([weight[k] - weight[i] for i, k in pairs])
    limits = torch.stack([bias[i] - bias[k] for i, k in pairs])
    flat = x.flatten()
    sides = torch.stack([(flat - eps).clamp(min=0), (flat + eps).clamp(max=1)], 1)
    found = linprog(torch.zeros(len(flat)).numpy(), A_ub=rows.numpy(), b_ub=limits.numpy(), bounds=sides.tolist())
    assert found.status in (0, 2), found.message
    return found.status == 0


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
def test_experts_are_reached_where_another_linear_programme_is_feasible(eps: float) -> None:
    """C3: and never where the pairwise test says no; both agree nearly always."""
    model, x = linear(), images(25)
    found = reachable_exactly(model, x, linf(eps))["router"]
    expected = [[feasible(model, one, eps, [i], [k for k in range(4) if k != i]) for i in range(4)] for one in x]
    assert found.tolist() == expected
    with torch.no_grad():
        _, most = router_bounds(model.parts().router, Ball(x, "linf", torch.full((25,), eps).double()), "ibp")
    cheap = rules.reachable(most)
    assert not (found & ~cheap).any()
    assert (found == cheap).all(1).double().mean() >= 0.8
    assert 1 < found.sum(1).double().mean() <= 4
    inside = (x + eps * (2 * torch.rand(300, *x.shape).double() - 1).sign()).clamp(0, 1)
    chosen = torch.stack([model.route(each)["router"].chosen()[:, 0] for each in inside]).any(0)
    assert not (chosen & ~found).any()


@pytest.mark.parametrize("k", [1, 2])
def test_programmes_are_asked_only_about_what_both_bounds_leave_open(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a round of the game every answer is a programme's; with one the same, and most are not asked for."""
    model, x = linear(k=k), images(12)
    asked: list[int] = []
    programme = routes._lead
    monkeypatch.setattr(routes, "_lead", lambda *given: asked.append(1) or programme(*given))
    counts, said = [], []
    for rounds in (0, 2, routes.ROUNDS):
        monkeypatch.setattr(routes, "ROUNDS", rounds)
        said.append(torch.stack([reachable_exactly(model, x, linf(eps))["router"] for eps in (0.02, 0.05, 0.1)]))
        counts.append(len(asked) - sum(counts))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])
    assert counts[0] > counts[1] > counts[2]
    assert counts[2] <= 0.1 * counts[0]


def test_two_of_four_are_reached_where_one_of_the_sets_of_two_is_feasible() -> None:
    model, x = linear(k=2), images(12)
    found = reachable_exactly(model, x, linf(0.05))["router"]

    def reached(one: Tensor, i: int) -> bool:
        rest = [k for k in range(4) if k != i]
        return any(feasible(model, one, 0.05, [i], [k for k in rest if k != j]) for j in rest)

    assert found.tolist() == [[reached(one, i) for i in range(4)] for one in x]
    assert 2 < found.sum(1).double().mean() < 4
    everything = reachable_exactly(linear(gate="soft"), x, linf(0.05))["router"]
    assert everything.all()


def test_the_parts_of_a_dual_are_named_as_in_its_trace() -> None:
    dual = made(f"dual({LINEAR.format(3, 1, 'hard')}, {LINEAR.format(2, 1, 'hard')})")
    x = images(3)
    found = reachable_exactly(dual, x, linf(0.02))
    assert set(found) == set(dual.route(x)) == {"standard.router", "robust.router"}
    assert torch.equal(found["standard.router"], reachable_exactly(dual.standard, x, linf(0.02))["router"])
    assert found["robust.router"].shape == (3, 2)


def test_what_is_not_linear_is_refused_in_one_line() -> None:
    x, y = images(2), torch.zeros(2, dtype=torch.long)
    curved = made("ensemble(linear, experts=2, router=small_cnn(width=2))")
    with pytest.raises(UserError, match="router=linear"):
        reachable_exactly(curved, x, linf(0.1))
    with pytest.raises(UserError, match="not linear in the pixels"):
        exact_margin(curved, x, y, linf(0.1))
    for gate, k in (("soft", 1), ("vmoe", 1), ("hard", 2)):
        with pytest.raises(UserError, match="top-1"):
            exact_margin(linear(gate=gate, k=k), x, y, linf(0.1))
    with pytest.raises(ValueError, match="linf balls; got l2"):
        reachable_exactly(linear(), x, l2(0.1))
    assert reachable_exactly(made("small_cnn(width=2)"), x, linf(0.1)) == {}


# ------------------------------------------------------------------------------------------------ radii


@pytest.mark.parametrize("norm, order", [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("k", [1, 2])
def test_radius_of_a_linear_router_is_the_least_lead_over_the_dual_norm(norm: str, order: int, k: int) -> None:
    """C2: in the middle of the box, which is then not in the way; the closed form over all pairs."""
    model, x = linear(k=k), images(30, 0.4, 0.6)
    weight, bias = matrix(model)
    logits = x.flatten(1) @ weight.T + bias
    expected = routing_radius(logits, weight, logits.topk(k).indices, norm)
    assert (expected < 0.4).all()  # within the box
    torch.testing.assert_close(route_radius(model, x, norm), expected, rtol=0, atol=1e-5)  # slack 1e-6 of the logits
    lead = logits.topk(k + 1).values
    next_ = lead[:, k - 1] - lead[:, k]
    steep = torch.cdist(weight, weight, p=order).max()
    assert (expected >= next_ / steep - 1e-12).all()  # never below the weakest pair at the steepest slope


def test_radius_is_where_the_linear_programme_first_reaches_another_expert_also_at_the_walls_of_the_box() -> None:
    model = linear()
    x = images(15).round()  # black and white: half of every step is lost
    radius = route_radius(model, x, "linf")
    free = route_radius(model, 0.5 + 0 * x, "linf")
    assert (radius < 1).any()
    assert free.unique().numel() == 1
    for one, far in zip(x, radius.tolist()):
        if far < 1:
            assert int(reachable_exactly(model, one[None], linf(0.999 * far))["router"].sum()) == 1
            assert int(reachable_exactly(model, one[None], linf(min(1.0, 1.001 * far + 1e-5)))["router"].sum()) > 1
    weight, bias = matrix(model)
    logits = x.flatten(1) @ weight.T + bias
    without = routing_radius(logits, weight, logits.topk(1).indices, "linf")
    assert (radius >= without - 1e-5).all()
    assert (radius > 1.2 * without).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "spec",
    [
        "ensemble(small_cnn(width=2), experts=3, router=small_cnn(width=2), standardise=True)",
        PATH.format("ratio=1"),
        PATH.format("routers=stage"),
    ],
)
def test_no_router_on_the_path_changes_its_mind_within_the_radius(spec: str, norm: str) -> None:
    model, x = lively(spec), images(4, seed=2)
    radius = route_radius(model, x, norm, halvings=12)
    assert (radius > 0).any()
    at_x = model.route(x)
    step = torch.randn(40, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = step.sign() if norm == "linf" else step / torch.linalg.vector_norm(step, dim=(2, 3, 4), keepdim=True)
    wider = 0
    for each in step:
        for scale in (1.0, 30.0):
            there = model.route((x + scale * radius[:, None, None, None] * each).clamp(0, 1))
            changed = torch.stack([(there[name].index != at_x[name].index).flatten(1).any(1) for name in at_x]).any(0)
            assert scale > 1 or not changed.any()
            wider += int(changed.sum())
    assert wider  # it does change further out


def test_without_a_router_that_leaves_one_out_there_is_no_boundary() -> None:
    x = images(3)
    for spec in ("small_cnn(width=2)", LINEAR.format(3, 1, "soft"), LINEAR.format(3, 3, "renormalised")):
        assert route_radius(made(spec), x, "linf").tolist() == [torch.inf] * 3
    hard, soft = LINEAR.format(3, 1, "hard"), LINEAR.format(3, 1, "soft")
    dual = made(f"dual({soft}, {hard})")
    assert torch.equal(route_radius(dual, x, "l2"), route_radius(dual.robust, x, "l2"))


# ------------------------------------------------------------------------------------------------ margins


def corners(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (x - eps).clamp(0, 1).flatten(1), (x + eps).clamp(0, 1).flatten(1)


def test_exact_margin_of_one_linear_network_is_the_closed_form() -> None:
    model, x = made("linear"), images(10)
    y = model(x).argmax(1)
    low, high = corners(x, 0.05)
    weight, bias = model.network.head.weight / 0.5, model.network.head.bias - model.network.head.weight.sum(1)
    slope, offset = weight[y][:, None] - weight[None], bias[y][:, None] - bias[None]  # (n, c, d), (n, c)
    least = (slope * torch.where(slope > 0, low[:, None], high[:, None])).sum(2) + offset
    expected = least.scatter(1, y[:, None], torch.inf).amin(1).detach()
    torch.testing.assert_close(exact_margin(model, x, y, linf(0.05)), expected)


def test_exact_margin_of_a_mixture_is_the_least_on_a_fine_grid_of_two_pixels() -> None:
    """Two pixels, so that a grid comes near every point of the ball; below it by less than the grid is coarse."""
    model = build_model("ensemble(linear, experts=3, gate=hard, router=linear)", 3, (1, 1, 2), seed=4).double()
    x = torch.rand(12, 1, 1, 2, generator=torch.Generator().manual_seed(1)).double()
    y, eps = model(x).argmax(1), 0.3
    found = exact_margin(model, x, y, linf(eps))
    line = torch.linspace(-1, 1, 201, dtype=torch.float64)
    steps = torch.cartesian_prod(line, line).view(-1, 1, 1, 1, 2)
    points = (x + eps * steps).clamp(0, 1)
    z = model(points.flatten(0, 1)).detach().unflatten(0, points.shape[:2])
    label = y.expand(len(z), -1)[..., None]
    grid = (z.gather(2, label) - z).scatter(2, label, torch.inf).amin((0, 2))
    assert (found <= grid + 1e-9).all()
    assert (found >= grid - 0.02).all()  # slopes below 4 a pixel, steps of 0.003
    fork = model.parts()
    assert isinstance(fork, Fork)
    assert (reachable_exactly(model, x, Threat("linf", eps))["router"].sum(1) > 1).any()
