"""`find_routers` and `wrap` on routed layers of real packages, with nothing else given."""

from __future__ import annotations

import copy
import importlib.util
from typing import Literal

import pytest
import torch
from torch import nn

import robustmoe as rm
from robustmoe.routing import detach, to_expert
from robustmoe.wrapping import WrappedModel
from robustmoe.wrapping.codecs import text_of
from robustmoe.wrapping.testing import disturbed, experts_of
from wild_models import MISSING, WILD, Wild, example, needed, quiet  # noqa: F401 (quiet is a fixture)

pytestmark = pytest.mark.wild

needed()


@pytest.fixture(params=sorted(WILD))
def wild(request: pytest.FixtureRequest) -> Wild:
    if "timm" in request.param and importlib.util.find_spec("timm") is None:
        pytest.skip(MISSING)
    return WILD[request.param]


def spoiled(model: nn.Module, experts: int) -> nn.Module:
    """A copy in which all experts but the last, where they are stacked in one tensor, have other weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim >= 3 and len(parameter) == experts:
                parameter[:-1] += 1
    return twin


def test_it_is_found_wrapped_replayed_forced_and_left_as_it_was(wild: Wild) -> None:
    model, x = wild.make().eval(), example()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    findings = rm.find_routers(model, x)
    assert list(findings.routers) == [wild.path]
    assert max(map(len, str(findings).splitlines())) <= 80
    assert bool(findings.draws) == wild.random
    noise: Literal["free", "replay"] = "replay" if wild.random else "free"
    routed = rm.wrap(model, example=x, noise=noise)
    assert isinstance(routed, WrappedModel)
    assert [(site.path, text_of(site.codec)) for site in routed.sites] == [(wild.path, wild.codec)]
    with torch.no_grad():
        free = routed.run(x)
        routing = free.trace[wild.path]
        items = routing.index.shape[1]
        assert routing.logits.shape == (6, items, wild.experts)
        assert routing.index.shape == routing.weight.shape == (6, items, wild.k)
        scale = float(free.logits.abs().max())
        replay = float((routed.run(x, forced=detach(free.trace)).logits - free.logits).abs().max())
        assert replay <= 1e-6 * scale
        forced = [to_expert(free.trace, expert) for expert in range(wild.experts)]
        answers = [routed.run(x, forced=trace).logits for trace in forced]
        assert float((answers[0] - answers[-1]).abs().max()) > 1e-3 * scale
        for experts in experts_of(model, wild.path, wild.experts):
            with disturbed(experts[:-1]):
                off = float((routed.run(x, forced=forced[-1]).logits - answers[-1]).abs().max())
            assert off <= 1e-6 * scale
        others = rm.wrap(
            spoiled(model, wild.experts), {wild.path: wild.codec}, noise="replay" if wild.random else "free"
        )
        torch.testing.assert_close(others.run(x, forced=forced[-1]).logits, answers[-1], rtol=0, atol=1e-6 * scale)
        alone = routed.run(x[2:3], forced={wild.path: forced[1][wild.path][2:3]}).logits
        torch.testing.assert_close(alone, answers[1][2:3], rtol=1e-4, atol=1e-5 * scale)
    at = x.clone().requires_grad_(True)
    slope = torch.autograd.grad(routed.run(at).trace[wild.path].logits.square().sum(), at)[0]
    assert float(slope.abs().amax((1, 2, 3)).min()) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unwatched_and_watched_it_answers_the_same_to_the_bit(wild: Wild) -> None:
    model, x = wild.make().eval(), example()
    routed = rm.wrap(model, example=x)
    torch.manual_seed(2)
    bare = model(x)
    torch.manual_seed(2)
    assert torch.equal(routed.run(x).logits, bare)


def test_the_weights_of_a_forced_index_are_the_routers_own() -> None:
    """By the package's own code: at the index that the router itself chooses they are its weights."""
    for name in ("st-moe-pytorch", "mixture-of-experts", "qwen3_vl_moe", "glm4v_moe", "aria", "deepseek_v3", "gpt_oss"):
        wild, x = WILD[name], example()
        routed = rm.wrap(wild.make().eval(), example=x, noise="replay" if wild.random else "free")
        assert isinstance(routed, WrappedModel)
        own = routed.run(x).trace
        again = routed.run(x, forced=detach(own), gates="own").trace[wild.path]
        kept = own[wild.path].weight != 0
        torch.testing.assert_close(again.weight[kept], own[wild.path].weight[kept], msg=name)
        at = x.flip(0).requires_grad_(True)
        moved = routed.run(at, forced=detach(own), gates="own").trace[wild.path]
        assert torch.equal(moved.index, own[wild.path].index), name
        assert float(torch.autograd.grad(moved.weight[..., 0].sum(), at)[0].abs().max()) > 0, name


def test_random_gates_are_named() -> None:
    for name in ("st-moe-pytorch", "mixture-of-experts"):
        routed = rm.wrap(WILD[name].make().eval(), example=example())
        assert isinstance(routed, WrappedModel)
        assert "module 'moe.gate' (Top" in routed.notes[0]
        assert "draws random numbers in eval mode (uniform_)" in routed.notes[0]
