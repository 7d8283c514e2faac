"""`wrap`: anybody's model as a routed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.errors import UserError, nearest
from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing
from robustmoe.wrapping.codecs import FunctionsCodec
from robustmoe.wrapping.model import Pick, WrappedModel
from robustmoe.wrapping.passes import Site
from robustmoe.wrapping.said import Codec, Said

Router = Codec | str | tuple[Callable[[Said], Routing], Callable[[Said, Routing], Any]]
"""What a user says of a router: a codec, its text ("triple(index=2)"), or the two functions of one."""

DRAWS = 8
"""Passes that noise="average" takes the mean of."""


def wrap(
    model: nn.Module,
    routers: Mapping[str, Router] | None = None,
    *,
    example: Tensor | None = None,
    output: Pick = None,
    noise: Literal["free", "replay", "average"] = "free",
) -> RoutedModel:
    """Makes a `RoutedModel` of any nn.Module that classifies images, without changing it: its routers' decisions are
    recorded and replayed, so every attack, check and measurement of this project sees them.

    ``routers``: a codec for each module that decides, by its path (`rm.gate`; see `robustmoe.wrapping.codecs`).
    """
    sites = sites_of(model, routers or {})
    draws = {"free": 0, "replay": 1, "average": DRAWS}[noise]
    return WrappedModel(model, sites, output, draws=draws)


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
