"""What can be named on the command line: kinds and their names, recipes, the zoo."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated

from robustmoe import recipe as recipes
from robustmoe import spec, zoo
from robustmoe.errors import UserError, nearest
from robustmoe.options import Mark
from robustmoe.spec import index

OF_A_KIND = (
    "robustmoe list KIND lists the names of a kind with their arguments,\n"
    "robustmoe list NAME tells what each argument of a name means."
)
OF_YOUR_OWN = (
    "Wherever such a name is taken, my_file.py:name(...) is one of your own:\n"
    '--attack "my_file.py:noise(linf(0.1))"; installed packages may offer names too.'
)

OF_A_RECIPE = "\nrobustmoe list RECIPE tells its numbers, its cost, what others claim of it."

KINDS = {
    "model": "networks, and MoEs made of them",
    "sharpening": "what a dual model does to its robust half's logits",
    "data": "data sets",
    "attack": "attacks, on the whole model, its router or its experts",
    "threat": "norms and radii that an attack stays in",
    "objective": "losses that an attack climbs",
    "view": "the path that an attack's gradient takes through a router",
    "codec": "what the routers of a foreign model return, for rm.wrap",
    "certifier": "proofs that no attack changes what a model says",
    "method": "training methods",
    "optimizer": "optimisers",
    "schedule": "learning rates over a run",
    "augment": "what is done to training images",
}


def list_names(
    kind: Annotated[
        str | None, "models, attacks, data, recipes, ..., or one name (default: the kinds)", Mark.POSITIONAL
    ] = None,
    costs: Annotated[
        bool, "of the models: parameters and multiply-adds of every architecture (some ten seconds)"
    ] = False,
) -> str:
    """List what can be named: models, attacks, data sets, methods.

    Example: robustmoe list attacks
    """
    if costs:
        if kind not in ("model", "models"):
            given = "no kind" if kind is None else repr(kind)
            raise UserError(f"--costs are those of the models; got {given}; write: robustmoe list models --costs")
        from robustmoe import costs as counted

        return counted.table(counted.rows())
    if kind is None:
        lines = [f"  {_plural(name):13}{KINDS[name]}" for name in spec.TABLES]
        lines += [f"  {name:13}{about}" for name, (about, _) in _BESIDES.items()]
        return "\n".join([*lines, "", OF_A_KIND, OF_YOUR_OWN])
    if beside := next((name for name in _BESIDES if kind in (name, name.removesuffix("s"))), None):
        about, entries_of = _BESIDES[beside]
        return "\n".join([f"{beside}: {about}", *entries_of()])
    if file := next((file for file in recipes.every() if file.stem == kind), None):
        told = [*recipes.words(file).split("\n\n"), *map(_claimed, recipes.claims(file))]
        return "\n".join([_recipe_entry(file), *map(_paragraph, told)])
    if card := next((card for card in zoo.cards() if card.name == kind.removeprefix(zoo.PREFIX)), None):
        return _zoo_entry(card)
    kinds = [name for name in spec.TABLES if kind in (name, _plural(name))]
    if kinds:
        return "\n".join([_plural(kinds[0]), *map(_entry, index.entries(kinds[0]))])
    everything = {name: load() for name, load in spec.TABLES.items()}
    pages = [spec.explain(name, kind) for name, table in everything.items() if kind in table]
    if not pages:
        names = {name for table in everything.values() for name in table}
        raise _unknown(kind, names | {file.stem for file in recipes.every()} | {card.name for card in zoo.cards()})
    return "\n\n".join(pages)


def _unknown(kind: str, names: set[str]) -> UserError:
    """Returns the answer to what is neither a kind nor one of the ``names``."""
    guess, _, _ = nearest(kind, {*spec.TABLES, *_BESIDES, *names}).partition("known:")
    kinds = ", ".join([*map(_plural, spec.TABLES), *_BESIDES])
    return UserError(f"unknown kind or name {kind!r}; {guess}the kinds: {kinds}")


def _recipes() -> list[str]:
    return [*map(_recipe_entry, recipes.every()), OF_A_RECIPE]


def _zoo() -> list[str]:
    return [*map(_zoo_entry, zoo.cards())]


def _layouts() -> list[str]:
    from robustmoe.weights import LAYOUTS

    return [_wrapped(name, layout.about) for name, layout in LAYOUTS.items()]


_BESIDES = {
    "recipes": ("whole trainings, for robustmoe train; every field is a flag", _recipes),
    "zoo": ("trained models in the package; zoo:NAME stands for a run folder", _zoo),
    "layouts": ("whose weights robustmoe import reads", _layouts),
}
"""What can be named and is not written as a call: what it is, and its entries."""


def _recipe_entry(file: Path) -> str:
    recipe = recipes.load_recipe(file)
    text = f"{recipe.data}: {recipe.model}; {recipe.method}; {recipe.epochs} epochs; {_told(file)}"
    return _wrapped(file.stem, text)


def _told(file: Path) -> str:
    """Returns what the head of a recipe says of its cost, its time and what came of it."""
    words = " ".join(recipes.words(file).split())
    macs, weights = re.search(r"Cost: ([\d.]+ GMAC)", words), re.search(r"([\d.]+ M) parameters", words)
    result = re.search(r"Result: (.*?)\.(?= |$)", words)
    cost = f"{macs[1]} an image and pass" if macs else "cost not said"
    size = f", {weights[1]} parameters" if weights else ""
    timed = ", not timed" if "Not timed" in words else ""
    return f"{cost}{size}{timed}; result: {result[1] if result else 'not said'}"


def _claimed(claim: recipes.Claim) -> str:
    """Returns a sentence on what others say that the recipe gives."""
    source = f" (from {claim.source})" if claim.source else ""
    return f"Claimed: {claim.paper}, {claim.place}, {claim.row}: {claim.said}{source}."


def _zoo_entry(card: zoo.ZooModel) -> str:
    rates = f"clean {100 * card.clean / card.n:.1f} %, worst of {len(card.attacks)} {100 * card.worst / card.n:.1f} %"
    share = 100 * card.certified / max(card.certified_n, 1)
    proven = f" (certified {share:.1f} % of the first {card.certified_n})" if card.certified_n else ""
    text = f"{card.about}: {card.model}; {rates} of {card.n} images of {card.data} in {card.threat}{proven}, at "
    text += card.commit[:7]
    return _wrapped(card.name, text)


def _wrapped(name: str, text: str) -> str:
    return "\n".join([f"  {name}", *textwrap.wrap(text, 80, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def _paragraph(text: str) -> str:
    """Returns prose of a recipe's head, at most 80 columns wide; commands are left as they are."""
    if not text.startswith("  "):
        text = textwrap.fill(" ".join(text.split()), 78, break_on_hyphens=False)
    return "\n" + textwrap.indent(text, "  ")


def _entry(entry: tuple[str, str, str]) -> str:
    _, signature, line = entry
    name = signature.partition("(")[0]
    head = textwrap.wrap(signature, 80, initial_indent="  ", subsequent_indent=" " * min(len(name) + 3, 20))
    lines = textwrap.wrap(line, 80, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join([*head, *lines])


def _plural(kind: str) -> str:
    return kind if kind == "data" else f"{kind}s"
