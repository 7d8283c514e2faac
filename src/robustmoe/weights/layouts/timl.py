"""TIML-Group/Robust-MoE-Dual-Model: the released code of RT-ER and JTDMoE, ensembles of whole networks and dual models
of two of these.
"""

from __future__ import annotations

from torch import nn

from robustmoe.models.dual import DualModel
from robustmoe.models.ensemble import EnsembleModel
from robustmoe.models.resnet import ResNetNetwork
from robustmoe.models.small import LinearNetwork, RescaledNetwork
from robustmoe.models.vit import ViTNetwork
from robustmoe.weights.layouts.names import KUANGLIU, paired
from robustmoe.weights.pairs import Counterpart, Layout, same


def pairs(model: nn.Module) -> list[Counterpart]:
    """Those of an ensemble with a linear router, or of a dual model of two such."""
    if isinstance(model, EnsembleModel):
        return of_ensemble(model, "", "")
    if isinstance(model, DualModel) and model.mixer is None:
        halves = [of_ensemble(model.standard, "standard.", "Smoe."), of_ensemble(model.robust, "robust.", "Rmoe.")]
        return [pair for half in halves for pair in half] if all(halves) else []
    return []


def of_ensemble(model: nn.Module, ours: str, theirs: str) -> list[Counterpart]:
    if not isinstance(model, EnsembleModel) or not isinstance(model.router, LinearNetwork):
        return []
    out = [same(f"{theirs}router.gate.{leaf}", f"{ours}router.head.{leaf}") for leaf in ("weight", "bias")]
    for number, expert in enumerate(model.experts):
        here, there = f"{ours}experts.{number}.", f"{theirs}experts.{number}."
        inner = expert.inner if isinstance(expert, RescaledNetwork) else expert
        here += "inner." if inner is not expert else ""
        if isinstance(inner, ResNetNetwork) and inner.begins == "cifar" and len(inner.stages) == 4:
            out += paired(inner, here, f"{there}net.", KUANGLIU)
        elif isinstance(inner, ViTNetwork):
            out += [same(f"{there}vit.{name}", f"{here}{name}") for name in inner.state_dict()]
        else:
            return []
    return out


TIML = Layout(
    "the released code of RT-ER and JTDMoE (its .t7 files): MOE_Resnet18, MOE_ViT, Dual_Model_resnet18, Dual_Model_vit",
    "github.com/TIML-Group/Robust-MoE-Dual-Model at 30ef94d",
    pairs,
)
