"""Attack a set of images and write one row an image: what the exact model says, before and after, and through which
routes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from robustmoe.analysis import inside
from robustmoe.attacks import Attack, NotFiniteError, Threat, size
from robustmoe.attacks.base import looked_at
from robustmoe.attacks.objectives import some_routes
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.norm import answers
from robustmoe.noise import Noise
from robustmoe.records import Example, Row
from robustmoe.routing import Routing, Trace, rerouted


class Attacked(NamedTuple):
    """A batch, the attacked images, and the exact model's passes on both."""

    batch: Batch
    x_adv: Tensor
    clean: Output
    attacked: Output

    @property
    def broken(self) -> Tensor:
        """(n,) bool: the exact model is wrong on the attacked image."""
        return torch.tensor(predictions(self.attacked), device=self.batch.y.device) != self.batch.y

    def select(self, rows: Tensor) -> Attacked:
        """Returns the images where ``rows`` (n,) is true."""
        return Attacked(self.batch[rows], self.x_adv[rows], _select(self.clean, rows), _select(self.attacked, rows))

    def unattacked(self) -> Attacked:
        """Returns the same images, not attacked."""
        return Attacked(self.batch, self.batch.x, self.clean, self.clean)


def _select(output: Output, rows: Tensor) -> Output:
    return Output(output.logits[rows], some_routes(output.trace, rows))


@torch.no_grad()
def clean_forward(model: RoutedModel, batch: Batch) -> Attacked:
    """Returns the exact model's answers to clean images, nothing attacked."""
    clean = model.run(batch.x)
    return Attacked(batch, batch.x, clean, clean)


def attack_batch(
    model: RoutedModel, attack: Attack, batch: Batch, noise: Noise, climbed: RoutedModel | None = None
) -> Attacked:
    """Run the attack on ``climbed`` (a `Surrogate` of ``model``; by default the model itself), then ask the exact model
    again, in the clean images' own precision. ``noise``, and UserError: see `attacked_images`.
    """
    x_adv = attacked_images(model if climbed is None else climbed, attack, batch, noise)
    with torch.no_grad():
        return Attacked(batch, x_adv, model.run(batch.x), model.run(x_adv))


def attacked_images(model: RoutedModel, attack: Attack, batch: Batch, noise: Noise) -> Tensor:
    """What the attack gives, in the clean images' own precision; nobody was asked about it yet.

    ``noise``: one stream an image, drawn by its own index. The attack gets copies: one that writes into its input
    cannot move what its perturbation is measured from. UserError where it has no gradient to climb, or does not give
    one image for each.
    """
    try:
        with looked_at():
            x_adv = attack(model, batch.x.clone(), batch.y.clone(), noise)
    except NotFiniteError as error:
        raise UserError(f"the attack on {attack.objective.name.replace('_', ' ')} stopped: {error}") from error
    if x_adv.shape != batch.x.shape:
        raise UserError(
            f"the attack gives a tensor of shape {tuple(x_adv.shape)}; expected an attacked image for each, "
            f"{tuple(batch.x.shape)}"
        )
    return x_adv.detach().to(batch.x)


def check_inside(threat: Threat, x: Tensor, x_adv: Tensor, name: str) -> None:
    """UserError where an attacked image left the ball around its clean one, or the pixel box."""
    box = float(torch.maximum(-x_adv, x_adv - 1).amax())
    if box > 0 or not all(inside(length, threat.eps) for length in threat.size(x_adv.float() - x.float()).tolist()):
        raise UserError(
            f"the attack {name!r} left the {threat.norm} ball of {threat.eps:g} or the pixel box; please report it"
        )


@torch.no_grad()
def rows_of(model: RoutedModel, done: Attacked, part: str = "") -> list[Row]:
    """One `Row` an image; perturbations are measured anew, in float32. ``part``: see `Row`.

    ``size`` has the three norms, and "box": how far the attacked image leaves [0, 1]. The exposures are two more
    passes, for routed models: the clean image on the attacked route (the router's part) and the attacked image on the
    clean route (the experts' part).
    """
    batch, clean, attacked = done.batch, done.clean, done.attacked
    if len(batch) == 0:
        return []
    x, x_adv = batch.x.float(), done.x_adv.float()
    sizes = {norm: size(norm, x_adv - x).tolist() for norm in ("linf", "l2", "l1")}
    sizes["box"] = torch.maximum(-x_adv, x_adv - 1).flatten(1).amax(1).clamp(min=0).tolist()
    router_exposed: list[int | None] = [None] * len(batch)
    experts_exposed: list[int | None] = [None] * len(batch)
    if clean.trace:
        router_exposed = list(predictions(model.run(batch.x, forced=attacked.trace)))
        experts_exposed = list(predictions(model.run(done.x_adv, forced=clean.trace)))
    moved = {name: share.tolist() for name, share in rerouted(clean.trace, attacked.trace).items()}
    routes_clean, routes_after = routes(clean.trace), routes(attacked.trace)
    columns = zip(batch.index.tolist(), batch.y.tolist(), predictions(clean), predictions(attacked))
    return [
        Row(
            index=index,
            label=label,
            clean=before,
            adversarial=after,
            size={norm: values[i] for norm, values in sizes.items()},
            rerouted={name: shares[i] for name, shares in moved.items()},
            router_exposed=router_exposed[i],
            experts_exposed=experts_exposed[i],
            route_clean={name: counts[i] for name, counts in routes_clean.items()},
            route_adversarial={name: counts[i] for name, counts in routes_after.items()},
            part=part,
        )
        for i, (index, label, before, after) in enumerate(columns)
    ]


def predictions(output: Output) -> list[int]:
    """The class of each image; -1, which is no class and so always wrong, where the logits name none."""
    classes: list[int] = torch.where(answers(output.logits), output.logits.argmax(1), -1).tolist()
    return classes


def routes(trace: Trace) -> dict[str, list[list[int]]]:
    """Returns, for each router, per image, how many items went to each expert."""
    return {name: _counts(routing) for name, routing in trace.items()}


def _counts(routing: Routing) -> list[list[int]]:
    counts: list[list[int]] = routing.chosen().sum(1).tolist()
    return counts


def examples_of(
    done: Attacked, rows: Iterable[Row], limit: int, wanted: Collection[int] | None = None
) -> list[Example]:
    """Images to look at: those that the attack broke first, then the other right ones. ``wanted``: none but these (by
    their index in the data set).
    """
    right = [
        (i, row) for i, row in enumerate(rows) if row.clean == row.label and (wanted is None or row.index in wanted)
    ]
    right.sort(key=lambda pair: pair[1].adversarial == pair[1].label)
    before, after = done.clean.trace, done.attacked.trace
    choosing = [name for name in before if not (before[name].chosen().all() and after[name].chosen().all())]
    return [
        Example(
            index=row.index,
            label=row.label,
            clean=row.clean,
            adversarial=row.adversarial,
            route_clean=row.route_clean,
            route_adversarial=row.route_adversarial,
            before=png(done.batch.x[i]),
            after=png(done.x_adv[i]),
            experts_clean=experts_of(before, choosing, i),
            experts_adversarial=experts_of(after, choosing, i),
        )
        for i, row in right[:limit]
    ]


def experts_of(trace: Trace, names: Iterable[str], image: int) -> dict[str, list[list[int]]]:
    """Returns, for each of these routers, the experts that each item of one image went to, best first."""
    return {
        name: [
            [expert for expert, weight in zip(chosen, weights) if weight != 0]
            for chosen, weights in zip(trace[name].index[image].tolist(), trace[name].weight[image].tolist())
        ]
        for name in names
    }


def png(image: Tensor) -> str:
    """An image (ch, h, w) in [0, 1] as base64 text of a PNG (8 bits, for the eye only)."""
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    array = levels[0].numpy() if len(levels) == 1 else levels[:3].permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
