"""AdvMoE: its two phases against the released step written out, its log-space losses, its variants and controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks import Attack, Diluted, Joint, NotFiniteError, Objective, build_attack, kl, linf
from robustmoe.attacks.threat import Threat
from robustmoe.errors import UserError
from robustmoe.models import PathwayModel, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.records import read_jsonl
from robustmoe.routing import Tape, to_expert, top_k
from robustmoe.training import Method, MiniBatch, TrainingStopped, advmoe, build_method, train, train_step
from robustmoe.training.methods import EXPERTS, ROUTERS
from robustmoe.training.optimisation import SGD

SPEC = "pathway(resnet8(width=8), experts=2, router=resnet8(width=2), standardise=True)"


@dataclass(frozen=True)
class Shift(Attack):
    """x + 0.05 in one place: an attacked image that is the same for every implementation."""

    threat: Threat = linf(0.05)  # noqa: RUF009 (a frozen value)
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        pattern = torch.where(torch.arange(x.shape[-1], device=x.device) % 2 == 0, 0.05, -0.05)
        return (x + pattern).clamp(0, 1)


def model_of(spec: str = SPEC, classes: int = 4) -> Any:
    return build_model(spec, classes, (3, 8, 8), seed=3)


def optimisers(method: Method, model: nn.Module, lr: float = 0.1) -> list[torch.optim.Optimizer]:
    return [SGD(lr, 0.9, 5e-4).make(phase.parameters(model).values()) for phase in method.phases]


def step(method: Method, model: RoutedModel, x: Tensor, y: Tensor, **more: Any) -> dict[str, float]:
    noise = Noise.of(torch.arange(len(x)), 1)
    second = MiniBatch(x.flip(0), y.flip(0), Noise.of(torch.arange(len(x)), 2))
    found = train_step(model, method, optimisers(method, model), MiniBatch(x, y, noise), second=second, **more)
    return {name: value.item() for name, value in found.loss.items()}


# ------------------------------------------------------------------------------------------------ the released step


def released_step(model: PathwayModel, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[float, float]:
    """Steps 4, 5, 8, 9 and 10 of the released ``trainer()`` on a given attacked batch, in our own words: router scores
    of the clean images taken first, the experts' step, the router's step.
    """
    router = [p for name, p in model.named_parameters() if name.startswith("router.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("router.")]
    move = [torch.optim.SGD(group, 0.1, 0.9, weight_decay=5e-4) for group in (rest, router)]
    model.train()
    scores = model.router(model.normalise(x))
    clean, attacked = model(x), model(x_adv)
    consistency = F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True)
    lower = F.cross_entropy(clean, y) + 6 * consistency
    for p, g in zip(rest, torch.autograd.grad(lower, rest, retain_graph=True)):
        p.grad = g
    move[0].step()
    scores_adv = model.router(model.normalise(x_adv))
    stable = F.kl_div(F.log_softmax(scores_adv, 1), F.log_softmax(scores, 1), reduction="batchmean", log_target=True)
    upper = 6 * F.cross_entropy(scores, y % 2) + 6 * stable
    for p, g in zip(router, torch.autograd.grad(upper, router)):
        p.grad = g
    move[1].step()
    return lower.item(), upper.item()


@pytest.mark.parametrize("shared", [False, True])
def test_the_released_variant_is_the_released_step(
    shared: bool, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """C18: losses and moved weights on one batch. With one shared attack there is one phase, and nothing changes: the
    router's loss knows no expert.
    """
    x, y = images(32), labels(32)
    ours, theirs = model_of(), model_of()
    losses = step(advmoe(Shift(), variant="released", shared_attack=shared), ours, x, y)
    lower, upper = released_step(theirs, x, Shift()(theirs, x, y), y)
    expected = {"both": lower + upper} if shared else {"experts": lower, "router": upper}
    assert losses == pytest.approx(expected, rel=1e-5)
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "spec, network, router",
    [
        # experts: the clean pass and two steps of the attack, then two; router: three in the attack, two of the router
        ("advmoe(variant=released)", 8, 10),
        # one attack for both
        ("advmoe(variant=released, shared_attack=True)", 5, 5),
        # twice TRADES
        ("advmoe(variant=bilevel)", 10, 10),
    ],
)
def test_no_pass_is_made_for_nothing(
    spec: str, network: int, router: int, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Of the released code's 10 and 16 passes a batch, 8 and 10 are needed."""
    model, seen = model_of(), {"network": 0, "router": 0}
    model.train()

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] += len(args[0])

        return hook

    for name in seen:
        getattr(model, name).register_forward_pre_hook(count(name))
    step(build_method(spec), model, images(16), labels(16))
    assert (seen["network"] / 16, seen["router"] / 16) == (network, router)


# ------------------------------------------------------------------------------------------------ who moves


@pytest.mark.parametrize("variant", ["bilevel", "released"])
@pytest.mark.parametrize(
    "spec", [SPEC, "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4), routers=stage)"]
)
def test_each_phase_moves_its_own_and_nothing_else(
    variant: Any, spec: str, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """C9: after the lower level the routers are bit for bit as they were, after the upper level all others are."""
    method = advmoe(variant=variant)
    for phase in method.phases:
        model = model_of(spec)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(Method((phase,)), model, images(16), labels(16))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        routers = {name for name in before if name.startswith(("router.", "routers."))}
        assert moved
        assert moved <= (routers if phase.name == "router" else set(before) - routers)
        assert phase.params == (ROUTERS if phase.name == "router" else EXPERTS)


@pytest.mark.parametrize("method", ["standard", "at", "trades"])
@pytest.mark.parametrize("moves", ["experts", "routers"])
def test_one_part_of_a_model_can_be_hardened_alone(
    method: str, moves: str, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The regimes of a router, or of experts, trained against attack with the other part as it was."""
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attack = "" if method == "standard" else "pgd(linf(0.1), steps=1, keep=last), "
    step(build_method(f"{method}({attack}moves={moves})"), model, images(16), labels(16))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert {name.startswith("router.") for name in moved} == {moves == "routers"}


def test_the_bilevel_router_learns_from_the_classification_loss_and_the_released_one_does_not(
    images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Other weights in the head change the bilevel router's gradient, and leave the released one's alone."""
    x, y = images(16), labels(16)
    for variant, depends in (("bilevel", True), ("released", False)):
        moves = []
        for scale in (1.0, 3.0):
            model = model_of()
            with torch.no_grad():
                model.network.head.weight.mul_(scale)
            step(Method(advmoe(Shift(), variant=variant).phases[1:]), model, x, y)
            moves.append(torch.cat([p.detach().flatten() for p in model.router.parameters()]))
        assert bool((moves[0] != moves[1]).any()) is depends


def test_the_bilevel_router_has_a_batch_of_its_own(images: Callable[..., Tensor]) -> None:
    """Labels of the second batch are 3 throughout, and only the router's loss sees them."""
    seen = []

    @dataclass(frozen=True)
    class Spy(Shift):
        def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            seen.append(y.unique().tolist())
            return super().perturb(model, x, y, noise)

    method, model, x = advmoe(Spy()), model_of(), images(8)
    assert method.two_batches
    noise = Noise.of(torch.arange(8), 1)
    given = MiniBatch(x, torch.full((8,), 3), noise)
    train_step(
        model, method, optimisers(method, model), MiniBatch(x, torch.zeros(8, dtype=torch.long), noise), second=given
    )
    assert seen == [[0], [3]]
    with pytest.raises(ValueError, match="phase 'router' trains on a mini-batch of its own; give train_step second="):
        train_step(model, method, optimisers(method, model), MiniBatch(x, torch.zeros(8, dtype=torch.long), noise))


# ------------------------------------------------------------------------------------------------ targets


def router_targets(spec: str, classes: int = 7, experts: int = 3) -> Tensor:
    """The expert that each class is sent to, read off the router's gradient: alpha * (softmax - onehot) of its bias."""
    model = build_model(f"pathway(resnet8(width=4), experts={experts}, router=linear)", classes, (3, 8, 8))
    nn.init.zeros_(model.router.head.weight), nn.init.zeros_(model.router.head.bias)
    found = []
    for label in range(classes):
        method = Method(build_method(spec).phases[1:])
        fresh = build_model(f"pathway(resnet8(width=4), experts={experts}, router=linear)", classes, (3, 8, 8))
        fresh.load_state_dict(model.state_dict())
        move = [torch.optim.SGD(fresh.router.parameters(), 1.0)]
        x = torch.full((2, 3, 8, 8), 0.5)
        train_step(fresh, method, move, MiniBatch(x, torch.full((2,), label), Noise.of(torch.arange(2), 0)))
        # zero weights: the bias moves by alpha (onehot - 1/E)
        torch.testing.assert_close(fresh.router.head.bias.sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
        assert fresh.router.head.bias.max().item() == pytest.approx(6 * (1 - 1 / experts), rel=1e-4)
        found.append(int(fresh.router.head.bias.argmax()))
    return torch.tensor(found)


def test_the_label_targets() -> None:
    """Residues are y mod E. The random partition is another one, balanced to one class, and the same every time."""
    attack = "pgd(linf(0.1), steps=1, start=near, keep=last)"
    residues = router_targets(f"advmoe({attack}, variant=released)")
    assert residues.tolist() == [0, 1, 2, 0, 1, 2, 0]
    random = router_targets(f"advmoe({attack}, variant=released, target=random)")
    assert sorted(torch.bincount(random, minlength=3).tolist()) == [2, 2, 3]
    assert random.tolist() != residues.tolist()
    assert random.tolist() == router_targets(f"advmoe({attack}, variant=released, target=random)").tolist()


def test_without_a_target_the_router_is_only_kept_steady(
    images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(16), labels(16)
    model = model_of()
    losses = step(advmoe(Shift(), variant="released", target="none"), model, x, y)
    twin = model_of()
    twin.train()
    before, after = twin.router(twin.normalise(x)), twin.router(twin.normalise(Shift()(twin, x, y)))
    assert losses["router"] == pytest.approx(6 * kl(before, after).mean().item(), rel=1e-5)


def test_with_an_oracle_the_experts_never_meet_the_router(
    images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Two routers that decide the opposite train the same experts, each on its own residue class alone."""
    x, y = images(16), labels(16)
    moved = []
    for favourite in (0, 1):
        model = build_model("pathway(resnet8(width=4), experts=2, router=linear)", 4, (3, 8, 8))
        with torch.no_grad():
            model.router.head.bias.copy_(torch.tensor([5.0, -5.0]) * (1 - 2 * favourite))
        attack = build_attack("pgd(linf(0.05), steps=2, start=near, keep=last)")
        method = Method(advmoe(attack, variant="released", oracle=True).phases[:1])
        step(method, model, x, y)
        moved.append({name: p.detach() for name, p in model.named_parameters() if not name.startswith("router")})
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=0, atol=0)
    model = build_model("pathway(resnet8(width=4), experts=2, router=linear)", 4, (3, 8, 8))
    still = model.network.stages[0][0].conv1.experts[1].weight.detach().clone()
    optimiser = [torch.optim.SGD(model.network.parameters(), 0.1)]
    noise = Noise.of(torch.arange(16), 1)
    train_step(model, method, optimiser, MiniBatch(x, torch.zeros(16, dtype=torch.long), noise))  # residue 0 throughout
    assert torch.equal(still, model.network.stages[0][0].conv1.experts[1].weight)


# ------------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize("gap, native_finite", [(50.0, True), (103.0, True), (104.0, False), (1e4, False)])
def test_log_space_kl_is_finite_where_the_native_one_is_not(gap: float, native_finite: bool) -> None:
    """C6: exp(-104) underflows in float32, and 0 log 0 has an infinite derivative. Where both are finite they agree."""
    native = torch.tensor([[gap, 0.0]], requires_grad=True)
    ours = torch.tensor([[gap, 0.0]], requires_grad=True)
    attacked = torch.tensor([[0.0, 1.0]])
    F.kl_div(F.log_softmax(attacked, 1), F.softmax(native, 1), reduction="batchmean").backward()
    kl(ours, attacked).mean().backward()
    assert bool(torch.isfinite(native.grad).all()) is native_finite
    assert torch.isfinite(ours.grad).all()
    if native_finite:
        torch.testing.assert_close(ours.grad, native.grad, rtol=1e-5, atol=1e-6)


def test_a_router_whose_scores_explode_trains_on(
    images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The released router's loss at the released learning rate, 0.1 without warm-up: with the native KL a gradient is
    NaN within 30 steps; ours is finite on the same batches, with gaps as large.
    """
    x, y = 4 * images(32) - 1, labels(32)
    x_adv = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def broken_at(native: bool) -> tuple[int | None, float]:
        torch.manual_seed(0)
        router = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 2))
        move = torch.optim.SGD(router.parameters(), 0.1, 0.9)
        gap = 0.0
        for place in range(30):
            s, t = router(x), router(x_adv)
            own = F.kl_div(F.log_softmax(t, 1), F.softmax(s, 1), reduction="batchmean") if native else kl(s, t).mean()
            move.zero_grad()
            (6 * F.cross_entropy(s, y % 2) + 6 * own).backward()
            gap = max(gap, (s[:, 0] - s[:, 1]).abs().max().item())
            if not all(torch.isfinite(p.grad).all() for p in router.parameters() if p.grad is not None):
                return place, gap
            move.step()
        return None, gap

    assert broken_at(native=True)[0] is not None
    place, gap = broken_at(native=False)
    assert place is None
    assert gap > 104


class BrokenRouter(RoutedModel):
    """Two constant experts; the router's logits are NaN, and argmax takes NaN for expert 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float("nan")))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        routing = tape("router", top_k(self.scale * x.mean((2, 3))[:, None, :2], 1))
        return torch.tensor([[2.0, 0.0], [0.0, 2.0]])[routing.index[:, 0, 0]] + 0 * x.mean((1, 2, 3))[:, None]


def test_a_nan_router_is_never_called_robust(images: Callable[..., Tensor]) -> None:
    """C7: the released evaluation loss on it is NaN, sign(NaN) is 0, the attack stays at its start, and the robust
    accuracy would be 100 %. Ours stops: in the attack that sees the router, in evaluation, and in training.
    """
    x, y = images(8), torch.zeros(8, dtype=torch.long)
    broken = BrokenRouter()
    start = (x + 0.03 * torch.sign(torch.randn_like(x))).clamp(0, 1)
    moving = start.clone().requires_grad_(True)
    out = broken.run(moving)
    loss = F.cross_entropy(out.logits, y) + 6 * F.cross_entropy(out.trace["router"].logits[:, 0], y % 2)
    (gradient,) = torch.autograd.grad(loss, moving)
    assert loss.isnan()
    assert not (gradient.isfinite() & (gradient != 0)).any()  # NaN where the router looks, 0 elsewhere
    # what the released loop makes of it: not one pixel moves, and every image counts as robust
    assert torch.equal(start + 2 / 255 * torch.nan_to_num(gradient).sign(), start)
    assert bool((broken(start).argmax(1) == y).all())

    with pytest.raises(NotFiniteError, match="loss or gradient is not finite"):
        build_attack("pgd(linf(8/255), steps=2, objective=diluted)")(broken, x, y)
    pathway = model_of("pathway(resnet8(width=4), experts=2, router=linear)")
    with torch.no_grad():
        pathway.router.head.weight.fill_(float("nan"))
    assert pathway(x).isnan().all()
    with pytest.raises(UserError, match="not finite"):
        rm.evaluate(pathway, x, y, attacks=["pgd(linf(8/255), steps=2)"])
    for variant in ("bilevel", "released"):
        with pytest.raises(TrainingStopped, match="not finite"):
            step(advmoe(variant=variant), pathway, x, y)


# ------------------------------------------------------------------------------------------------ the diluted attack


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_diluted_objective_by_its_definition(
    loss: Any, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y = model_of().eval(), images(6), labels(6)
    x_adv = (x + 0.05).clamp(0, 1)
    score = Diluted(loss, 2.5)(model, x, y)(x_adv)
    clean, after = model.run(x), model.run(x_adv)
    s, t = clean.trace["router"].logits[:, 0], after.trace["router"].logits[:, 0]
    if loss == "ce":
        expected = F.cross_entropy(after.logits, y, reduction="none") + 2.5 * F.cross_entropy(
            t, y % 2, reduction="none"
        )
    else:
        log = [F.log_softmax(z, 1) for z in (clean.logits, after.logits, s, t)]
        expected = (log[0].exp() * (log[0] - log[1])).sum(1) + 2.5 * (log[2].exp() * (log[2] - log[3])).sum(1)
    torch.testing.assert_close(score.loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(score.fooled, after.logits.argmax(1) != y)


def test_on_a_dense_model_the_diluted_objective_is_the_plain_loss(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y = tiny("dense"), images(6), labels(6)
    torch.testing.assert_close(Diluted()(model, x, y)(x).loss, F.cross_entropy(model(x), y, reduction="none"))


def test_diluted_attacks_are_weaker_where_the_router_owns_the_sign() -> None:
    """C14 in the small, on two pixels: the prediction hangs on the first, the router (a hundred times steeper) on both.
    Plain CE lowers the first pixel; the diluted loss raises it, for the route's sake, and the image survives.
    """

    class TwoPixels(RoutedModel):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            first = x[:, 0, 0, 0]
            push = 100 * (first - 0.4)
            tape("router", top_k(torch.stack([-push, push], 1)[:, None], 1))
            return torch.stack([first - 0.45, torch.zeros_like(first)], 1)

    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    for objective, survives in (("joint", False), ("diluted", True)):
        attack = build_attack(f"pgd(linf(0.1), steps=4, start=clean, keep=last, objective={objective})")
        model = TwoPixels()
        assert bool(model(attack(model, x, y)).argmax(1).eq(0).all()) is survives


def test_a_near_start_is_near_and_its_own_for_every_image(images: Callable[..., Tensor]) -> None:
    """Normal of deviation 0.001 in pixels of the normalised model's images, clipped to ball and box (C8)."""
    model = build_model("resnet8(width=4)", 4, (3, 8, 8), mean=(0.4,) * 3, std=(0.2,) * 3)
    x, y = images(64).clamp(0.1, 0.9), torch.zeros(64, dtype=torch.long)
    attack = build_attack("pgd(linf(8/255), steps=1, step_size=1e-9, start=near, keep=last)")
    moved = attack(model, x, y) - x
    assert moved.std().item() == pytest.approx(1e-3, rel=0.05)
    assert len(moved.flatten(1).unique(dim=0)) == 64
    strong = build_attack("pgd(linf(8/255), steps=4, start=near)")(model, images(64), y)
    assert (strong - images(64)).abs().max() <= 8 / 255 + 1e-6
    assert strong.min() >= 0
    assert strong.max() <= 1


# ------------------------------------------------------------------------------------------------ settings, runs


@pytest.mark.parametrize(
    "spec, message",
    [
        ("advmoe(beta=-1)", "beta must be 0 or more; got -1"),
        ("advmoe(variant=released, alpha=-1)", "alpha must be 0 or more"),
        ("advmoe(router_lr=0)", "router_lr must be above 0; got 0"),
        ("advmoe(shared_attack=True)", "shared_attack belongs to variant=released"),
        ("advmoe(oracle=True)", "oracle belongs to variant=released"),
        ("advmoe(target=random)", "target belongs to variant=released"),
        ("advmoe(variant=released, balance=0.1)", "balance belongs to variant=bilevel"),
        ("advmoe(variant=released, target=none, oracle=True)", "oracle needs a label target"),
        ("advmoe(variant=released, shared_attack=True, router_lr=0.1)", "router_lr must be 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(spec)


def test_a_dense_model_has_no_router_to_train() -> None:
    model = model_of("resnet8(width=4)")
    with pytest.raises(UserError, match=r"phase 'router' moves the parameters that match .*; this model has none"):
        advmoe().phases[1].parameters(model)


ATTACK = "pgd(linf(0.1), steps=1, step_size=0.1, start=near, keep=last)"
RECIPE: dict[str, Any] = {
    "model": "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4), standardise=True)",
    "data": "digits",
    "epochs": 1,
    "batch_size": 128,
    "val_limit": 32,
    "threads": 1,
}


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Two phases, two mini-batches a step, two learning rates."""
    recipe = {**RECIPE, "method": f"advmoe({ATTACK}, router_lr=0.5)"}
    train(Recipe(**recipe, max_steps=4), tmp_path / "whole")
    train(Recipe(**recipe, max_steps=2), tmp_path / "parts")
    train(Recipe(**recipe, max_steps=4), tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    (line, *_) = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert set(line["loss"]) == {"experts", "router"}
    assert line["lr"]["router"] == pytest.approx(0.5 * line["lr"]["experts"])


def test_forcing_an_expert_still_works_after_training(
    images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The trained model's own route forced upon it changes nothing; another one does."""
    model, x = model_of(), images(16)
    step(build_method(f"advmoe({ATTACK})"), model, x, labels(16))
    model.eval()
    free = model.run(x)
    assert torch.equal(model.run(x, forced=free.trace).logits, free.logits)
    every = [model.run(x, forced=to_expert(free.trace, k)).logits for k in range(2)]
    assert not torch.allclose(every[0], every[1])
