"""`load_weights`: a file of other code's weights into a model of ours, with a report of what went where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from robustmoe.errors import UserError, nearest
from robustmoe.models.pruned import reset_scores
from robustmoe.weights.fitting import Fit, fits
from robustmoe.weights.layouts import LAYOUTS
from robustmoe.weights.pairs import Layout
from robustmoe.weights.reading import read_groups
from robustmoe.weights.untold import untold


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did: the ``fit`` that was taken, and the names of the model's tensors that ``stayed`` as they
    were (the mean and deviation of its pixels apart, which files of other code do not hold). ``notes``: what no tensor
    shows, in sentences.
    """

    file: Path
    fit: Fit
    stayed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f", under {self.fit.where()!r}" if self.fit.where() else ""
        lines = [f"{self.file}{where}: layout {self.fit.layout}, {len(self.fit.given)} tensors"]
        lines += [f"  {count} {change}" for change, count in self.fit.changed.items()]
        for names, said in (
            (self.stayed, "of the model's are not in it and stay as they were"),
            (self.fit.missing, "of the layout's names are not in the file"),
            (self.fit.left, "of the file's are left over"),
            (self.fit.ignored, "of the file's are no weights"),
        ):
            if names:
                lines.append(f"  {len(names)} {said}, such as {names[0]!r}")
        return "\n".join([*lines, *(f"note: {sentence}" for sentence in self.notes)])

    __repr__ = __str__


def load_weights(
    model: nn.Module,
    file: str | Path,
    layout: str | None = None,
    group: str | None = None,
    partial: bool = False,
) -> Loaded:
    """Loads the weights in ``file`` into ``model``, a model of this package (`build_model`) or any module.

    ``layout``: whose names they have (robustmoe list layouts); by default that which fits to the last tensor, if only
    one does. ``group``: which part of the file, such as "model_ema", where several would fit. ``partial``: also where
    names are missing or left over (`Loaded` tells them); shapes have to fit all the same. Nothing in the file is
    executed. Returns a report of what went where; print it.

    Raises UserError where the file cannot be read without running code, or does not fit; the model is then as before.
    """
    groups = read_groups(file)
    if group is not None:
        if group not in groups:
            known = [name for name in groups if name]
            raise UserError(f"{file} has no group {group!r}; {nearest(group, known) if known else 'leave --group out'}")
        groups = {group: groups[group]}
    attempts = fits(groups, model, _asked(layout))
    if not attempts:
        raise _nothing(Path(file), model, layout)
    fit = _chosen(Path(file), attempts, layout, partial)
    own = model.state_dict()
    put(model, fit.given)
    stayed = tuple(name for name in own if name not in fit.given and not is_normalisation(name))
    return Loaded(Path(file), fit, stayed, tuple(notes(model, fit.layout)))


def notes(model: nn.Module, layout: str) -> list[str]:
    """What the weights of a model in a layout do not tell, in sentences."""
    out = LAYOUTS[layout].wants(model)
    if arguments := untold(model):
        out.append(f"not seen in weights, so check them with the code that trained: {arguments}")
    return out


def is_normalisation(name: str) -> bool:
    """Whether a tensor says what is done to the pixels of an image before the network."""
    return "normalise" in name.split(".")


def put(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """The tensors into their places; the scores of pruned convolutions that are not among them are made anew."""
    model.load_state_dict(dict(given), strict=False)
    reset_scores(model, frozenset(given))


def _asked(layout: str | None) -> Mapping[str, Layout]:
    if layout is None:
        return LAYOUTS
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}; {nearest(layout, LAYOUTS)}")
    return {layout: LAYOUTS[layout]}


def _nothing(file: Path, model: nn.Module, layout: str | None) -> UserError:
    whose = f"the layout {layout!r} has" if layout else "any layout has"
    wanted = [f"{name}: {sentence}" for name, asked in _asked(layout).items() for sentence in asked.wants(model)]
    return UserError(
        f"{file} has no tensor that {whose} for this model; expected weights of the same architecture, see robustmoe "
        f"list layouts{''.join(f' ({each})' for each in wanted)}"
    )


def _chosen(file: Path, attempts: list[Fit], layout: str | None, partial: bool) -> Fit:
    """The attempt that is taken. A guess is never taken: UserError says what it would have been."""
    best = attempts[0]
    if best.whole:
        rivals = {attempt.group for attempt in attempts if attempt.whole and not _equal(attempt, best)}
        if rivals:
            names = sorted({best.group, *rivals})
            raise UserError(f"{file} has several groups that fit: {', '.join(map(repr, names))}; say which, as --group")
        return best
    if partial and not best.wrong and layout is not None:
        return best
    where = f", under {best.where()!r}," if best.where() else ""
    advice = "check the model's arguments (--as)"
    if not best.wrong:
        advice += f", or take what there is with --layout {best.layout} --partial"
    raise UserError(f"{file}{where} is nearest to the layout {best.layout!r}, but {best.problems()}; {advice}")


def _equal(this: Fit, other: Fit) -> bool:
    """Whether two attempts give the model the same numbers."""
    return this.given.keys() == other.given.keys() and all(
        this.given[name].equal(other.given[name]) for name in this.given
    )
