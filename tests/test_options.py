"""`robustmoe.options`: one dataclass a verb is flag and keyword at once; a mistake in it is one line."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import robustmoe as rm
from robustmoe import options, theory, verbs
from robustmoe.attacks import PGD, linf
from robustmoe.errors import UserError
from robustmoe.evaluation.auditing import audit
from robustmoe.evaluation.checks.run import check_run
from robustmoe.flags import flags_of, parse
from robustmoe.options import (
    AuditOptions,
    BlendOptions,
    CertifyOptions,
    CheckOptions,
    DissectOptions,
    EvaluateOptions,
    EvaluateTarget,
    LipschitzOptions,
    Mark,
    Options,
    SharedOptions,
    SweepOptions,
    hints_of,
    read,
    takes,
)

KINDS: dict[str, type[Options]] = {
    "evaluate": EvaluateOptions,
    "audit": AuditOptions,
    "check": CheckOptions,
    "dissect": DissectOptions,
    "lipschitz": LipschitzOptions,
    "certify": CertifyOptions,
    "sweep": SweepOptions,
    "blend": BlendOptions,
}
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "evaluate": (rm.evaluate, rm.evaluate_run),
    "audit": (audit,),
    "check": (check_run,),
    "dissect": (rm.dissect, rm.dissect_run),
    "lipschitz": (rm.measure_lipschitz, rm.lipschitz_run),
    "certify": (rm.certify, rm.certify_run),
    "sweep": (rm.sweep, rm.sweep_run),
    "blend": (rm.blend, rm.blend_run),
}
LISTS = [
    (verb, name) for verb, kind in KINDS.items() for name in ("attacks", "certifiers", "only") if hasattr(kind, name)
]


def test_every_measuring_verb_has_one_class() -> None:
    classes = {kind for kind in vars(options).values() if isinstance(kind, type) and issubclass(kind, Options)}
    assert classes == {Options, SharedOptions, *KINDS.values()}
    for verb, kind in KINDS.items():
        assert typing.get_type_hints(verbs.VERBS[verb])["options"] is kind


@pytest.mark.parametrize("verb", KINDS)
def test_every_field_is_a_flag_and_a_keyword_with_one_default(verb: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(KINDS[verb])}
    assert dataclasses.MISSING not in fields.values()
    python = {name for name, hint in hints_of(KINDS[verb]).items() if Mark.PYTHON in typing.get_args(hint)}
    assert {flag.name for flag in flags_of(verbs.VERBS[verb]) if flag.group == "options"} == fields.keys() - python
    for function in FUNCTIONS[verb]:
        parameters = inspect.signature(function).parameters
        shown = {name: parameters[name].default for name in fields}
        own = {name for name in fields if shown[name] != fields[name]}
        assert own <= ({"limit", "curve"} if "run" not in function.__name__ else set()), "in hand, all images are taken"
        assert all(f"    {name}: " in (inspect.getdoc(function) or "") for name in fields)


def test_flags_make_the_options_that_keywords_make() -> None:
    argv = "run --attack fgsm(linf(0.1)) --attack pgd(linf(0.1)) --curve 0,2/255 --batch_size 8 --batch-size=9"
    argv += " --limit none"
    (arguments,) = [parse("evaluate", verbs.evaluate, argv.split())]
    fields = {"attacks": ["fgsm(linf(0.1))", "pgd(linf(0.1))"], "curve": "0,2/255", "batch_size": 9, "limit": None}
    assert arguments == {"target": EvaluateTarget(run="run"), "options": read(EvaluateOptions, fields)}
    assert arguments["options"].curve == (0.0, 2 / 255)


@pytest.mark.parametrize("verb, name", LISTS)
def test_a_single_thing_where_a_list_is_wanted_is_a_list_of_one(verb: str, name: str) -> None:
    text = {"certifiers": "bounds(linf(0.1))", "only": "G2"}.get(name, "pgd(linf(0.1), steps=3)")
    assert getattr(read(KINDS[verb], {name: text}), name) == (text,)
    assert getattr(read(KINDS[verb], {name: [text, text]}), name) == (text, text)


def test_one_run_and_one_experiment_need_no_list(tmp_path: Path) -> None:
    for run in ("runs/a", Path("runs/a")):
        with pytest.raises(UserError, match=r"runs/a.* is not a run folder"):
            rm.report(run, tmp_path / "page.html")
    assert [experiment.id for experiment in theory.run("X3")] == ["X3"]


def test_an_attack_itself_is_a_list_of_one() -> None:
    assert read(EvaluateOptions, {"attacks": PGD(linf(0.1))}).attacks == (PGD(linf(0.1)),)


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"limit": "5"}, "limit must be int.*; got '5'"),
        ({"limit": 0}, "the limit on images is 0, expected at least 1"),
        ({"limti": 5}, "unknown argument 'limti'; did you mean 'limit'.*"),
        ({"seed": 1.5}, "seed must be int; got 1.5"),
        ({"options": {"limit": 5}}, ".*Options; got dict"),
    ],
)
def test_a_mistake_is_one_line(verb: str, fields: dict[str, Any], message: str) -> None:
    for function in FUNCTIONS[verb]:
        with pytest.raises(UserError, match=message):
            function("run", **fields)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (EvaluateOptions, {"batch_size": 0}, "the batch size is 0, expected at least 1"),
        (EvaluateOptions, {"precision": "int8"}, "precision must be one of 'strict', 'fast', 'fp32'; got 'int8'"),
        (EvaluateOptions, {"split": "tests"}, "split must be one of 'test', 'val', 'train'; got 'tests'"),
        (EvaluateOptions, {"attacks": "pgd("}, "cannot read 'pgd\\('.*"),
        (EvaluateOptions, {"curve": "0,x"}, "'0,x' is not a list of numbers.*"),
        (EvaluateOptions, {"certified": [0.1]}, "certified must be a mapping.*; got list"),
        (SweepOptions, {"draws": -1}, "the draws of random experts are -1, expected 0 .none. or more"),
        (BlendOptions, {"clean": 90.0}, "the clean accuracy wanted is 90, expected a share from 0 to 1.*"),
        (BlendOptions, {"certifier": "bounds", "margins": [0.1]}, "certifier and margins both say what is proven.*"),
    ],
)
def test_a_bad_value_is_one_line(kind: type[Options], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(kind, fields)


def test_options_are_given_whole_or_field_by_field() -> None:
    @takes(DissectOptions, limit=None)
    def shown(run: str, *, options: DissectOptions) -> tuple[str, DissectOptions]:
        """Shows what it was given."""
        return run, options

    assert shown("a") == ("a", DissectOptions(limit=None))
    assert shown("a", limit=3, seed=1) == ("a", DissectOptions(limit=3, seed=1))
    assert shown("a", options=DissectOptions(batch_size=7)) == ("a", DissectOptions(batch_size=7, limit=500))
    assert shown("a", options=DissectOptions(batch_size=7), seed=2) == ("a", DissectOptions(batch_size=7, seed=2))


@pytest.mark.parametrize("number", [1 / 255, 0.05, 1.0])
def test_words_stand_for_values(number: float) -> None:
    assert read(SweepOptions, {"eps": "paper"}).eps == options.PAPER_EPS
    assert read(SweepOptions, {"eps": [number]}).eps == (number,)
    assert read(EvaluateOptions, {"curve": "none"}).curve == ()
    assert read(EvaluateOptions, {"curve": "auto"}).curve is None
