"""`wrap`: anybody's model as a routed one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.errors import UserError, nearest
from robustmoe.models.base import RoutedModel
from robustmoe.models.plain import as_routed, unwrapped
from robustmoe.routing import Routing
from robustmoe.wrapping.codecs import FunctionsCodec
from robustmoe.wrapping.finding import as_example, find_routers
from robustmoe.wrapping.model import Pick, WrappedModel
from robustmoe.wrapping.passes import Site
from robustmoe.wrapping.said import Codec, Said
from robustmoe.wrapping.testing import tested

Router = Codec | str | tuple[Callable[[Said], Routing], Callable[[Said, Routing], Any]]
"""What a user says of a router: a codec, its text ("triple(index=2)"), or the two functions of one."""

DRAWS = 8
"""Passes that noise="average" takes the mean of."""


def wrap(
    model: nn.Module,
    routers: Mapping[str, Router] | None = None,
    *,
    example: Any = None,
    output: Pick = None,
    noise: Literal["free", "replay", "average"] = "free",
) -> RoutedModel:
    """Makes a `RoutedModel` of any nn.Module that classifies images, without changing it: its routers' decisions are
    recorded and replayed, so every attack, check and measurement of this project sees them.

    ``routers``: a codec for each module that decides, by its path (``rm.gate``; see `robustmoe.wrapping.codecs`); None:
    the best guess of `find_routers`, or, without an example, modules of classes that are known by name. ``example``: a
    few images (n, ch, h, w) in [0, 1], 2 at least: the wrapped model is tested on the first 4 of them. ``output``: how
    the logits (n, c) are picked from what the model gives: a function, a name, or a place. ``noise``: of a model that
    draws random numbers in eval mode: "free", they are drawn as ever; "replay", each draw is the same in every pass and
    for every image; "average", the mean of 8 such passes, each with routers of its own in the trace.

    The weights are the model's own, and are never written. Hooks are on the model during a pass only. The tests refuse
    (UserError, naming the router) what would make numbers wrong: an answer that changes by being watched, a decision
    that cannot be replayed to 1e-6, a forced route that other experts still have a say in. What limits is a note, in
    ``notes`` and the repr: random numbers, an answer that depends on the batch, parts without gradient. What
    torch.compile, DataParallel or DistributedDataParallel made is wrapped as it was before. A model that is routed
    already, or holds one that is, comes back as `as_routed` has it.
    """
    bare = unwrapped(model)
    if not isinstance(bare, nn.Module):
        raise UserError(f"only an nn.Module can be wrapped; got a {type(model).__name__}")
    if any(isinstance(module, RoutedModel) for module in bare.modules()):
        return as_routed(model)
    model, example = bare, None if example is None else as_example(example)
    sites, unread = chosen_sites(model, routers, example)
    draws = {"free": 0, "replay": 1, "average": DRAWS}[noise]
    if example is None:
        note = "not tested: no example was given"
        return WrappedModel(model, sites, output, draws=draws, notes=(note,))
    done = tested(model, sites, example, output, noise)
    return WrappedModel(model, done.sites, output, done.climbs, draws, (*unread, *done.notes))


def chosen_sites(
    model: nn.Module, routers: Mapping[str, Router] | None, example: Tensor | None
) -> tuple[list[Site], list[str]]:
    """The places that the user named, or the guessed ones, and what no codec reads. UserError where none is known."""
    if routers is not None:
        return sites_of(model, routers), []
    if example is None:
        known = {path: codec for path, module in model.named_modules() if (codec := known_class(module)) is not None}
        if not known:
            raise UserError(
                "no module has a router's class that is known by name; give an example (a few images), or routers="
            )
        return sites_of(model, known), []
    findings = find_routers(model, example)
    if not findings:
        seen = "; ".join(findings.unread) or "no router was found in this model"
        raise UserError(f"{seen}; name them (routers={{path: codec}}), or evaluate it as it is, if it is dense")
    return sites_of(model, findings.routers), findings.unread


KNOWN = {
    r"\w*TopKRouter": "triple",
    "TopNGating|Top2Gating": "dispatch",
    "SoftMoE": "slots",
    "MoEGate": "pair",
}
"""Classes of routers, and the codec for them: transformers 5, st-moe-pytorch, mixture-of-experts, soft-moe-pytorch,
DeepSeek and DiT-MoE.
"""


def known_class(module: nn.Module) -> str | None:
    """The codec for a router whose class is known by name."""
    name = type(module).__name__
    return next((codec for pattern, codec in KNOWN.items() if re.fullmatch(pattern, name)), None)


def sites_of(model: nn.Module, routers: Mapping[str, Router]) -> list[Site]:
    """The places that a user named. UserError for a path that the model does not have, or what is no codec."""
    paths = dict(model.named_modules())
    sites = []
    for path, given in routers.items():
        if path not in paths:
            raise UserError(f"the model has no module {path!r}; {nearest(path, paths)}")
        codec = codec_of(path, given)
        if isinstance(codec.logits, str) and codec.logits not in paths:
            raise UserError(f"logits={codec.logits!r} of router {path!r} is no module; {nearest(codec.logits, paths)}")
        sites.append(Site(path, codec))
    return sites


def codec_of(path: str, given: Any) -> Codec:
    """What a user said of the router at ``path``, as a codec."""
    if isinstance(given, Codec):
        return given
    if isinstance(given, str):
        codec: Codec = specs.build(given, "codec")
        return codec
    if isinstance(given, Sequence) and len(given) == 2 and all(callable(part) for part in given):
        return FunctionsCodec(*given)
    raise UserError(
        f"router {path!r} has a {type(given).__name__}; expected a codec such as rm.gate.triple(), its text, or a pair "
        "of functions (read, write)"
    )
