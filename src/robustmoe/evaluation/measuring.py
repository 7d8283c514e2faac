"""Attack a data set and write rows: `evaluate` for a model in hand, `evaluate_run` for a run folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from robustmoe import distributed
from robustmoe import spec as specs
from robustmoe.analysis import judge, robust
from robustmoe.attacks import Attack, Threat, at_radius, build_attack, linf
from robustmoe.data import Data, ImageSet
from robustmoe.errors import UserError
from robustmoe.evaluation import checks, engine
from robustmoe.evaluation.choosing import attacks_for, one_norm, radii_of, seeded, spec_or_repr, threat_of
from robustmoe.evaluation.curve import broken_below, nearest_within
from robustmoe.evaluation.fitting import fit
from robustmoe.evaluation.meters import Clock, Meter
from robustmoe.evaluation.peers import Peers
from robustmoe.evaluation.session import Images, Labels, Session, about_run, device_of, eval_mode_on, in_hand
from robustmoe.options import EvaluateOptions, takes
from robustmoe.progress import note
from robustmoe.records import (
    Check,
    Evaluation,
    Header,
    Records,
    Row,
    Writer,
    examples_path,
    file_stem,
    read_examples,
    versions,
)
from robustmoe.runs import named
from robustmoe.training.checkpoint import load_model, read_config, run_data

CURVE_LIMIT = 256
"""Images that a curve is made of at most."""


@takes(EvaluateOptions, curve=())
def evaluate(
    model: Callable[[Tensor], Tensor],
    x: Images,
    y: Labels = None,
    *,
    options: EvaluateOptions,
    num_classes: int | None = None,
    name: str | None = None,
    out: str | Path | None = None,
) -> Records[Evaluation]:
    """Attacks ``model`` on images and returns what each attack left, image by image.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c). ``x``, ``y``: images (n, ch, h, w) in
    [0, 1] with labels (n), or one of the project's data sets or its spec. By default the attacks are PGD-20 at linf
    8/255 on the whole model; for a routed model also on its experts alone and on its routers alone, and
    `ExpertTransition` into every expert's region (with token routers `RouteBeam`). ``name``: what tables call the
    model. ``out``: a folder for the rows (resumable; by default temporary). Under torchrun the processes share the
    work. Raises UserError for images outside [0, 1], labels out of range, a model that fails or whose output is not
    (n, c). The model keeps its modes and device.

    A ``curve`` runs the simple attack that the fewest images survived again at its radii, on at most 256 images.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        in_hand(model, x, y, options, num_classes, name) as session,
        distributed.session(session.device),
    ):
        return _evaluated(session, Path(out or scratch), linf(8 / 255))


@takes(EvaluateOptions)
def evaluate_run(
    run: str | Path, *, options: EvaluateOptions, data: str | None = None, out: str | Path | None = None
) -> Records[Evaluation]:
    """Evaluates a run folder with each attack into ``RUN/rows`` (or ``out``), one file an attack; returns their
    contents.

    The attacks are by default those of the run's recipe, else `evaluate`'s at the radius it was trained for. ``data``:
    another data set than the run's. What is already in a file is kept, and only missing images are attacked. The
    ``curve`` is by default at a quarter to twice the attack's own radius (suites are never run again). Raises UserError
    where `evaluate` does.
    """
    with session_on(run, options, data) as (session, threat):
        return _evaluated(session, Path(out or session.options.folder(named(run)) / "rows"), threat)


@contextlib.contextmanager
def session_on(run: str | Path, options: EvaluateOptions, data: str | None = None) -> Iterator[tuple[Session, Threat]]:
    """The session of `evaluate_run`, and the ball that the run was trained for. Nothing is written."""
    run = named(run)
    config = read_config(run)
    device = device_of(options)
    model = load_model(run, device)
    source: Data = specs.build(data, "data") if data else run_data(run, config)
    if source.num_classes != config["num_classes"] or list(source.image_shape) != config["image_shape"]:
        raise UserError(
            f"{run} is a model for {config['num_classes']} classes and images "
            f"{tuple(config['image_shape'])}; the data have "
            f"{source.num_classes} classes and images {source.image_shape}"
        )
    images: ImageSet = getattr(source, options.split).head(options.limit)
    options = replace(options, attacks=options.attacks or tuple(config.get("attacks") or ()))
    about = about_run(run, config, source, options.split, data)
    with eval_mode_on(device, model), distributed.session(device):
        yield Session(model, images, device, options, about), threat_of(config)


def chosen_attacks(session: Session, threat: Threat) -> list[Attack]:
    """The attacks of an evaluation as they are made. ``threat``: of the default ones."""
    options: EvaluateOptions = session.options
    asked = attacks_for(session.output, [build_attack(attack) for attack in options.attacks], threat)
    return [seeded(attack, options.seed).for_verdict() for attack in asked]


def _evaluated(session: Session, out: Path, threat: Threat) -> Records[Evaluation]:
    """Runs every attack, and the curve of one of them. ``threat``: of the default attacks."""
    options: EvaluateOptions = session.options
    chosen = chosen_attacks(session, threat)
    one_norm(chosen, options.certified)
    end = "" if options.split == "test" else f"-{options.split}"
    fit(session, chosen, [_rows_path(out, end, attack) for attack in chosen])
    options = session.options
    _shareable(options, len(session.images))
    simple = [len(attack.parts(session.output)) == 1 for attack in chosen]  # a suite at every radius would take hours
    if options.curve and not any(simple):
        raise UserError("a curve needs a simple attack beside the suite; add --attack, such as one of kind pgd")
    radii = {attack.threat: radii_of(attack.threat, options.curve) for attack in chosen}
    results = [attack_images(session, attack, _rows_path(out, end, attack)) for attack in chosen]
    if any(simple) and options.shard is None:
        pairs = [pair for pair, alone in zip(zip(chosen, results), simple) if alone]
        strongest, whole = min(pairs, key=lambda pair: sum(map(robust, pair[1].rows)))
        shown = Peers().first(partial(_shown, _rows_path(out, end, strongest), whole))
        curve_path = partial(_rows_path, out, f"{end}-curve")
        results += _curve(session, strongest, whole, radii[strongest.threat], curve_path, shown)
    _tell(results)
    return Records(results)


def _shareable(options: EvaluateOptions, n: int) -> None:
    """UserError where a share has no images, or for a curve, which takes what all shares found."""
    if options.shard is not None and options.curve:
        raise UserError("a curve takes what all shards found; leave --curve out, merge them, and evaluate the whole")
    engine.assert_shared(n, options.at_a_time, options.share)


def _shown(rows: Path, whole: Evaluation) -> frozenset[int]:
    """The images that are kept to look at beside a rows file."""
    path = examples_path(rows)
    return frozenset(example.index for example in read_examples(path, whole.header)) if path.exists() else frozenset()


def _curve(
    session: Session,
    attack: Attack,
    whole: Evaluation,
    radii: Sequence[float],
    path: Callable[[Attack], Path],
    shown: frozenset[int],
) -> list[Evaluation]:
    """The attack at each radius, on the first images, of which those are attacked whose answer at another radius
    (``whole``: at the attack's own) does not tell it. ``shown``: images to look at, so that they are the same at every
    radius.
    """
    few = session.on(session.images.head(CURVE_LIMIT))
    wanted = set(few.images.index.tolist())
    done: dict[float, Evaluation] = {}
    for eps in sorted(radii, reverse=attack.finds_nearest):
        if not attack.finds_nearest:
            known = broken_below(eps, [whole, *done.values()], wanted)
        else:
            known = nearest_within(eps, attack.threat.norm, done[max(done)].rows) if done else []
        there = at_radius(attack, eps)
        done[eps] = attack_images(few, there, path(there), "curve", known, shown)
    return [done[eps] for eps in radii]


def _tell(results: Sequence[Evaluation]) -> None:
    """Says on stderr, in one line, which checks speak against the numbers, if some do."""
    verdict = judge(results)
    loud = [*sorted(verdict.failed, key=lambda said: not said.startswith(("R18 ", "G15 "))), *verdict.warned]
    if loud:
        counts = f"{len(verdict.failed)} failed, {len(verdict.warned)} warned"
        more = f" (and {len(loud) - 1} more: print the result)" if len(loud) > 1 else ""
        note(f"checks: {counts}: {loud[0]}{more}")


def _rows_path(folder: Path, end: str, attack: Attack) -> Path:
    return folder / f"{file_stem(spec_or_repr(attack))}{end}.jsonl"


def attack_images(
    session: Session,
    attack: Attack,
    path: Path,
    role: str = "main",
    known: Sequence[Row] = (),
    shown: frozenset[int] | None = None,
) -> Evaluation:
    """Runs one attack on every image, row by row into ``path``; images that are there already are skipped, and so are
    those whose row is ``known``; the checks are made anew. ``shown``: see `engine.EvaluationWork`, ``wanted``. Called
    by every process of a `distributed.session`; the first one writes, and each returns the whole result.
    """
    peers, images, options = Peers(), session.images, session.options
    plan = engine.plan_of(attack, session.output, images, options.certified)
    header, clock = partial(_header, session, attack, plan, role), Clock()
    with contextlib.ExitStack() as stack:
        writer = peers.only_first(
            lambda: stack.enter_context(Writer(path, header(len(images)), header, session.recognise))
        )
        here = len(engine.in_share(len(images), options.at_a_time, options.share))
        ledger = peers.first(lambda: _ledger(writer, here, known))
        if writer is not None:
            versions.tell(path, writer.resumed)
        if ledger is not None:
            before = peers.first(partial(_before, session, attack))
            fingerprint, meter = checks.fingerprint(session.model), Meter()
            _same_everywhere(peers, fingerprint, images)
            climbed = session.surrogate(meter, options.precision)
            work = engine.EvaluationWork(
                session.model, climbed, images, plan, options.at_a_time, session.device, meter, shown, options.share
            )
            engine.run(work, ledger, writer, peers, clock, spec_or_repr(attack))
            pairs = peers.gather((fingerprint, checks.fingerprint(session.model)))
            changed = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
            peers.first(lambda: _finish(writer, before, changed, attack.threat, clock))
        return peers.first(lambda: _result(writer))


def _header(session: Session, attack: Attack, plan: engine.Plan, role: str, n: int) -> Header:
    """The header of the same work on the first ``n`` images; ``plan``: of all."""
    some, options = session.images.head(n), session.options
    whole = n == len(session.images) or not plan.certified
    own = plan if whole else engine.plan_of(attack, session.output, some, options.certified)
    return session.attack_header(attack, some, own, role=role, precision=options.precision)


def _ledger(writer: Writer | None, n: int, known: Sequence[Row]) -> engine.Ledger | None:
    """What is done already, with what is ``known``; None where all is."""
    assert writer is not None
    finished = len(writer.done) == n and writer.checks is not None
    if not finished:
        writer.write(known)
    return None if finished else engine.Ledger.of(writer, examples_path(writer.path))


def _before(session: Session, attack: Attack) -> list[Check]:
    """The checks that need no attack."""
    classes = len(session.about.classes)
    return checks.before(session.model, attack, session.probe, session.output, classes)


def _finish(writer: Writer | None, before: list[Check], changed: tuple[str, str], threat: Threat, clock: Clock) -> None:
    """Writes the checks: those made ``before`` the attack, and those of what it left."""
    assert writer is not None
    after = checks.after(checks.Finished(writer.result.rows, threat.norm, threat.eps, changed))
    answers = sorted([*before, *after], key=lambda check: (check.id[0], int(check.id[1:])))
    writer.finish(answers, writer.seconds + clock.lap())


def _result(writer: Writer | None) -> Evaluation:
    assert writer is not None
    return writer.result


def _same_everywhere(peers: Peers, fingerprint: str, images: ImageSet) -> None:
    """Raises UserError where the processes came with different weights or images: their rows would be of different
    work.
    """
    if peers.world > 1 and len(set(peers.gather((fingerprint, images.fingerprint)))) > 1:
        raise UserError(
            "the processes hold different models or images; build and load them alike in each (one seed, one file)"
        )
