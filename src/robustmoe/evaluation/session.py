"""What every measurement of a model shares: the model on its device, the images, one look at the first of them, the
header, the run folder and the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from robustmoe import distributed, provenance, records, repeatable
from robustmoe import spec as specs
from robustmoe.attacks import Attack, Surrogate
from robustmoe.attacks.base import evaluating, ordinary
from robustmoe.data import Batch, Data, ImageSet, batches, from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import checks
from robustmoe.evaluation.choosing import files_of, spec_or_repr
from robustmoe.evaluation.engine import Plan, plan_of
from robustmoe.evaluation.meters import Clock, Meter
from robustmoe.evaluation.precision import Precision, frozen_copy, in_float32, whole_float32
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.foreign import awaited, blaming, blaming_backward, check_classes, require_weights, to_eval
from robustmoe.models.plain import Plain, as_routed, sharded
from robustmoe.options import Options, SharedOptions
from robustmoe.progress import first_process, note
from robustmoe.records import Header, ObjectiveInfo, Record, RouterInfo, versions
from robustmoe.runs import named
from robustmoe.training.checkpoint import load_model, read_config, run_data

Timed = TypeVar("Timed", bound=Record)

Images = Tensor | np.ndarray | ImageSet | Data | str
Labels = Tensor | np.ndarray | list[int] | None

PROBE = 32
"""How many of the first images are looked at: by the header, by the checks of the model, by what copies it."""


@dataclass(frozen=True)
class About:
    """What a header says of model and images. ``run``: the folder, "" for a model in hand; ``classes``: their names,
    by default their numbers; ``files``: those of a user's own that they come from, and their SHA-256.
    """

    model: str
    data: str
    run: str = ""
    split: str = "test"
    method: str | None = None
    classes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def about_run(run: Path, config: dict[str, Any], data: Data, split: str = "test", spec: str | None = None) -> About:
    """What a header says of the model of a run folder on images of ``data``; ``spec``: of another data set than its
    own.
    """
    return About(
        model=config["model"],
        data=spec or config["data"],
        run=str(run),
        split=split,
        method=config.get("method"),
        classes=tuple(data.classes),
        files={**trained_with(config, "method"), **specs.files(config["model"], spec or config["data"])},
    )


def trained_with(config: dict[str, Any], field: str) -> dict[str, str]:
    """The files of a user's own that a spec in ``config.json`` names, and their SHA-256 when the run was trained. The
    files themselves are not needed.
    """
    names = specs.own_names(config[field]) if config.get(field) else []
    kept: dict[str, str] = config.get("files") or {}
    return {path: kept[path] for path in (name.rpartition(":")[0] for name in names) if path in kept}


class Session:
    """One measurement of a model on a set of images.

    ``model``: in eval mode, on ``device``. ``options``: of the verb; ``batch_size`` and ``seed`` go into the header.
    ``folder``: the run folder that records are written into, if there is one. ``source``: what ``images`` are the first
    of. Made by `on_run` and `in_hand`.
    """

    def __init__(
        self,
        model: RoutedModel,
        images: ImageSet,
        device: torch.device,
        options: Any,
        about: About,
        folder: Path | None = None,
        source: ImageSet | None = None,
    ) -> None:
        images.verify()
        self.model, self.images, self.device = model.eval(), images, device
        self.options, self.about, self.folder = options, about, folder
        self.source = images if source is None else source
        self.clock = Clock()
        self._changed = ""  # versions that are others than those of the record that goes on, in words
        self._copy: tuple[tuple[str, str], Surrogate] | None = None
        self._told = False  # of what is strange about the model

    # -------------------------------------------------------------------------------------------- the first images

    @cached_property
    def probe(self) -> Batch:
        """The first images, on the device."""
        return first_images(self.images, self.device)

    @cached_property
    def output(self) -> Output:
        """The model's answer to the probe, asked once. UserError where it cannot be measured (see `validate_model`); a
        note where it has more outputs than there are classes.
        """
        output = validate_model(self.model, self.probe, self.images)
        outputs, classes = output.logits.shape[1], len(self.about.classes)
        if outputs > classes > 0 and not self._told:
            note(
                f"the model has {outputs} outputs, the data {classes} classes: output k is read as class k, and one "
                f"above {classes - 1} is wrong; if they mean other classes, pick them: lambda x: model(x)[:, columns]"
            )
        self._told = True
        return output

    def surrogate(self, meter: Meter | None = None, precision: str = "strict") -> Surrogate:
        """What an attack climbs in the model's place: "strict" a frozen copy in float32, "fast" one in half precision
        (see `robustmoe.evaluation.precision`), "fp32" the model itself. A copy is kept for the next attack, as long as
        the model does not change.
        """
        on_pass = None if meter is None else meter.on_pass
        if precision == "fp32":
            return Surrogate(self.model, self.model, close=True, on_pass=on_pass)
        state = (precision, checks.fingerprint(self.model))
        if self._copy is None or self._copy[0] != state:
            kind: Precision = "fast" if precision == "fast" else "strict"
            self._copy = state, frozen_copy(self.model, self.probe.x, kind, output=self.output)
        copy = self._copy[1]
        return Surrogate(copy.climbed, self.model, copy.close, on_pass)

    def batches(self, positions: Tensor | None = None) -> Iterator[Batch]:
        """The images, or those at ``positions``, batch by batch on the device."""
        return batches(self.images, self.options.batch_size, positions, self.device)

    def on(self, images: ImageSet) -> Session:
        """The same on the first ``images`` of the set; what is known of the model is kept."""
        other = Session(self.model, images, self.device, self.options, self.about, self.folder, self.source)
        other._copy, other._told = self._copy, self._told
        if min(PROBE, len(images)) == len(self.probe):
            other.probe, other.output = self.probe, self.output
        return other

    # -------------------------------------------------------------------------------------------- header and folder

    def header(self, images: ImageSet | None = None, **work: Any) -> Header:
        """The header of any ``work`` (the fields of `Header` that say what was done), on other ``images`` of the same
        set if asked.
        """
        images = self.images if images is None else images
        output = self.output
        if min(PROBE, len(images)) != len(self.probe):
            with torch.no_grad():
                output = self.model.run(first_images(images, self.device).x)
        files = {**self.about.files, **work.pop("files", {})}
        fields: dict[str, Any] = {"role": "main", "precision": "strict", "seed": self.options.seed, **work}
        header = Header(
            **{
                **dataclasses.asdict(self.about),
                "classes": class_names(self.about, output),
                "files": files,
            },
            n=len(images),
            data_hash=images.fingerprint,
            index_hash=hashlib.sha256(images.index.numpy().tobytes()).hexdigest(),
            model_hash=checks.identity(self.model, output.logits),
            versions={**specs.packages(), **provenance.versions()},
            commit=provenance.commit(),
            device=str(self.device),
            threads=torch.get_num_threads(),
            command=provenance.command(),
            routers=routers_of(output),
            parameters=sum(p.numel() for p in self.model.parameters()),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            batch_size=self.options.batch_size,
            shard=getattr(self.options, "shard", None) or "",
            **fields,
        )
        return Header.from_dict(json.loads(json.dumps(header.to_dict())))  # as it will be read: no work for a bad one

    def attack_header(
        self, attack: Attack, images: ImageSet | None = None, plan: Plan | None = None, **work: Any
    ) -> Header:
        """The header of one attack. ``plan``: of the attack, where it is known already."""
        plan = plan or plan_of(attack, self.output, self.images if images is None else images)
        return self.header(
            images,
            attack=spec_or_repr(attack),
            files=files_of(attack),
            objective=ObjectiveInfo.of(attack.objective),
            norm=attack.threat.norm,
            eps=attack.threat.eps,
            seed=attack.seed,
            parts=plan.parts,
            certified_hash=plan.certified_hash,
            **work,
        )

    def resume(self, kind: type[Timed], header: Header, done: Callable[[Timed], int]) -> Timed | None:
        """Returns the record that is in the run folder, if it is of the same work; one of other work is set aside.
        Where other versions wrote it, its header says so from now on. ``done``: how much of the work is in a record.
        """
        if self.folder is None:
            return None
        old: Any = kind.read(self.folder)
        if old is None:
            return None
        if other := records.differing(old.header, header):
            records.set_aside(kind.path(self.folder), other)
            return None
        self.recognise(kind.path(self.folder), old.images())
        header, self._changed = versions.taken_up(old.header, header, done(old))
        same: Timed = replace(old, header=header)
        return same

    def recognise(self, path: Path, said: Iterable[tuple[int, int]]) -> None:
        """UserError unless the images that a file goes on from, as (index, label), are in the data set, with these
        labels.
        """
        labels = dict(zip(self.source.index.tolist(), self.source.labels.tolist()))
        for at, (index, label) in enumerate(said):
            if labels.get(index) != label:
                there = f"is of class {labels[index]}" if index in labels else "is not there"
                raise UserError(
                    f"{path}: entry {at} is image {index} of class {label}, but in {self.about.data} image {index} "
                    f"{there}: the file was changed; restore it, or delete it to measure anew"
                )

    def keep(self, record: Timed) -> Timed:
        """The record with the time since the last call added to it, written into the run folder if there is one."""
        old: Any = record  # every record has its seconds; a sixth kind is not listed here
        timed: Timed = replace(old, seconds=old.seconds + self.clock.lap())
        if self.folder is not None:
            versions.tell(timed.path(self.folder), self._changed)
            self._changed = ""
        self.write(timed)
        return timed

    def write(self, record: Record) -> None:
        """Write a record into the run folder, if there is one; of several processes, the first one does."""
        if self.folder is not None and first_process():
            record.write(self.folder)


# ------------------------------------------------------------------------------------------------ where one comes from


@contextlib.contextmanager
def on_run(run: str | Path, options: Any, float32: bool = False, writes: bool = True) -> Iterator[Session]:
    """A session on the model of a run folder and its first test images, and the only one to write there meanwhile
    (``writes=False``: it writes nothing, beside others that may). ``float32``: weights in half precision are replaced
    by a float32 copy. UserError for what is no run folder, or one that another process writes.
    """
    folder = named(run)
    config = read_config(folder)
    alone = records.writing(folder) if writes else contextlib.nullcontext()
    with alone, whole_float32(), repeatable.deterministic(options.deterministic):
        device = device_of(options)
        model = load_model(folder, device)
        data = run_data(folder, config)
        model = in_float32(model) if float32 else model
        about, images = about_run(folder, config, data), data.test.head(options.limit)
        place = options.folder(folder) if isinstance(options, SharedOptions) else folder
        yield Session(model, images, device, options, about, place, data.test)


@contextlib.contextmanager
def in_hand(
    model: Callable[[Tensor], Tensor],
    x: Images,
    y: Labels,
    options: Any,
    num_classes: int | None = None,
    name: str | None = None,
    float32: bool = False,
) -> Iterator[Session]:
    """A session on a model in memory and the images that the caller gave; afterwards the model is on its former device
    and in its former modes. ``name``: what the header calls it. Inside, gradients can be taken, also where the caller
    is within `torch.inference_mode`.
    """
    with torch.inference_mode(False):
        source: Any = specs.build(x, "data") if isinstance(x, str) else x
        split = getattr(options, "split", "test")
        images = images_of(source, y, num_classes, split).head(options.limit)
        if sharded(model) and distributed.world() > 1:
            raise UserError(
                "the model's weights are sharded over processes (FSDP), and here each has images of its own; gather "
                "them (full_state_dict=True) into an unsharded model in every process, and evaluate that"
            )
        routed, device = as_routed(model), device_of(options)
        about = About(
            model=name or type(routed if not isinstance(routed, Plain) else model).__name__,
            data=x if isinstance(x, str) else source.name if isinstance(source, Data) else "arrays",
            split=split,
            classes=tuple(source.classes) if isinstance(source, Data) else tuple(map(str, range(num_classes or 0))),
            files=specs.files(x if isinstance(x, str) else None),
        )
        routed = in_float32(routed) if float32 else routed
        require_weights(routed)
        exact = repeatable.deterministic(options.deterministic)
        with eval_mode_on(device, routed), exact, blaming_backward(routed):
            yield Session(routed, images, device, options, about)


def device_of(options: Options) -> torch.device:
    """The device that the options name; under torchrun this process's own."""
    return distributed.local_device(provenance.pick_device(options.device))


def images_of(x: Any, y: Labels, num_classes: int | None, split: str = "test") -> ImageSet:
    """What the caller gave as an `ImageSet`. UserError for labels beside a data set, or images without labels."""
    if isinstance(x, Data | ImageSet):
        if y is not None:
            raise UserError("labels were given beside a data set, which has its own; expected one of them")
        return getattr(x, split) if isinstance(x, Data) else x
    if y is None:
        raise UserError("images were given without labels; expected y, one integer an image")
    x, labels = (ordinary(value) if isinstance(value, Tensor) else value for value in (x, y))
    return from_arrays(x, labels, num_classes)


@contextlib.contextmanager
def eval_mode_on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """The user's model on ``device`` and in eval mode inside; after, each submodule in its own former mode, and on the
    former device. A model spread over several devices is not moved.
    """
    training = {module for module in model.modules() if module.training}
    places = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        to_eval(model)
        try:
            if len(places) == 1:
                model.to(device)
            with whole_float32():
                yield
        finally:
            if len(places) == 1:
                model.to(places.pop())
    finally:
        for module in model.modules():
            module.training = module in training


# ------------------------------------------------------------------------------------------------ the first images


def first_images(images: ImageSet, device: torch.device) -> Batch:
    """The first `PROBE` images, or all where there are fewer."""
    return images.batch(list(range(min(PROBE, len(images))))).to(device)


def validate_model(model: RoutedModel, probe: Batch, images: ImageSet) -> Output:
    """The model's answer to ``probe``, the first of the images. UserError unless it takes them, gives logits (n, c),
    and has an output for each label.
    """
    with blaming(model, probe.x, whoever=True), torch.no_grad():
        output = model.eval().run(probe.x)
    check_classes(output.logits, int(images.labels.max()))
    return output


def tell_of_gradient(model: RoutedModel, x: Tensor) -> None:
    """A note where the model's logits have no gradient, so that what is measured by climbing is no measure. (In an
    evaluation the checks say it.)
    """
    with evaluating(model), awaited(model, -1, True):
        model.run(x[:2].clone().requires_grad_())


def class_names(about: About, output: Output) -> list[str]:
    """The names of the classes; numbers for those of the model that have none."""
    return [*about.classes, *map(str, range(len(about.classes), output.logits.shape[1]))]


def routers_of(output: Output) -> dict[str, RouterInfo]:
    """What a header says of each router that the model told of."""
    return {
        name: RouterInfo(experts=routing.num_experts, k=routing.k, items=routing.index.shape[1])
        for name, routing in output.trace.items()
    }
