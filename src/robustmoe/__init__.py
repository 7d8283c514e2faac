"""How robust a Mixture-of-Experts vision model really is: train, attack, certify and report, the router included.

The imports below are the public names. Type checkers and editors read them; a running program imports each when it is
first used, so that ``robustmoe --help`` needs no torch.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustmoe.attacks import attack_view as attack_view
    from robustmoe.attacks import build_attack as build_attack
    from robustmoe.certification import build_certifier as build_certifier
    from robustmoe.data import as_data as as_data
    from robustmoe.errors import UserError as UserError
    from robustmoe.evaluation import audit as audit
    from robustmoe.evaluation import blend as blend
    from robustmoe.evaluation import blend_run as blend_run
    from robustmoe.evaluation import certify as certify
    from robustmoe.evaluation import certify_run as certify_run
    from robustmoe.evaluation import dissect as dissect
    from robustmoe.evaluation import dissect_run as dissect_run
    from robustmoe.evaluation import evaluate as evaluate
    from robustmoe.evaluation import evaluate_run as evaluate_run
    from robustmoe.evaluation import lipschitz_run as lipschitz_run
    from robustmoe.evaluation import measure_lipschitz as measure_lipschitz
    from robustmoe.evaluation import sweep as sweep
    from robustmoe.evaluation import sweep_run as sweep_run
    from robustmoe.forecasting import forecast as forecast
    from robustmoe.hub import pull as pull
    from robustmoe.interop import as_art as as_art
    from robustmoe.interop import as_foolbox as as_foolbox
    from robustmoe.interop import benchmark as benchmark
    from robustmoe.models import Output as Output
    from robustmoe.models import RoutedModel as RoutedModel
    from robustmoe.models import build_model as build_model
    from robustmoe.models import moefy as moefy
    from robustmoe.recipe import Recipe as Recipe
    from robustmoe.recipe import load_recipe as load_recipe
    from robustmoe.reporting import report as report
    from robustmoe.reporting.comparison import compare as compare
    from robustmoe.reporting.frame import frame as frame
    from robustmoe.routing import Routing as Routing
    from robustmoe.routing import Tape as Tape
    from robustmoe.routing import Trace as Trace
    from robustmoe.training import build_method as build_method
    from robustmoe.training import load_model as load_model
    from robustmoe.training import train as train
    from robustmoe.weights import export_run as export_run
    from robustmoe.weights import import_run as import_run
    from robustmoe.weights import load_weights as load_weights
    from robustmoe.wrapping import find_routers as find_routers
    from robustmoe.wrapping import gate as gate
    from robustmoe.wrapping import wrap as wrap
    from robustmoe.zoo import zoo_model as zoo_model


def _homes() -> dict[str, str]:
    """The public names, and the module that each is in, as the imports above say: from the text of this very file."""
    block = next(
        node for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body if isinstance(node, ast.If)
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # else a misspelt name would be "any" to a type checker

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'robustmoe' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
