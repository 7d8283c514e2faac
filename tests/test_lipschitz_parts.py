"""`robustmoe.lipschitz.parts`: identities against autograd, closed forms by hand, the claims 11 to 20 by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import theory
from robustmoe.lipschitz import parts
from robustmoe.lipschitz.parts import Gating
from robustmoe.models.tokens import TokenExperts
from robustmoe.routing import top_k
from robustmoe.theory import fixed, radius, split
from robustmoe.theory.draws import Mlps, normal

M, E, D, OUT = 6, 5, 7, 4  # items, experts, input and output dimensions
GATINGS: list[Gating] = ["soft", "renormalised", "vmoe", "hard"]


@pytest.fixture
def mlps() -> Mlps:
    return Mlps(0, "experts", E, D, 9, OUT)


@pytest.fixture
def slopes() -> Tensor:
    return normal(0, "router", E, D)


@pytest.fixture
def x() -> Tensor:
    return normal(0, "x", M, D)


def mixed(mlps: Mlps, slopes: Tensor, gating: Gating, k: int, x: Tensor, temperature: float = 1.0) -> Tensor:
    """The layer, written out item by item from the definitions G1 to G4."""
    rows = []
    for item in x:
        logits, outputs = slopes @ item / temperature, mlps(item[None])[0]
        p = torch.exp(logits) / torch.exp(logits).sum()
        values = logits.detach().tolist()
        best = sorted(range(E), key=values.__getitem__, reverse=True)[: E if gating == "soft" else k]
        total = {"renormalised": sum(p[i] for i in best)}.get(gating, 1.0)
        rows.append(sum((1 / k if gating == "hard" else p[i] / total) * outputs[i] for i in best))
    return torch.stack(rows)


def jacobian_of(function: object, x: Tensor) -> Tensor:
    """(m, o, d) by autograd, one item at a time."""
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda one: function(one[None])[0], item) for item in x]  # type: ignore[operator]
    )


# ------------------------------------------------------------------------------------------------ claims 11 to 20


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("gating", GATINGS)
def test_claim_11_the_split_adds_up_to_autograds_jacobian(
    gating: Gating, temperature: float, k: int, mlps: Mlps, slopes: Tensor, x: Tensor
) -> None:
    made = parts.jacobian_split(mlps, lambda at: at @ slopes.T, x, gating, k, temperature)
    whole = jacobian_of(lambda at: mixed(mlps, slopes, gating, k, at, temperature), x)
    assert float((made.total - whole).abs().max()) <= 1e-10
    weight = parts.gates(x @ slopes.T, gating, k, temperature)
    held = jacobian_of(lambda at: torch.einsum("e,meo->mo", weight[0], mlps(at)), x[:1])
    assert float((made.expert[:1] - held).abs().max()) <= 1e-10, "A is the Jacobian with the weights held"


@pytest.mark.parametrize("gating", GATINGS)
def test_claim_11_equal_experts_leave_the_router_nothing_but_v_moes_mass(
    gating: Gating, slopes: Tensor, x: Tensor
) -> None:
    same = Mlps(0, "experts", E, D, 9, OUT).alike()
    made = parts.jacobian_split(same, lambda at: at @ slopes.T, x, gating, k=2)
    if gating != "vmoe":
        assert float(made.router.abs().max()) <= 1e-10
        return
    assert float(made.mixing.abs().max()) <= 1e-10
    at = x.clone().requires_grad_(True)
    p = torch.softmax(at @ slopes.T, 1)
    mass = p.gather(1, p.topk(2, 1).indices).sum(1)
    (slope,) = torch.autograd.grad(mass.sum(), at)
    expected = same(x)[:, 0, :, None] * slope[:, None]
    assert float((made.router - expected).abs().max()) <= 1e-10
    assert float(made.router.abs().max()) > 1e-3


def test_claim_12_the_ratio_is_sqrt_e_for_equal_norms_and_its_closed_form_else() -> None:
    for row in fixed.x1b(experts=(2, 8), width=8).rows:
        assert row.measured == pytest.approx(row.expected, abs=1e-6)
    rows = {row.setting: row for row in fixed.x1(experts=(1, 4), draws=3, width=8).rows}
    assert rows["E=1: ratio, mean of 3"].measured == pytest.approx(1.0)
    row = rows["E=4: ratio, mean of 3"]
    assert row.measured == pytest.approx(row.expected, abs=1e-8)
    assert 1.0 < row.measured < 2.0


def test_claim_13_the_sandwich_is_never_left_and_the_ratio_never_below_1() -> None:
    found = fixed.x2(widths=(32, 64, 512), draws=5)
    assert [row.measured for row in found.rows if "outside" in row.setting] == [0.0] * 3
    assert all(row.measured >= 1 - 1e-9 for row in found.rows if "least" in row.setting)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_claim_14_no_flip_within_the_radius_and_one_beyond(norm: str, k: int) -> None:
    rows, bias, x = normal(k, "rows", 20, E, D), normal(k, "bias", 20, E), normal(k, "x", 20, D)
    logits = torch.einsum("med,md->me", rows, x) + bias
    found = parts.routing_radius(logits, rows, top_k(logits[:, None], k).index[:, 0], norm)
    for item in range(20):
        chosen = logits[item].topk(k).indices.tolist()
        others = [j for j in range(E) if j not in chosen]
        gaps = {(i, j): rows[item, i] - rows[item, j] for i in chosen for j in others}
        order = 1 if norm == "linf" else 2
        expected = {
            (i, j): float(logits[item, i] - logits[item, j]) / float(torch.linalg.vector_norm(gap, order))
            for (i, j), gap in gaps.items()
        }
        assert float(found[item]) == pytest.approx(min(expected.values()), rel=1e-12)
        gap = gaps[min(expected, key=lambda pair: expected[pair])]
        step = -gap.sign() if norm == "linf" else -gap / gap.norm()
        for factor, moved in ((0.999, False), (1.001, True)):
            there = rows[item] @ (x[item] + factor * found[item] * step) + bias[item]
            assert (set(there.topk(k).indices.tolist()) != set(chosen)) is moved


def test_claim_15_the_tanh_forms() -> None:
    rows = {row.setting.split(":")[0]: row.measured for row in split.x5(points=20_001).rows}
    assert rows["constant experts, c=1.5, beta=3"] == pytest.approx(4.5, rel=1e-6)
    assert rows["experts +-x, beta=10"] == pytest.approx(1.19968, rel=5e-6)
    assert rows["experts +-2.5x, beta=3"] == pytest.approx(2.5 * 1.19968, rel=5e-6)


@pytest.mark.parametrize("gating, k", [("hard", 1), ("hard", 2), ("vmoe", 2), ("renormalised", 2), ("vmoe", 1)])
def test_claim_16_the_jump_at_a_tie(gating: Gating, k: int) -> None:
    """Constant experts; logits (3, x, -x, -9) for k = 2, (-8, x, -x, -9) for k = 1: experts 1 and 2 tie at x = 0."""
    outputs = torch.tensor([[5.0, 1.0], [1.0, 2.0], [4.0, 6.0], [0.0, 0.0]]).double()
    first = 3.0 if k == 2 else -8.0

    def f(x: float) -> Tensor:
        logits = torch.tensor([[first, x, -x, -9.0]]).double()
        return parts.gates(logits, gating, k) @ outputs

    found = float((f(1e-9) - f(-1e-9)).norm())
    tie = torch.tensor([[first, 0.0, 0.0, -9.0]]).double()
    assert found == pytest.approx(float(parts.jump(tie, outputs[None], gating, k)), abs=1e-6)
    total = math.exp(first) + 2 + math.exp(-9)
    weight = {"hard": 1 / k, "vmoe": 1 / total, "renormalised": 1 / (math.exp(first) + 1)}[gating]
    assert found == pytest.approx(weight * 5.0, abs=1e-6), "|f_1 - f_2| = |(3, 4)| = 5"


def test_claim_17_the_crossover() -> None:
    """MoE robust accuracy is P(min(a, D/2) > eps), the dense model's P(a > eps sqrt E), image by image."""
    made = radius.clusters(0, 1.0, 160, experts=4)
    size = (radius.nearest_wrong(made) - made.x).norm(dim=1)
    a = made.y * (made.x * made.teachers[made.own]).sum(1)
    for eps in (0.05, 0.2, 0.4, 0.49, 0.51, 0.6):
        assert torch.equal(size > eps, (a > eps) & (eps < 0.5))
        assert radius._dense_accuracy(made, eps) == float((a > 2 * eps).double().mean())


@pytest.mark.parametrize("gating", GATINGS)
def test_claim_18_the_shares_add_up(gating: Gating, mlps: Mlps, slopes: Tensor, x: Tensor) -> None:
    x_adv = x + normal(1, "far", M, D)
    weight, weight_adv = (parts.gates(at @ slopes.T, gating, 2) for at in (x, x_adv))
    shares = parts.attribution(weight, mlps(x), weight_adv, mlps(x_adv))
    change = mixed(mlps, slopes, gating, 2, x_adv) - mixed(mlps, slopes, gating, 2, x)
    assert float((shares.expert + shares.router - change).abs().max()) <= 1e-10
    alone = parts.attribution(weight, mlps(x), weight, mlps(x_adv))
    assert float(alone.router.abs().max()) == 0.0, "routes held: the experts' alone"
    assert float(parts.attribution(weight, mlps(x), weight_adv, mlps(x)).expert.abs().max()) == 0.0


def test_claim_19_power_iteration_the_local_norm_and_the_product_bound(x: Tensor) -> None:
    w1, b1, w2 = normal(0, "w1", 12, D), normal(0, "b1", 12), normal(0, "w2", OUT, 12)
    at = x.clone().requires_grad_(True)
    output = F.gelu(at @ w1.T + b1) @ w2.T
    exact = torch.linalg.matrix_norm(jacobian_of(lambda v: F.gelu(v @ w1.T + b1) @ w2.T, x), ord=2)
    assert torch.allclose(parts.expert_jacobian_norm(w1, b1, w2, x), exact, rtol=1e-10)
    power = parts.jacobian_norm(output, at, steps=60)
    assert bool((power <= exact * (1 + 1e-12)).all())
    assert bool((power >= 0.99 * exact).all())
    assert bool((exact <= parts.expert_bound(w1, w2)).all())


def test_claim_19_the_bound_is_met_where_every_unit_is_steepest() -> None:
    """W1 = W2 = I, b1 = sqrt(2), x = 0: the Jacobian is GELU'(sqrt 2) I."""
    eye, zero = torch.eye(3).double(), torch.zeros(1, 3).double()
    local = parts.expert_jacobian_norm(eye, torch.full((3,), math.sqrt(2)).double(), eye, zero)
    assert float(local) == pytest.approx(float(parts.expert_bound(eye, eye)), rel=1e-12)
    grid = torch.linspace(-6, 6, 200_001).double().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.gelu(grid).sum(), grid)
    assert float(slope.max()) == pytest.approx(parts.GELU_SLOPE, abs=1e-8)
    assert pytest.approx(1.12890, abs=5e-6) == parts.GELU_SLOPE


def test_claim_20_popoviciu() -> None:
    """Never exceeded by ||R||; met by two experts at 1/2: |f_1 - f_2| |s_1 - s_2| / 4T = 5 * 2 / 4T."""
    for case in range(60):
        e = 2 + case % 6
        outputs, rows = normal(case, "f", 3, e, 4), normal(case, "s", 3, e, 5)
        logits = 2 * normal(case, "l", 3, e)
        for gating, k in (("soft", 1), ("renormalised", 2), ("vmoe", 2)):
            mixing, _ = parts.router_terms(logits, outputs, rows, gating, k, 0.7)
            bound = parts.popoviciu_bound(parts.gates(logits, gating, k, 0.7), outputs, rows, 0.7)
            for one in bound:
                assert bool((torch.linalg.matrix_norm(mixing, ord=2) <= one + 1e-9).all())
    outputs = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]).double()
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]).double()
    mixing, _ = parts.router_terms(torch.zeros(1, 2).double(), outputs, rows, "soft", temperature=0.5)
    assert float(torch.linalg.matrix_norm(mixing, ord=2)) == pytest.approx(5.0)
    bound = parts.popoviciu_bound(torch.tensor([[0.5, 0.5]]).double(), outputs, rows, 0.5)
    assert [float(one) for one in bound] == pytest.approx([5.0, 5.0])


def test_the_pair_bound_can_exceed_the_diameter_bound() -> None:
    """Three corners of a simplex at 1/3: pairs 1/2 * 6/9 * 2 = 2/3, diameters 2/4 = 1/2."""
    corners, third = torch.eye(3).double()[None], torch.full((1, 3), 1 / 3).double()
    assert [float(one) for one in parts.popoviciu_bound(third, corners, corners)] == pytest.approx([2 / 3, 1 / 2])


# ------------------------------------------------------------------------------------------------ paths and products


@pytest.mark.parametrize("gating", GATINGS)
def test_the_paths_have_the_layers_value_and_the_splits_jacobians(
    gating: Gating, mlps: Mlps, slopes: Tensor, x: Tensor
) -> None:
    at = x.clone().requires_grad_(True)
    three = parts.paths(parts.gates(at @ slopes.T, gating, 2), mlps(at))
    form = parts.jacobian_split(mlps, lambda v: v @ slopes.T, x, gating, 2)
    left, right = normal(3, "left", M, OUT), normal(3, "right", M, D)
    for path, matrix in zip(three, form, strict=True):
        assert torch.allclose(path, mixed(mlps, slopes, gating, 2, x), atol=1e-12)
        assert torch.allclose(parts.vjp(path, at, left), torch.einsum("mo,mod->md", left, matrix), atol=1e-12)
        assert torch.allclose(parts.jvp(path, at, right), torch.einsum("mod,md->mo", matrix, right), atol=1e-12)
        norm = torch.linalg.matrix_norm(matrix, ord=2)
        assert torch.allclose(parts.jacobian_norm(path, at, steps=60), norm, rtol=0.01, atol=1e-12)


def test_the_paths_of_this_librarys_experts_in_float32() -> None:
    """`TokenExperts` and a linear router: the parts' products add up to those of the layer itself."""
    experts, router = TokenExperts(4, 6, 8), nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    decision = top_k(router(x)[:, None], 2, "vmoe")
    layer = experts(x, decision.index[:, 0], decision.weight[:, 0])
    three = parts.paths(parts.spread(decision)[:, 0], experts.every(x).transpose(0, 1))
    left = torch.randn(5, 6)
    total = sum(parts.vjp(path, x, left) for path in three)
    assert torch.allclose(total, parts.vjp(layer, x, left), atol=1e-6)


def test_an_item_that_no_expert_had_room_for_has_no_sensitivity(mlps: Mlps, x: Tensor) -> None:
    at = x.clone().requires_grad_(True)
    weight = torch.softmax(at[:, :E], 1) * torch.tensor([0.0, 1, 1, 1, 1, 1])[:, None]
    for path in parts.paths(weight, mlps(at)):
        slope = parts.vjp(path, at, torch.ones(M, OUT).double())
        assert bool(slope.isfinite().all())
        assert float(slope[0].abs().max()) == 0.0


def test_the_split_is_differentiable_in_the_weights(slopes: Tensor, x: Tensor, mlps: Mlps) -> None:
    rows = slopes.clone().requires_grad_(True)
    mlps.w2.requires_grad_(True)
    made = parts.jacobian_split(mlps, lambda at: at @ rows.T, x, "vmoe", 2, differentiable=True)
    for grad in torch.autograd.grad(made.total.square().sum(), [rows, mlps.w2]):
        assert float(grad.abs().max()) > 0
    still = parts.jacobian_split(mlps, lambda at: at @ rows.T, x, "vmoe", 2)
    assert not still.expert.requires_grad


def test_the_bounds_and_radii_are_differentiable(slopes: Tensor, x: Tensor, mlps: Mlps) -> None:
    rows = slopes.clone().requires_grad_(True)
    logits = x @ rows.T
    index = top_k(logits[:, None], 2).index[:, 0]
    bound = parts.popoviciu_bound(parts.gates(logits, "vmoe", 2), mlps(x), rows.expand(M, -1, -1))
    values = [*bound, parts.jump(logits, mlps(x), "vmoe", 2)]
    values += [parts.routing_radius(logits, rows, index, norm) for norm in ("l2", "linf")]
    for value in values:
        (grad,) = torch.autograd.grad(value.sum(), rows, retain_graph=True)
        assert bool(grad.isfinite().all())
        assert float(grad.abs().max()) > 0


# ------------------------------------------------------------------------------------------------ the small ones


def test_gates_by_hand() -> None:
    logits = torch.log(torch.tensor([[6.0, 3.0, 1.0]])).double()
    assert parts.gates(logits, "soft")[0].tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert parts.gates(logits, "renormalised", 2)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert parts.gates(logits, "vmoe", 2)[0].tolist() == pytest.approx([0.6, 0.3, 0])
    assert parts.gates(logits, "hard", 2)[0].tolist() == [0.5, 0.5, 0]
    assert parts.gates(logits, "vmoe", 1, temperature=0.5)[0].tolist() == pytest.approx([36 / 46, 0, 0])


def test_gates_refuse_what_is_none() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        parts.gates(logits, "hard", 1, temperature=0.0)
    with pytest.raises(ValueError, match="k must be between 1 and the number of experts, 3; got 4"):
        parts.gates(logits, "vmoe", 4)


def test_no_jump_and_no_radius_where_nobody_is_left_out(x: Tensor, slopes: Tensor, mlps: Mlps) -> None:
    logits = x @ slopes.T
    everyone = top_k(logits[:, None], E).index[:, 0]
    assert parts.routing_radius(logits, slopes, everyone, "l2").tolist() == [math.inf] * M
    assert parts.jump(logits, mlps(x), "vmoe", E).tolist() == [0.0] * M
    assert parts.jump(logits, mlps(x), "soft").tolist() == [0.0] * M


def test_the_radius_of_equal_rows() -> None:
    """Two rows alike: a gap of biases that nothing closes; no gap: already at the boundary."""
    rows, index = torch.ones(2, 3), torch.tensor([[0], [0]])
    found = parts.routing_radius(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), rows, index, "l2")
    assert found.tolist() == [math.inf, 0.0]


def test_coherence_by_hand() -> None:
    """Groups of one vector each: D^-1/2 (K - D) D^-1/2 is the cosine off the diagonal."""
    x = torch.tensor([[2.0, 0.0], [3.0, 3.0]]).double()
    assert parts.block_coherence(x, torch.tensor([1, 0])) == pytest.approx(math.sqrt(0.5))
    assert parts.block_coherence(torch.eye(4).double(), torch.tensor([0, 1, 0, 2])) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="the 2 rows of a group are linearly dependent in 2 dimensions"):
        parts.block_coherence(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 0]))


def test_half_precision_is_widened() -> None:
    w1, w2 = torch.randn(8, 4).bfloat16(), torch.randn(4, 8).bfloat16()
    assert parts.expert_bound(w1, w2).dtype == torch.float32
    local = parts.expert_jacobian_norm(w1, torch.zeros(8).bfloat16(), w2, torch.randn(3, 4).bfloat16())
    assert bool((local <= parts.expert_bound(w1, w2) + 1e-3).all())


def test_every_claim_from_11_to_20_stands_above() -> None:
    claims = {int(name.split("_")[2]) for name in globals() if name.startswith("test_claim_")}
    assert claims == set(range(11, 21))
    assert len(theory.EXPERIMENTS) == 13
