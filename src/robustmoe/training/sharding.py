"""Models that are spread over the processes of a run (a recipe's ``sharding``), by torch's FSDP2, device mesh, DTensor.

"full": every process holds its share of each weight, gradient and optimiser state, and a unit's weights are whole only
while it runs: a block of a vision transformer, any other model at once (Zhao et al. 2023, PyTorch FSDP). "experts": the
experts of token-routed layers are shared out, and tokens travel to them and back (expert parallelism, Lepikhin et al.
2021, GShard); all else each process holds whole. The result is that of one process.

Each pass is a meeting of all processes, so all make the same passes: what depends on a process's own images, such as an
attack that stops early, is refused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe import distributed
from robustmoe.attacks import FGSM, PGD, Attack
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.models.plain import sharded
from robustmoe.models.spread import spread_experts
from robustmoe.models.tokens import TokenExperts
from robustmoe.models.vit import ViTNetwork
from robustmoe.recipe import Recipe
from robustmoe.routing import Tape
from robustmoe.training.certified import CertifiedLoss
from robustmoe.training.phases import Method


def check(recipe: Recipe, method: Method, val_attack: Attack | None, in_python: bool) -> None:
    """UserError where a run of several processes cannot be sharded as its recipe says."""
    if recipe.sharding == "none":
        return
    said = f"sharding={recipe.sharding}"
    if in_python:
        raise UserError(f"{said}: a model in Python stays whole where it is; expected a model by its spec")
    if recipe.val_certifier is not None:
        raise UserError(
            f"{said}: certificates need the whole model; expected val_certifier=none, and certify afterwards"
        )
    if recipe.precision == "fp16":
        raise UserError(f"{said}: fp16's loss scale is for whole models; expected precision=bf16, or fp32")
    if distributed.world() == 1:
        return
    if recipe.recalibrate == "attacked":
        raise UserError(f"{said}: recalibrate=attacked needs a copy of the model; expected clean, or none")
    losses = [loss for phase in method.phases for loss in (phase.loss, getattr(phase.loss, "own", None))]
    if recipe.sharding == "full" and any(isinstance(loss, CertifiedLoss) for loss in losses):
        raise UserError(
            f"{said}: certified training reads weights outside of the model's passes; expected sharding=none"
        )
    for attack in (method.attack, val_attack, *(getattr(loss, "attack", None) for loss in losses)):
        if isinstance(attack, Attack) and not _in_step(attack):
            raise UserError(
                f"{said}: {type(attack).__name__} makes as many passes as its images need, and all processes have to "
                "make the same; expected fgsm, or pgd with restarts=1 and keep=best or last (any attack in evaluate)"
            )


def _in_step(attack: Attack) -> bool:
    """Whether the number of the attack's passes is that of its steps, whatever the images."""
    return isinstance(attack, FGSM) or (isinstance(attack, PGD) and attack.restarts == 1 and attack.keep != "first")


def placed(model: RoutedModel, how: str, device: torch.device) -> RoutedModel:
    """The model on its device, shared out among the processes where there are several; the same module.

    Weights go to the device a unit at a time, so that the whole model need not fit there. Raises UserError where
    ``how`` is "experts" and the model has none to share.
    """
    if how == "none" or distributed.world() == 1:
        return model.to(device)
    _equal(model, device)
    if how == "full":
        _fully(model, device)
    else:
        _experts(model, device)
    return model.to(device)


def _equal(model: nn.Module, device: torch.device) -> None:
    """Every process has the first one's weights."""
    for value in model.state_dict().values():
        there = value.to(device)
        distributed.broadcast([there])
        value.copy_(there)


def _fully(model: RoutedModel, device: torch.device) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # channels-last ones it does not take
    mesh = distributed.mesh(device, (distributed.world(),), ("data",))
    network = getattr(model, "network", None)
    blocks = list(network.blocks) if isinstance(network, ViTNetwork) else []
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    # It warns of outputs that are views, which nobody here changes in place, in every pass.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    register_fsdp_forward_method(model, "run")
    register_fsdp_forward_method(model, "ask")
    units = {name: unit for name, unit in model.named_modules() if isinstance(unit, FSDPModule)}
    object.__setattr__(model, "ask", functools.partial(_asked, model.ask, units))


def _asked(ask: Any, units: Mapping[str, Any], x: Tensor, tape: Tape) -> Tensor:
    """`RoutedModel.ask`. FSDP makes a unit's weights whole where a gradient comes to the unit's end; it may begin at a
    decision inside, too.
    """
    logits: Tensor = ask(x, tape)
    for name, routing in tape.trace.items():
        inside = [unit for path, unit in units.items() if f"{name}.".startswith(f"{path}." if path else "")]
        for value in (routing.logits, routing.weight, routing.noisy, routing.slots):
            if value is not None and value.requires_grad:
                value.register_hook(functools.partial(_whole, inside))
    return logits


def _whole(units: Iterable[Any], gradient: Tensor) -> None:
    for unit in units:
        unit.unshard()


def apart(model: nn.Module) -> None:
    """Lets go of weights that are still whole, before they are written over."""
    if sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _experts(model: RoutedModel, device: torch.device) -> None:
    layers = [module for module in model.modules() if isinstance(module, TokenExperts)]
    world = distributed.world()
    if not layers:
        raise UserError(
            "sharding=experts: the model has no experts of tokens (vit_moe has); expected sharding=full, which shares "
            "the weights of any model"
        )
    holders = math.gcd(world, *(layer.num for layer in layers))
    if holders == 1:
        numbers = sorted({layer.num for layer in layers})
        raise UserError(
            f"sharding=experts: {' and '.join(map(str, numbers))} experts cannot be shared out evenly by {world} "
            "processes or a part of them; expected numbers with a common divisor, or sharding=full"
        )
    mesh = distributed.mesh(device, (world // holders, holders), ("data", "expert"))
    for layer in layers:
        spread_experts(layer, mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as one process has it; of a model that is spread on the CPU, on the first process, {} on the
    others.
    """
    state: dict[str, Tensor] = model.state_dict()
    if not any(map(distributed.is_spread, state.values())):
        return state
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return whole


def held_bytes(model: nn.Module, optimisers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of weights and of optimiser state that this process holds between two passes."""
    states = (value for optimiser in optimisers for own in optimiser.state.values() for value in own.values())
    held = itertools.chain(model.parameters(), (value for value in states if isinstance(value, Tensor)))
    return sum(distributed.own_part(value).nbytes for value in held)


@contextlib.contextmanager
def explained(how: str) -> Iterator[None]:
    """One line of what a method asks of a model that is not whole, in the place of torch's error."""
    try:
        yield
    except RuntimeError as error:
        if how == "none" or not any(word in str(error) for word in ("setStorage", "DTensor")):
            raise
        raise UserError(
            f"sharding={how}: this method reads weights outside of the model's passes, or takes gradients of "
            "gradients; expected another method, or sharding=none"
        ) from error
