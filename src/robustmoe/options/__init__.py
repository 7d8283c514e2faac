"""What can be chosen about each measurement: one frozen dataclass a verb, and no torch.

A field is a keyword of the Python functions, a flag of the command line, and what the header of the record says; its
default and its help text are written here and nowhere else. `settings` has what all of them share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from robustmoe.errors import UserError
from robustmoe.options.settings import SPECS as SPECS
from robustmoe.options.settings import Mark as Mark
from robustmoe.options.settings import Numbers as Numbers
from robustmoe.options.settings import Settings as Settings
from robustmoe.options.settings import Spec as Spec
from robustmoe.options.settings import hints_of as hints_of
from robustmoe.options.settings import read as read
from robustmoe.options.settings import several as several
from robustmoe.options.settings import takes as takes

Inputs = Literal["data", "centred", "raw"]
"""How a model takes its images: less the data set's mean, over its deviation; in [-1, 1]; or as pixels in [0, 1]."""

Margins = Any
"""One number an image: a mapping from its index, or a sequence or tensor (n,)."""


PAPER_EPS: Numbers = tuple(sorted([k / 255 for k in range(1, 21)] + [k * 1e-3 / 2 for k in range(1, 7)]))
"""The radii of V-MoE's released code, {1, ..., 20}/127.5 and {1, ..., 6}e-3, there in pixels of [-1, 1]."""


# ------------------------------------------------------------------------------------------------ what is measured

OwnModel = Annotated[str | None, "a model of your own instead of a run: my_file.py:make_model (with --data)"]
OwnData = Annotated[str | None, "the data set that --model is measured on"]


@dataclass(frozen=True, kw_only=True)
class Target(Settings):
    """The model that a verb measures: a run's, or one of a user's own."""

    run: Annotated[str | None, "a run folder (or give --model)", Mark.POSITIONAL] = None
    model: OwnModel = None
    data: OwnData = None
    out: Annotated[str | None, "the run folder of --model (default: runs/ and the names of file and model)"] = None


@dataclass(frozen=True, kw_only=True)
class EvaluateTarget(Target):
    """What is evaluated: a run also on other images than its own, and into another folder."""

    data: Annotated[str | None, "the data set of --model, or another than the run's"] = None
    out: Annotated[
        str | None, "folder of the results, in OUT/rows (default: the run's; of --model, runs/ and its names)"
    ] = None


# ------------------------------------------------------------------------------------------------ one class a verb


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What every measurement takes."""

    seed: Annotated[int, "decides every random draw"] = 0
    device: Annotated[str, "cpu, cuda, cuda:1; auto takes the best there is"] = "auto"
    deterministic: Annotated[bool, "the same bits in every run on the same GPU; a CPU gives them anyway"] = False


@dataclass(frozen=True, kw_only=True)
class SharedOptions(Options):
    """What a measurement takes that machines without a common file system can share."""

    shard: Annotated[
        str | None, "this machine's share of the images, such as 2/3, in a folder of its own; robustmoe merge joins all"
    ] = None

    @property
    def share(self) -> tuple[int, int]:
        """Which share of how many, from 1; the whole is (1, 1)."""
        match = re.fullmatch("([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", "1/1" if self.shard is None else self.shard)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(f"shard is such as 2/3, the second of three; got {self.shard!r}")
        return int(match[1]), int(match[2])

    def folder(self, run: Path) -> Path:
        """Where the share's records are: the run folder itself, for the whole."""
        return run if self.shard is None else run / f"shard-{'-of-'.join(self.shard.split('/'))}"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SharedOptions):
    """How a model is evaluated."""

    WORDS = {"curve": {"auto": None, "none": ()}}  # noqa: RUF012 (never changed)

    attacks: Annotated[
        tuple[Spec, ...],
        "an attack, such as pgd(linf(8/255), steps=50) or autoattack(linf(8/255)) (default: the recipe's; without one, "
        "PGD-20 on the model, on its experts and on its routers, and an attack on the routing; of a dense model as "
        "many on the model)",
    ] = ()
    split: Annotated[Literal["test", "val", "train"], "which images"] = "test"
    limit: Annotated[int | None, "at most this many images"] = None
    batch_size: Annotated[int | Literal["auto"], "images at a time; auto = as many as the memory holds"] = 128
    curve: Annotated[
        Numbers | None,
        "radii of the accuracy curve, such as 0,2/255,4/255; auto = around the attack's; none = no curve "
        "(default: auto)",
    ] = None
    precision: Annotated[
        Literal["strict", "fast", "fp32"],
        "what attacks climb: strict = a frozen fp32 copy, fast = the network in bf16 (every success is confirmed by "
        "the exact model), fp32 = the model itself",
    ] = "strict"
    certified: Annotated[
        Mapping[int, float] | None,
        "index of an image -> radius up to which its prediction is proven, in the norm of the attacks "
        "(`Certificates.radii()`); images that are right and proven up to eps are not attacked",
        Mark.PYTHON,
    ] = None

    @property
    def at_a_time(self) -> int:
        """The batch size, once it is a number."""
        assert self.batch_size != "auto"
        return self.batch_size


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """What is checked about an evaluation."""

    attacks: Annotated[tuple[Spec, ...], "an attack whose number is in question (default: the recipe's)"] = ()
    limit: Annotated[int, "images to check on"] = 64
    only: Annotated[tuple[str, ...], "ids of some checks, such as G2,R4 (default: all)"] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = [key.strip() for text in self.only for key in text.split(",")]
        object.__setattr__(self, "only", tuple(key for key in ids if key))


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Options):
    """How a model that was not made here is audited."""

    threat: Annotated[
        Spec, "the ball that it is attacked in, such as linf(0.1) or l2(0.5), unless an attack says it"
    ] = "linf(8/255)"
    attacks: Annotated[
        tuple[Spec, ...],
        "an attack (default: those of evaluate, then autoattack_routing: AutoAttack and the attacks on the routing)",
    ] = ()
    limit: Annotated[int | None, "images to attack"] = 200
    batch_size: Annotated[int, "images at a time"] = 128
    noise: Annotated[
        Literal["free", "replay", "average"],
        "of a model that draws random numbers: free = as ever, replay = the same in every pass, average = of 8 passes",
    ] = "free"


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Settings):
    """How weights that were made elsewhere are read."""

    data: Annotated[
        str | None,
        "the data set that the model is for, such as cifar10; it says the classes, the images and their mean",
    ] = None
    classes: Annotated[int | None, "without --data: how many classes the model has"] = None
    image_shape: Annotated[Numbers | None, "without --data: channels, height and width, such as 3,224,224"] = None
    inputs: Annotated[
        Inputs | None,
        "how the model takes its images: raw = pixels in [0, 1], centred = in [-1, 1], data = less the data set's "
        "mean, over its deviation (default: as the layout's nets do)",
    ] = None
    layout: Annotated[
        str | None, "whose names the file has, see robustmoe list layouts (default: that which fits to the last tensor)"
    ] = None
    group: Annotated[str | None, "which part of the file, such as model_ema, where several would fit"] = None
    partial: Annotated[bool, "load what there is, also where names are missing or left over"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = [self.classes is not None, self.image_shape is not None]
        if any(alone) if self.data is not None else not all(alone):
            raise UserError("expected either --data, or both of --classes and --image-shape (such as 3,224,224)")
        shape = self.image_shape
        if shape is not None and (len(shape) != 3 or any(side != int(side) or side < 1 for side in shape)):
            raise UserError(f"image_shape is channels, height and width, such as 3,224,224; got {_plainly(shape)}")
        if self.classes is not None and self.classes < 2:
            raise UserError(f"classes must be at least 2; got {self.classes}")
        if self.data is None and self.inputs == "data":
            raise UserError(
                "inputs=data takes the data set's mean; expected --data with it, or --inputs raw or centred"
            )


def _plainly(numbers: Numbers) -> str:
    return ",".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True, kw_only=True)
class DissectOptions(Options):
    """How a routed model is taken apart."""

    attack: Annotated[
        Spec | None,
        "a pgd on the whole model, from which all attacks are made, such as pgd(linf(8/255), steps=50) (default: 20 "
        "steps at the threat of the run)",
    ] = None
    limit: Annotated[int | None, "images to ask about"] = 500
    batch_size: Annotated[int, "images at a time"] = 128


@dataclass(frozen=True, kw_only=True)
class LipschitzOptions(Options):
    """How it is measured how far a model can move."""

    attack: Annotated[
        Spec | None,
        "the attack whose changes are split, and whose norm and eps radii are told in, such as pgd(linf(8/255), "
        "steps=50) (default: 20 steps at the threat of the run)",
    ] = None
    limit: Annotated[int | None, "images to measure on"] = 64
    batch_size: Annotated[int, "images at a time"] = 32


@dataclass(frozen=True, kw_only=True)
class CertifyOptions(SharedOptions):
    """How a model is certified."""

    certifiers: Annotated[
        tuple[Spec, ...],
        "what proves it, such as bounds(linf(2/255)) or smoothing(sigma=0.25) (default: bounds at the threat of the "
        "run)",
    ] = ()
    limit: Annotated[int | None, "images to certify"] = 500
    batch_size: Annotated[int, "images at a time"] = 32


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """At what radii a model is attacked, and by what."""

    WORDS = {"eps": {"paper": PAPER_EPS}}  # noqa: RUF012 (never changed)

    attacks: Annotated[
        tuple[Spec, ...],
        "an attack, made again at every eps (default: vmoe_pgd(linf(8/255)), the paper's, weak, and pgd(linf(8/255), "
        "steps=50, restarts=2))",
    ] = ()
    eps: Annotated[
        Numbers, "radii in pixels of [0, 1]; paper = 1/255 to 20/255 and six below 1/255, as in arXiv 2210.10253"
    ] = tuple(level / 255 for level in (1, 2, 4, 8, 12, 16))
    draws: Annotated[int, "draws of random experts; 0 = nothing about redundancy"] = 5
    limit: Annotated[int | None, "images to ask about"] = 500
    batch_size: Annotated[int, "images at a time"] = 128


@dataclass(frozen=True, kw_only=True)
class BlendOptions(Options):
    """How two models are blended, and how each blend is attacked."""

    alphas: Annotated[Numbers, "shares of the robust half"] = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
    attack: Annotated[
        Spec | None,
        "a pgd on the whole model, from which all attacks are made, such as pgd(linf(8/255), steps=50) (default: 20 "
        "steps at the threat of the robust run)",
    ] = None
    mix: Annotated[
        Literal["probabilities", "logits"] | None, "what is mixed (default: as the dual run does, else probabilities)"
    ] = None
    sharpen: Annotated[
        Spec | None, "what is done to the robust half first, such as scaled(2) or nuts (default: as the dual run does)"
    ] = None
    clean: Annotated[
        float | None, "a clean accuracy, such as 0.9; the largest alpha that has it on validation is chosen"
    ] = None
    certifier: Annotated[
        Spec | None,
        "what proves a floor under every alpha, at the attack's eps, such as bounds(linf(2/255), search=0) "
        "(default: none)",
    ] = None
    margins: Annotated[
        Margins | None,
        "for each image, {index: margin} or (n,), a lower bound over the whole ball of the robust half's probability "
        "of its class minus that of any other, by a certifier that the caller answers for",
        Mark.PYTHON,
    ] = None
    limit: Annotated[int | None, "test images to ask about"] = 500
    batch_size: Annotated[int, "images at a time"] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise UserError(
                    f"{alpha:g} is no alpha; expected shares of the robust half, from 0 (standard) to 1 (robust)"
                )
        if not self.alphas:
            raise UserError("there is no alpha; expected at least one, such as 0,0.5,1")
        object.__setattr__(self, "alphas", tuple(sorted(set(self.alphas))))
        if self.clean is not None and not 0 <= self.clean <= 1:
            raise UserError(f"the clean accuracy wanted is {self.clean:g}, expected a share from 0 to 1, such as 0.9")
        if self.certifier is not None and self.margins is not None:
            raise UserError("certifier and margins both say what is proven; expected one of them")
