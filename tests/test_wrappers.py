"""A routed model inside something else: its routers are seen, forced and attacked; and gradients in inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import robustmoe as rm
from faulty_models import Mix, Pair
from planted import HiddenTop1
from planted import images as planted_images
from robustmoe.attacks import PGD, linf, router_only
from robustmoe.attacks.routes import RouteFlip
from robustmoe.models import Plain, as_routed
from robustmoe.routing import detach, to_expert

Make = Callable[[nn.Module], Any]


class Behind(nn.Module):
    """A module that has the model as an attribute, normalises the image and gives a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner((x - 0.25) / 0.5)}


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.25) / 0.5


class Method:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


eager = functools.partial(torch.compile, backend="eager")

SAME: dict[str, Make] = {
    "Sequential": nn.Sequential,
    "DataParallel": nn.DataParallel,
    "compile": eager,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compile of a Sequential": lambda model: eager(nn.Sequential(model)),
    "DataParallel of a compile": lambda model: nn.DataParallel(eager(model)),
}
"""Wrappers that change nothing: the model itself comes out."""

BEHIND: dict[str, Make] = {
    "preprocessing": lambda model: nn.Sequential(Centre(), model),
    "preprocessing, compiled inside": lambda model: nn.Sequential(Centre(), eager(model)),
    "preprocessing, compiled": lambda model: eager(nn.Sequential(Centre(), model)),
    "postprocessing": lambda model: nn.Sequential(model, nn.Softplus()),
    "a dict, picked": lambda model: _picking(Behind(model)),
    "lambda": lambda model: lambda x: model(x),
    "partial": lambda model: functools.partial(lambda net, x: net(x), model),
    "method": lambda model: Method(model).predict,
    "run": lambda model: lambda x: model.run(x).logits,
    "a hook": lambda model: _hooked(model),
}
"""What changes the images or the logits, or cannot be looked into."""


def _picking(outer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: outer(x)["logits"]


def _hooked(model: nn.Module) -> nn.Module:
    outer = nn.Sequential(model)
    outer.register_forward_hook(lambda module, args, output: 2 * output)
    return outer


def pictures(n: int = 8) -> Tensor:
    return 0.2 + 0.25 * torch.rand(n, 1, 1, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SAME)
def test_a_wrapper_that_changes_nothing_is_taken_off(name: str) -> None:
    model = Pair("vmoe").eval()
    wrapper = SAME[name](model)
    assert as_routed(wrapper) is (wrapper.module if name == "averaged" else model)  # an average is of a copy


@pytest.mark.parametrize("name", BEHIND)
def test_the_routers_behind_anything_are_told_forced_and_climbed(name: str) -> None:
    """The outer function's own output, to the bit; a forced route changes it as it changes the model's."""
    x, inner = pictures(), Pair("hard", slope=4.0).eval()
    outer = BEHIND[name](inner)
    model = as_routed(outer).eval()
    assert isinstance(model, Plain)
    output = model.run(x)
    assert list(output.trace) == ["router"]
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(output.logits, outer(x))
    assert torch.equal(model.run(x, forced=detach(output.trace)).logits, output.logits)
    other = model.run(x, forced=to_expert(detach(output.trace), 1)).logits
    assert not torch.equal(other, output.logits)
    first = output.logits.argmax(1)
    x_adv = PGD(linf(0.4), steps=10, objective=router_only())(outer, x, first)
    assert (model.route(x_adv)["router"].index != output.trace["router"].index).any()


def test_two_models_and_two_calls_each_have_their_routers() -> None:
    x, first, second = pictures(), Pair("hard").eval(), Pair("vmoe").eval()
    model = as_routed(lambda x: first(x) + second(x) + first(x.flip(3)))
    trace = model.run(x).trace
    assert list(trace) == ["router", "call2.router", "call3.router"]
    assert torch.equal(trace["call2.router"].weight, second.run(x).trace["router"].weight)
    assert torch.equal(trace["call3.router"].logits, first.run(x.flip(3)).trace["router"].logits)
    with pytest.raises(ValueError, match="call9"):
        model.run(x, forced={"call9.router": trace["router"]})


def test_a_model_asked_of_other_images_keeps_its_routes_to_itself() -> None:
    """Two views of each image in one batch: a route of such a batch is none of the image's."""
    x, inner = pictures(), Pair("hard").eval()
    model = as_routed(lambda x: inner(torch.cat([x, x.flip(3)]))[: len(x)])
    assert model.run(x).trace == {}


def test_a_route_that_the_function_forces_is_not_a_router() -> None:
    x, inner = pictures(), Pair("hard").eval()
    held = detach(inner.run(x).trace)
    assert as_routed(lambda x: inner.run(x, forced=held).logits).run(x).trace == {}


def test_the_layers_of_the_one_model_inside(tiny: Callable[..., rm.RoutedModel]) -> None:
    inner = tiny("vit_moe")
    outer = as_routed(nn.Sequential(nn.Identity(), inner))
    assert list(outer.layers()) == list(inner.layers()) != []
    assert as_routed(lambda x: inner(x)).layers() == {}


@pytest.mark.parametrize("name", ["Sequential", "DataParallel", "compile", "preprocessing", "lambda", "a dict, picked"])
def test_evaluate_attacks_the_routers(name: str) -> None:
    """Case 04: at p < 1/2 the hard gate takes expert 0, at p > 1/2 expert 1, which says the opposite."""
    make = {**SAME, **BEHIND}[name]
    inner = Pair("hard").eval()
    x = pictures()
    x[:, 0, 0, 1] = 0.3
    model = make(inner)
    y = as_routed(model).run(x).logits.argmax(1)
    records = rm.evaluate(model, x, y, attacks=("pgd(linf(0.35), steps=5)", "route_flip(linf(0.35), steps=10)"))
    joint, flip = records.summary()
    assert joint.robust is not None
    assert flip.robust is not None
    assert flip.router_attacked is True
    assert flip.robust.value < 0.2
    assert "router" in records[0].header.routers


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel_is_taken_off(tiny: Callable[..., rm.RoutedModel]) -> None:
    inner = tiny("ensemble_k2")
    assert as_routed(nn.parallel.DistributedDataParallel(inner)) is inner


@pytest.mark.usefixtures("alone")
def test_sharded_weights_are_gathered_and_the_routers_told() -> None:
    from torch.distributed.fsdp import fully_shard

    inner, x = Mix("hard"), torch.rand(4, 1, 4, 4)
    expected = inner.run(x)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = as_routed(fully_shard(inner, mesh=mesh))
    assert isinstance(model, Plain)
    output = model.run(x)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.trace["router"].index, expected.trace["router"].index)


@pytest.mark.usefixtures("alone")
def test_sharded_weights_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has images of its own, and a process that gathers waits for the others for ever."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Mix("hard"), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    monkeypatch.setattr("robustmoe.distributed.world", lambda: 2)
    with pytest.raises(rm.UserError, match="sharded over processes"):
        rm.evaluate(nn.Sequential(nn.Identity(), model), torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long))


def test_a_wrapped_foreign_model_behind_anything_tells_its_routes() -> None:
    """A hidden top-1 keeps 100 % under PGD; wrapped, and behind a preprocessing, its router is attacked, to 0 %."""
    x, y = planted_images()
    wrapped = rm.wrap(HiddenTop1().eval(), example=x)
    (router,) = as_routed(wrapped).run(x).trace
    behind = as_routed(nn.Sequential(nn.Identity(), wrapped))
    output = behind.run(x)
    assert list(output.trace) == [router]
    assert not (behind.run(x, forced=to_expert(detach(output.trace), 1)).logits.argmax(1) == y).any()
    routes = "pgd(linf(8/255), steps=20, objective=router_only)"
    plain, routed = rm.evaluate(
        nn.Sequential(nn.Identity(), wrapped), x, y, attacks=("pgd(linf(8/255), steps=20)", routes)
    ).summary()
    assert (plain.robust.value, routed.robust.value) == (1.0, 0.0)
    assert routed.failed == ()


# ------------------------------------------------------------------------------------------------ inference mode

INSIDE = [
    "pgd(linf(0.3))",
    "fgsm(linf(0.3))",
    "apgd(linf(0.3), steps=10)",
    "apgd_t(linf(0.3), steps=10)",
    "fab(linf(0.3), steps=5)",
]


@pytest.mark.parametrize("text", [*INSIDE, "fmn(linf(0.3))"])
def test_an_attack_climbs_inside_inference_mode(text: str) -> None:
    """Case 02 (Lightning's test loop): the same attacked images as outside, of images made inside or outside."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).eval()
    x = torch.rand(4, 1, 4, 4)
    y = net(x).argmax(1)
    attack = rm.build_attack(text)
    outside = attack(net, x, y)
    with torch.inference_mode():
        again, inside = attack(net, x, y), attack(net, x.clone(), y)
    assert not torch.equal(outside, x)
    assert torch.equal(again, outside)
    assert torch.equal(inside, outside)


def test_distances_and_flips_inside_inference_mode() -> None:
    x, model = pictures(), Pair("hard").eval()
    y = model(x).argmax(1)
    flips = RouteFlip(linf(0.4)).flips(model, x, y)["router"]
    distances = rm.build_attack("fmn(linf(0.4))").distances(model, x, y)  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert torch.equal(RouteFlip(linf(0.4)).flips(model, x.clone(), y)["router"].broken, flips.broken)
        inside = rm.build_attack("fmn(linf(0.4))").distances(model, x.clone(), y)  # type: ignore[attr-defined]
    assert torch.equal(inside, distances)


def test_an_evaluation_inside_inference_mode_is_the_same() -> None:
    x, model = pictures(), Pair("vmoe").eval()
    y = model(x).argmax(1)
    (outside,) = rm.evaluate(model, x, y, attacks="pgd(linf(0.3), steps=5)")
    with torch.inference_mode():
        (inside,) = rm.evaluate(model, x.clone(), y.clone(), attacks="pgd(linf(0.3), steps=5)")
    assert inside.rows == outside.rows
    assert [check.status for check in inside.checks.checks] == [check.status for check in outside.checks.checks]


def test_weights_made_inside_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Flatten(), nn.Linear(2, 4))
    with pytest.raises(rm.UserError, match="weights were made inside"):
        rm.build_attack("fgsm(linf(0.1))")(net, pictures(), torch.zeros(8, dtype=torch.long))
