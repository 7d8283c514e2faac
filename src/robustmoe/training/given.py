"""`train`: a recipe, or a model and images in hand, becomes a run folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor, nn

from robustmoe import recipe as recipes
from robustmoe import spec as specs
from robustmoe.data import Data, as_data
from robustmoe.errors import UserError
from robustmoe.models import ModelSpec, as_routed
from robustmoe.recipe import Recipe
from robustmoe.training.loop import train_recipe
from robustmoe.training.parts import Given

Images = Tensor | np.ndarray | Data | str


@overload
def train(model: Recipe | str | Path, x: str | Path | None = None, *, resume: bool = False, **fields: Any) -> Path: ...
@overload
def train(
    model: nn.Module | ModelSpec,
    x: Images,
    y: Any = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    **fields: Any,
) -> Path: ...
def train(
    model: Any, x: Any = None, y: Any = None, *, out: str | Path | None = None, resume: bool = False, **fields: Any
) -> Path:
    """Trains into a run folder and returns it: ``train(recipe, folder)``, or ``train(model, x, y, out=folder)``.

    ``model``: a `Recipe`, a recipe's file or name; or an nn.Module (or a model's description) and the images that it is
    trained on, ``x``, ``y``: (n, ch, h, w) in [0, 1] with integer labels (n), a tenth of each class being held out for
    validation, or a `Data` or its spec. ``fields``: those of `Recipe`, as texts or objects: ``method`` and ``epochs``
    at least, where there is no recipe. A recipe takes a `Data` as ``data=``. The folder is by default in runs/, named
    as the recipe or the class of the model; it must be new, unless ``resume``.

    A module is trained where it is: afterwards it holds the weights that were best on validation, on its former device,
    in eval mode. Its folder can be read, but not evaluated by its path: give the module to `robustmoe.evaluate`.

    With ``resume`` it goes on from the last checkpoint: on CPU the final weights are equal, bit for bit, to those of
    a run that was never stopped. Under ``torchrun`` the processes share each batch; started anew by it, they resume.

    Raises UserError for what cannot be built, written or resumed, and `TrainingStopped` (a UserError) where a loss or
    gradient is not finite.
    """
    return _trained(*asked(model, x, y, out, fields), resume)


def asked(model: Any, x: Any, y: Any, out: Any, fields: dict[str, Any]) -> tuple[Recipe, Given, Path]:
    """Returns the recipe that the arguments of `train` mean, what Python gives in the place of its texts, and the
    folder. UserError for arguments that do not go together.
    """
    if isinstance(model, Recipe | str | os.PathLike):
        return _of_recipe(model, x, y, out, fields)
    if not isinstance(model, nn.Module | ModelSpec):
        raise UserError(f"cannot train a {type(model).__name__}; expected a recipe, its name or file, or an nn.Module")
    if x is None:
        raise UserError("a model is trained on images; expected train(model, x, y), or a data set as x")
    if not isinstance(x, Data | str):
        if y is None:
            raise UserError("images were given without labels; expected y, one integer an image")
        x, y = as_data(x, y), None
    if y is not None:
        raise UserError("labels were given beside a data set, which has its own; expected one of them")
    given, texts = _split({"model": model, "data": x, **fields})
    return _recipe(texts), given, Path(out or Path("runs") / type(model).__name__)


def _of_recipe(recipe: Any, x: Any, y: Any, out: Any, fields: dict[str, Any]) -> tuple[Recipe, Given, Path]:
    if y is not None or not isinstance(x, str | os.PathLike | None) or (x is not None and out is not None):
        raise UserError("a recipe is trained as train(recipe, folder); give other images as data=, a Data or its spec")
    given, texts = _split(fields)
    if isinstance(recipe, Recipe):
        settings, name = dataclasses.replace(recipe, **recipes.typed(texts)), "run"
    else:
        settings, name = recipes.load_recipe(recipe, **texts), recipes.resolve(recipe).stem
    return settings, given, Path(x or out or Path("runs") / name)


def _recipe(texts: dict[str, Any]) -> Recipe:
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    for name in texts:
        if name not in known:
            raise UserError(specs.unknown("argument", name, texts[name], known))
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in texts]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given, such as method='at(pgd(linf(8/255)))', epochs=10")
    return Recipe(**recipes.typed(texts))


def _split(fields: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
    """Returns the objects that Python alone makes, and all fields as a recipe has them: these by the names of their
    classes, any other object as the call that makes it.
    """
    objects: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "attacks":
            several = value if isinstance(value, list | tuple) else (value,)
            texts[name] = tuple(each if isinstance(each, str) else specs.text(each) for each in several)
        elif name not in recipes.SPECS or value is None or isinstance(value, str):
            texts[name] = value
        else:
            text = _written(value)
            texts[name] = text or type(value).__name__
            if text is None:
                objects[name] = as_routed(value) if isinstance(value, nn.Module) else value
    return Given(objects), texts


def _written(value: Any) -> str | None:
    """The call that makes an object; None where Python alone makes it."""
    if isinstance(value, nn.Module | Data):
        return None
    try:
        return specs.text(value)
    except UserError:
        return None


def _trained(recipe: Recipe, given: Given, out: Path, resume: bool) -> Path:
    module = given.objects.get("model")
    if module is None:
        return train_recipe(recipe, out, resume, given)
    places = {tensor.device for tensor in [*module.parameters(), *module.buffers()]}
    try:
        return train_recipe(recipe, out, resume, given)
    finally:
        for layer, kind in given.switched.items():
            layer.__class__ = kind
        given.switched.clear()
        if len(places) == 1:
            module.to(places.pop())
        module.eval()
