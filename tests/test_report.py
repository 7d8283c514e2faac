"""The report on synthetic run folders: its numbers, its honesty, its HTML."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import random
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from objective_infos import EXPERTS_ONLY, JOINT, ROUTER_ONLY, ROUTING
from robustmoe import analysis
from robustmoe.errors import UserError
from robustmoe.records import (
    Audit,
    Check,
    Checks,
    Evaluation,
    Example,
    Header,
    Resumed,
    RouterInfo,
    Row,
    Writer,
    append_json,
    read,
    read_examples,
    write_examples,
)
from robustmoe.records.typed import encode
from robustmoe.reporting import report, summary_table
from robustmoe.reporting.figures import ticks
from robustmoe.reporting.page import script
from robustmoe.reporting.words import duration, eps_text, percent, route_text

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EPS = 8 / 255
PASSED = [
    Check(
        "H2",
        "inside the ball",
        "pass",
        0.0313725,
        "The largest perturbation, measured again in fp32, is inside the threat.",
    ),
    Check("H4", "same answer alone", "pass", 0, "256 images asked again in batches of one: no answer changed."),
    Check(
        "G5", "attack converged", "warn", 0.07, "7.0% of the images still gained loss in the last tenth of the steps."
    ),
    Check("G13", "planted adversary", "not run", None, "Not run: give --planted to run it."),
]
R1 = Check("R1", "router reached", "pass", 0.31, "31% of the input gradient's norm flows through the router.")
R1_FAILED = Check("R1", "router reached", "fail", 0.0, "No gradient reaches the image through the router.")


def make_header(**changes: Any) -> Header:
    """A header of a routed model; any field can be changed."""
    values: dict[str, Any] = {
        "run": "pathway", "model": "pathway(resnet18, experts=4, ratio=0.5)", "data": "cifar10", "split": "test",
        "attack": "pgd(linf(8/255), steps=50)", "objective": JOINT, "norm": "linf", "eps": EPS, "role": "main",
        "method": "advmoe(pgd(linf(8/255), steps=10))", "n": 80, "seed": 0, "data_hash": "d0d0cafe",
        "index_hash": "1dx0beef", "model_hash": "m0de1234", "commit": "0123abc", "device": "cpu", "threads": 2,
        "versions": {"robustmoe": "0.1.0", "torch": "2.13.0", "numpy": "2.1.0", "python": "3.11.7"},
        "precision": "fp32", "command": "robustmoe evaluate runs/pathway", "classes": CLASSES,
        "routers": {"router": RouterInfo(4, 1, 1)}, "parameters": 11_173_962, "started": "2026-11-21T10:00:00",
    }  # fmt: skip
    return Header(**{**values, **changes})


def make_rows(header: Header, strength: float, seed: int = 1, n: int | None = None) -> list[Row]:
    """Rows of a made-up model that is right on about 80 % and keeps ``1 - strength`` of them; the routers prefer
    experts by class."""
    noise = random.Random(7)
    luck = random.Random(seed)
    rows = []
    for index in range(header.n if n is None else n):
        label = index % len(header.classes)
        clean = label if noise.random() < 0.8 else (label + 1) % len(header.classes)
        broken = luck.random() < strength
        adversarial = (label + 3) % len(header.classes) if broken else clean
        route_clean, route_adversarial, rerouted = {}, {}, {}
        for name, info in header.routers.items():
            home = (label * info.experts // len(header.classes) + (noise.random() < 0.25)) % info.experts
            away = (home + 1) % info.experts if broken and luck.random() < 0.6 else home
            total = info.items * info.k
            route_clean[name] = [total if expert == home else 0 for expert in range(info.experts)]
            route_adversarial[name] = [total if expert == away else 0 for expert in range(info.experts)]
            rerouted[name] = float(away != home)
        beside = (label + 1) % len(header.classes)
        exposed = (clean if luck.random() < 0.8 else beside, clean if luck.random() < 0.6 else beside)
        size = {"linf": header.eps, "l2": 1.2, "l1": 55.0, "box": 0.0}
        rows.append(Row(index, label, clean, adversarial, size, rerouted,
                        exposed[0] if header.routers else None, exposed[1] if header.routers else None,
                        route_clean, route_adversarial))  # fmt: skip
    return rows


def picture(seed: int, change: int = 0, side: int = 32) -> str:
    """A base64 PNG: a smooth blob, with grains of ``change`` grey levels."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    base = np.stack([np.sin(6 * x + seed), np.cos(5 * y - seed), np.sin(4 * (x + y) + 2 * seed)], -1) * 80 + 128
    grains = np.random.default_rng(seed + 99).choice([-change, change], size=base.shape) if change else 0
    array = np.clip(base + noise.normal(0, 6, base.shape) + grains, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_examples(header: Header, rows: list[Row], number: int = 6) -> list[Example]:
    """Examples of the images that the attack broke."""
    broken = [row for row in rows if row.clean == row.label != row.adversarial][:number]
    return [
        Example(row.index, row.label, row.clean, row.adversarial, row.route_clean, row.route_adversarial,
                picture(row.index), picture(row.index, 8))
        for row in broken
    ]  # fmt: skip


def write_rows(run: Path, slug: str, header: Header, rows: list[Row], checks: list[Check] | None) -> Path:
    """One rows file; unfinished if ``checks`` is None."""
    path = run / "rows" / f"{slug}.jsonl"
    with Writer(path, header) as writer:
        writer.write(rows)
        if checks is not None:
            writer.finish(checks, 75.0)
    return path


def make_run(
    tmp_path: Path,
    *,
    name: str = "pathway",
    routed: bool = True,
    items: int = 1,
    routers: int = 1,
    attacks: tuple[tuple[str, str, float], ...] = (
        ("pgd(linf(8/255), steps=50)", JOINT, 0.40),
        ("apgd(linf(8/255), steps=100, loss='dlr')", JOINT, 0.43),
        ("pgd(linf(8/255), steps=50)", EXPERTS_ONLY, 0.30),
        ("route_flip(linf(8/255))", ROUTER_ONLY, 0.12),
    ),
    r1: Check = R1,
    stop_after: int | None = None,
    curve: bool = True,
    training: bool = True,
    examples: bool = True,
    n: int = 80,
    **changes: Any,
) -> Path:
    """A synthetic run folder. ``stop_after``: rows of the first attack, which is then unfinished."""
    run = tmp_path / name
    infos = {f"router{at if routers > 1 else ''}": RouterInfo(4, 1, items) for at in range(routers)} if routed else {}
    common = {"run": name, "n": n, "routers": infos, **changes}
    checks = [*PASSED, r1] if routed else list(PASSED)
    for at, (attack, objective, strength) in enumerate(attacks):
        header = make_header(attack=attack, objective=objective, **common)
        stop = stop_after if at == 0 else None
        rows = make_rows(header, strength, seed=at, n=stop)
        path = write_rows(run, f"attack{at}", header, rows, None if stop is not None else checks)
        if examples and stop is None:
            write_examples(path.with_suffix(".examples.jsonl"), make_examples(header, rows))
    for eps in (2, 4, 6, 12, 16) if curve else ():
        header = make_header(attack=f"pgd(linf({eps}/255), steps=50)", eps=eps / 255, role="curve",
                             **{**common, "n": n // 2})  # fmt: skip
        write_rows(run, f"curve{eps}", header, make_rows(header, min(1, 0.055 * eps), seed=0), checks)
    if training:
        make_training(run, routed, list(infos))
    return run


def make_training(run: Path, routed: bool, routers: list[str], epochs: int = 6) -> None:
    """config.json and metrics.jsonl of a run that learns."""
    config = {
        "model": "pathway(resnet18, experts=4)", "data": "cifar10", "method": "advmoe(pgd(linf(8/255), steps=10))",
        "optimizer": "sgd(momentum=0.9)", "schedule": "one_cycle(0.1)", "epochs": epochs, "batch_size": 128,
        "augment": "crop+flip", "precision": "bf16", "ema": None, "clip": 1.0, "seed": 3,
        "val_attack": "pgd(linf(8/255), steps=10)",
        "num_classes": 10, "image_shape": [3, 32, 32], "classes": CLASSES, "parameters": 11_173_962,
        "versions": {"torch": "2.13.0"}, "commit": "0123abc", "data_hash": "d0d0cafe",
        "selection": "The epoch with the highest robust accuracy on 1,000 held-out training images.",
        "command": "robustmoe train recipes/advmoe_cifar10.toml --out runs/pathway", "hardware": "2 cores, 8 GB",
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    for epoch in range(1, epochs + 1):
        t = epoch / epochs
        phases = ("experts", "router") if routed else ("all",)
        tilt = 0.25 + 0.14 * math.sin(4 * t)
        load = [tilt, 0.5 - tilt, 0.3 - 0.1 * t, 0.2 + 0.1 * t]
        state = {
            "load": load,
            "entropy": 1.386 - 0.7 * t,
            "dead": [],
            "grad_norm": 0.3,
            "moved": True,
            "declared_fixed": False,
        }
        append_json(run / "metrics.jsonl", {
            "epoch": epoch, "step": 352 * epoch, "seconds": 110.0,
            "lr": {phase: 0.1 * (1 - t) / (1 + at * 3) for at, phase in enumerate(phases)},
            "loss": {phase: (2.3 - at * 0.9) * math.exp(-1.1 * t) for at, phase in enumerate(phases)},
            "grad_norm": dict.fromkeys(phases, 1.0),
            "train_accuracy": 0.2 + 0.5 * t, "val_clean": 0.25 + 0.55 * t ** 0.7,
            "val_robust": 0.2 + 0.28 * t ** 0.8 if epoch % 2 == 0 else None, "val_n": 1000,
            "routers": dict.fromkeys(routers, state), "best": epoch == epochs - 1,
        })  # fmt: skip


class Page(HTMLParser):
    """Checks that tags nest, and collects text, ids, tags and what is loaded."""

    VOID = ("meta", "link", "img", "br", "i/", "line", "path", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.missing_alt = 0
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.loads += [found[key] or "" for key in ("src", "href", "srcset", "data") if key in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        self.missing_alt += (tag == "img" and not found.get("alt")) or (tag == "svg" and not found.get("aria-label"))
        assert not any(key.startswith("on") for key in found)
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"closes nothing: {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(run: Path | list[Path], tmp_path: Path) -> tuple[Page, dict[str, Any], str, str]:
    """Report it; the page parsed, the JSON, the Markdown and the page's source."""
    out = report(run if isinstance(run, list) else [run], tmp_path / "out" / "report.html")
    source = out.read_text()
    return Page(source), json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text(), source


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], str, str, Path]:
    folder = tmp_path_factory.mktemp("routed")
    run = make_run(folder)
    return *made(run, folder), run


def test_each_measurement_says_who_went_on_with_it(tmp_path: Path) -> None:
    import test_dissection
    from robustmoe.reporting import dissection as dissection_panel

    later = Resumed({"torch": "2.99"}, "fedcba9876543210", "2026-11-29T10:00:00", 7)
    run = make_run(tmp_path, n=4, curve=False, attacks=(("pgd(linf(8/255), steps=50)", JOINT, 0.4),))
    dissection = test_dissection.record()
    taken_up = [dataclasses.replace(later, done=2)]
    header = dataclasses.replace(dissection.header, model_hash=make_header().model_hash, resumed=taken_up)
    dataclasses.replace(dissection, header=header).write(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "resumed": [encode(dataclasses.replace(later, done=30))]}))
    _, _, text, source = made(run, tmp_path)
    said = "by torch 2.99, commit fedcba987654"
    assert f"| resumed, training | after 30, {said} |" in text
    assert f"| resumed, {dissection_panel.KIND.title} | after 2, {said} |" in text
    assert text.count("| resumed, ") == 2, "the rows went on under the same versions"
    rows = run / "rows" / "attack0.jsonl"
    first, *rest = rows.read_text().splitlines()
    changed = {**json.loads(first), "resumed": [encode(later), encode(dataclasses.replace(later, done=9))]}
    rows.write_text("\n".join([json.dumps(changed), *rest, ""]))
    _, _, text, source = made(run, tmp_path)
    name = analysis.names([read(rows).header])[0]
    assert f"| resumed, {name} | after 7, {said}; after 9, {said} |" in text
    assert f"<dt>resumed, {name}</dt><dd>after 7, {said}; after 9, {said}</dd>" in source


def test_page_is_one_quiet_file(routed: tuple[Page, dict[str, Any], str, str, Path]) -> None:
    page, _, _, source, _ = routed
    assert all(link.startswith(("data:", "#")) for link in page.loads)
    assert "://" not in source
    assert page.scripts == [script()], "our own script, and it alone may run"
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in source
    assert page.missing_alt == 0
    assert len(source) < 1_000_000
    assert {link[1:] for link in page.loads if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_headline_is_the_hand_counted_worst_case(routed: tuple[Page, dict[str, Any], str, str, Path]) -> None:
    page, numbers, text, source, run = routed
    files = [read(run / "rows" / f"attack{at}.jsonl") for at in range(4)]
    right = sum(row.clean == row.label for row in files[0].rows)
    alive = sum(all(f.rows[i].clean == f.rows[i].label == f.rows[i].adversarial for f in files) for i in range(80))
    headline = numbers["runs"][0]["headline"]
    assert (headline["clean"]["count"], headline["robust"]["count"], headline["n"]) == (right, alive, 80)
    assert headline["router_attacked"] is True
    assert headline["trusted"] is True
    shown = f"{100 * alive / 80:.1f}%"
    assert f'<dd class="big">{shown}' in source
    assert shown in text
    assert "†" not in page.text.replace("marked †", "")


def test_all_sections_are_there(routed: tuple[Page, dict[str, Any], str, str, Path]) -> None:
    page, numbers, _, _, _ = routed
    assert page.ids == ["verdict", "attacks", "eps", "training", "routers", "experts", "images", "checks", "made"]
    assert page.tags.count("img") == 3 * 6
    assert page.text.count("robustmoe train recipes/advmoe_cifar10.toml") == 1
    assert [round(point["eps"] * 255) for point in numbers["runs"][0]["curves"][0]["points"]] == [0, 2, 4, 6, 8, 12, 16]
    assert numbers["runs"][0]["evaluation_seconds"] == 9 * 75.0


def test_missing_pieces_drop_their_section(tmp_path: Path) -> None:
    page, numbers, _, _ = made(make_run(tmp_path, training=False, curve=False, examples=False), tmp_path)
    assert page.ids == ["verdict", "attacks", "experts", "checks", "made"]
    assert numbers["runs"][0]["training"] == []


def test_dense_model_has_no_router_columns(tmp_path: Path) -> None:
    attacks = (("pgd(linf(8/255), steps=50)", JOINT, 0.4),)
    page, numbers, _, source = made(make_run(tmp_path, routed=False, attacks=attacks, model="resnet18"), tmp_path)
    assert {"experts", "routers"}.isdisjoint(page.ids)
    assert re.findall(r'<th scope="col">', source[source.index('id="attacks"') : source.index('id="eps"')]) == 5 * [
        '<th scope="col">'
    ]
    assert numbers["runs"][0]["headline"]["router_attacked"] is None
    assert numbers["runs"][0]["headline"]["trusted"] is True


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"attacks": (("pgd(linf(8/255), steps=50)", EXPERTS_ONLY, 0.3),)}, "no attack aims at the router"),
        ({"r1": R1_FAILED}, "check R1 failed: No gradient reaches"),
    ],
)
def test_an_unattacked_router_marks_the_number(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    _, numbers, text, source = made(make_run(tmp_path, **changes), tmp_path)
    headline = numbers["runs"][0]["headline"]
    assert headline["router_attacked"] is False
    assert headline["trusted"] is False
    assert reason in headline["reason"]
    assert source.count('<div class="alarm"') == 1
    assert re.search(r'<dd class="big marked">[\d.]+%†', source)
    assert "**no** †" in text


def test_a_failed_check_marks_the_number(tmp_path: Path) -> None:
    run = make_run(tmp_path, curve=False)
    failed = Check("H4", "same answer alone", "fail", 8, "8 of 256 images change their answer in a batch of one.")
    header = make_header(attack="square(linf(8/255))")
    write_rows(run, "square", header, make_rows(header, 0.1, seed=9), [failed, R1])
    _, numbers, text, source = made(run, tmp_path)
    assert numbers["runs"][0]["headline"]["failed"] == [
        "H4 same answer alone: 8 of 256 images change their answer in a batch of one."
    ]
    assert 'class="big marked"' in source
    assert " †" in text


def test_an_unfinished_evaluation_says_so(tmp_path: Path) -> None:
    _, numbers, text, source = made(make_run(tmp_path, stop_after=37), tmp_path)
    headline = numbers["runs"][0]["headline"]
    assert headline["incomplete"] == ["pgd(linf(8/255), steps=50): 37 of 80 images"]
    assert headline["n"] == 80  # the finished attacks' images
    assert " †" in text
    assert 'class="big marked"' in source


def test_an_evaluation_without_checks_says_so(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    header = make_header(n=20)
    write_rows(run, "pgd", header, make_rows(header, 0.4), None)
    _, numbers, _, source = made(run, tmp_path)
    headline = numbers["runs"][0]["headline"]
    assert headline["trusted"] is False
    assert [sentence.rpartition(": ")[2] for sentence in headline["incomplete"]] == [
        "not finished, its checks were not run"
    ]
    assert source.count('class="chip fail"') == 1


def test_clean_only_run(tmp_path: Path) -> None:
    run = tmp_path / "clean"
    header = make_header(attack=None, objective=None, n=20)
    write_rows(run, "clean", header, make_rows(header, 0.0), [])
    page, numbers, _, source = made(run, tmp_path)
    assert (numbers["runs"][0]["headline"], numbers["runs"][0]["clean"]["n"]) == (None, 20)
    assert page.ids == ["verdict", "attacks", "experts", "made"]
    assert source.count('<dd class="big">') == 1, "clean accuracy alone"


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    attacks = (
        ("pgd(linf(8/255), steps=50)", JOINT, 0.5),
        ("apgd(linf(8/255), steps=100, loss='dlr')", JOINT, 0.55),
    )
    first = make_run(tmp_path)
    second = make_run(tmp_path, name="dense-twin", routed=False, attacks=attacks, model="resnet18", model_hash="dense")
    page, numbers, text, _ = made([first, second], tmp_path)
    assert [run["run"] for run in numbers["runs"]] == ["pathway", "dense-twin"]
    assert numbers["not_comparable"] == []
    assert text.count("\n## ") == 3  # two runs and the words
    for run in numbers["runs"]:
        assert f"{100 * run['headline']['robust']['value']:.1f}%" in page.text


def test_runs_on_other_images_are_not_compared_silently(tmp_path: Path) -> None:
    first = make_run(tmp_path, curve=False)
    second = make_run(tmp_path, name="other", index_hash="elsewhere", eps=4 / 255, curve=False)
    _, numbers, _, source = made([first, second], tmp_path)
    expected = ["these runs were evaluated on different images", "these runs were evaluated on different eps"]
    assert numbers["not_comparable"] == expected
    assert source.index('class="alarm mild"') < source.index('class="cards"')


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / side, curve=False, training=False) for side in ("a", "b")]
    page, _, _, _ = made(runs, tmp_path)
    assert str(runs[0]) in page.text


HOSTILE = '<script>alert("x")</script>&\'"><img src=x onerror=1>'


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    classes = [f"{HOSTILE}{label}" for label in range(10)]
    run = make_run(
        tmp_path, model=HOSTILE, data=HOSTILE, method=HOSTILE, command=HOSTILE, commit=HOSTILE, classes=classes
    )
    header = make_header(attack=HOSTILE, routers={HOSTILE: RouterInfo(4, 1, 1)}, classes=classes)
    bad = Check("X1", HOSTILE, "fail", HOSTILE, HOSTILE)
    path = write_rows(run, "hostile", header, make_rows(header, 1.0), [bad])
    examples = make_examples(header, make_rows(header, 1.0), 2)
    write_examples(
        path.with_suffix(".examples.jsonl"),
        [*examples, Example(0, 0, 0, 9, *[{HOSTILE: [1, 0, 0, 0]}] * 2, HOSTILE, HOSTILE)],
    )
    (run / "config.json").write_text(json.dumps({"method": HOSTILE, "command": HOSTILE, "optimizer": HOSTILE}))
    append_json(run / "metrics.jsonl", {"epoch": 21, "loss": {HOSTILE: 1.0}, "lr": {HOSTILE: 0.1},
                "routers": {HOSTILE: {"load": [0.5, 0.5, 0, 0], "entropy": 0.1, "dead": [2, 3]}}})  # fmt: skip
    page, numbers, text, source = made(run, tmp_path)
    assert HOSTILE in page.text
    assert page.scripts == [script()]
    assert source.count("<script") == 1
    assert "onerror=1>" not in source
    assert "<script" not in re.sub(r"^    .*$", "", text, flags=re.M)  # commands are indented code
    assert numbers["runs"][0]["model"] == HOSTILE


def test_odd_metrics_do_not_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, training=False, curve=False)
    append_json(
        run / "metrics.jsonl",
        {"epoch": 1, "loss": {"all": math.nan}, "val_clean": 0.1, "routers": {"r": {"load": [1.0]}}},
    )
    page, numbers, _, _ = made(run, tmp_path)
    assert "training" in page.ids
    assert numbers["runs"][0]["training"][0]["loss"]["all"] is None


@pytest.mark.parametrize("side", [2**13, 10**5, 2**31 - 1])
def test_an_example_that_claims_to_be_huge_is_left_out_and_said(tmp_path: Path, side: int) -> None:
    run = make_run(tmp_path, curve=False, training=False)
    for path in (run / "rows").glob("*.examples.jsonl"):
        first, *others = read_examples(path, read(path.with_name(path.name.replace(".examples", ""))).header)
        content = bytearray(base64.b64decode(first.before))
        content[16:24] = side.to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        write_examples(path, [dataclasses.replace(first, before=base64.b64encode(content).decode()), *others])
    page, _, _, _ = made(run, tmp_path)
    assert "1 damaged example left out." in page.text


def test_many_routers_of_many_tokens(tmp_path: Path) -> None:
    page, numbers, _, source = made(make_run(tmp_path, routers=16, items=64, n=60, training=True), tmp_path)
    assert [len(load["clean"]) for load in numbers["runs"][0]["load"]] == [10] * 16
    assert page.text.count("more routers") == 2, "8 loads and 12 drawings of health are not drawn"
    assert len(source) < 1_000_000


@pytest.mark.parametrize(
    "prepare, match",
    [
        (lambda run: None, r"is not a run folder: expected config\.json and rows/.*`robustmoe evaluate RUN`"),
        (lambda run: (run / "rows").mkdir(parents=True), r"has no rows yet; `robustmoe evaluate .*run` makes them"),
        (lambda run: write_rows(run, "a", make_header(), [], None), "has no rows yet"),
        (
            lambda run: (make_run(run.parent, name="run", n=10) / "config.json").write_text("[1]"),
            r"the file is damaged \(not a JSON object\)",
        ),
    ],
)
def test_what_is_no_run(tmp_path: Path, prepare: Any, match: str) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=match):
        report([tmp_path / "run"], tmp_path / "out.html")
    with pytest.raises(UserError, match="nothing to report"):
        report([], tmp_path / "out.html")


def test_where_the_files_go(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False, examples=False)
    assert report([run], run) == run / "report.html"
    assert report([run], tmp_path / "v1.2") == tmp_path / "v1.2.html"
    assert sorted(path.name for path in tmp_path.glob("v1*")) == ["v1.2.html", "v1.2.json", "v1.2.md"]
    assert report([run], run) == run / "report.html"  # an earlier report may be overwritten
    (tmp_path / "README.md").write_text("mine")
    for out, match in (
        ("README.html", r"README\.md is there, and robustmoe did not write it, so it was left alone"),
        (
            "pathway/config.html",
            r"config\.html: config\.json beside it is the name of a result of a run; choose",
        ),
        ("pathway/sweep.html", r"sweep\.json beside it is the name of a result"),
        ("pathway/certificates/mine.htm", r"mine\.json beside it is the name of a result"),
    ):
        (tmp_path / out).parent.mkdir(exist_ok=True)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=match):
            report([run], tmp_path / out)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "mine.html").write_text("<html>" + "x" * 1000 + '<meta name="generator" content="robustmoe">')
    with pytest.raises(UserError, match=r"mine\.html is there, and robustmoe did not write it"):
        report([run], tmp_path / "mine.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of that path is a file"):
        report([run], tmp_path / "file" / "x.html")


def test_terminal_table(tmp_path: Path) -> None:
    rows = [
        Row(
            i,
            0,
            0,
            0 if i < 6 else 1,
            {"linf": EPS},
            {"router": 0.5},
            0,
            0 if i < 7 else 1,
            {"router": [1]},
            {"router": [1]},
        )
        for i in range(10)
    ]
    header = make_header(n=10, classes=["a", "b"], routers={"router": RouterInfo(1, 1, 1)})
    text = summary_table([Evaluation(header, rows, Checks([R1], 1.0))])
    # 6 of 10 survive; Wilson's interval of 6/10 is 31.3 to 83.2 %.
    assert text.splitlines() == [
        "threat L∞ ≤ 8/255",
        "attack",
        "   clean  robust       95 %  router's  experts'  rerouted  only it  images",
        "--------------------------------------------------------------------------",
        "pgd(linf(8/255), steps=50)",
        "  100.0%   60.0%  31.3–83.2    100.0%     70.0%     50.0%        4      10",
        "--------------------------------------------------------------------------",
        "worst of 1",
        "  100.0%   60.0%  31.3–83.2                                             10",
        "verdict: no check speaks against this number",
        "router attacked: yes (1 of 1 attacks aim at the router; check R1 passed)",
        "1 check: 0 failed, 0 warned, 1 passed, 0 not run",
    ]
    doubtful = summary_table([Evaluation(header, rows[:4], None), Evaluation(make_header(seed=5), [], None)])
    assert "100.0% !" in doubtful
    assert "router attacked: NO (no attack on the router has seen all its images)" in doubtful
    assert "! incomplete  pgd(linf(8/255), steps=50): 4 of 10 images" in doubtful
    assert "no rows yet" in doubtful


SUITE = (("apgd-ce", 3, 5), ("square", 1, 4), ("routers", 2, 2), ("flip", 0, 2))
"""Of 10 images, 8 of them right: what each part breaks, and how many that leaves."""
GAP = (
    "AutoAttack alone leaves 40.0% (16.8–68.7); with the attacks that know the router 20.0% (5.7–51.0) are left: "
    "knowing the router costs 20.0 points (2 of 10 images)."
)  # Wilson's intervals of 4/10 and 2/10


def make_suite(**changes: Any) -> tuple[Header, list[Row]]:
    """The rows of :data:`SUITE`."""
    broke = ["clean"] * 2 + [name for name, number, _ in SUITE for _ in range(number)] + [""] * 2
    header = make_header(
        **{"attack": "autoattack_routing(linf(8/255))", "objective": ROUTING, "n": 10, "parts": [p[0] for p in SUITE],
           "precision": "strict", "batch_size": 5, **changes}
    )  # fmt: skip
    route, size = {"router": [1, 0, 0, 0]} if header.routers else {}, {"linf": EPS, "l2": 1.0, "l1": 9.0, "box": 0.0}
    rows = [
        Row(i, i, (i + (part == "clean")) % 10, (i + bool(part)) % 10, size, dict.fromkeys(route, 0.0), i, i, route,
            route, part)
        for i, part in enumerate(broke)
    ]  # fmt: skip
    return header, rows


def test_a_suite_is_shown_part_by_part(tmp_path: Path) -> None:
    header, rows = make_suite()
    write_rows(tmp_path / "suite", "suite", header, rows, [R1])
    page, numbers, text, source = made(tmp_path / "suite", tmp_path)
    shown = re.findall(
        r'<tr(?: class="idle")?><th scope="row">([^<]+)</th><td>(\d*)</td><td>([\d.]+%)</td>'
        r'<td class="soft">([\d.]+–[\d.]+)</td></tr>',
        source,
    )
    assert [(name, broke, left) for name, broke, left, _ in shown] == [
        ("clean", "", "80.0%"),
        *((name, str(broke), f"{10 * left:.1f}%") for name, broke, left in SUITE),
    ]
    assert [between for *_, between in shown][-2:] == ["5.7–51.0", "5.7–51.0"]
    assert source.index("AutoAttack</th>") < source.index(">apgd-ce<") < source.index("know the router</th>")
    assert source.index(">square<") < source.index("know the router</th>") < source.index(">routers<")
    assert GAP in page.text
    assert GAP in text
    assert "| square | 1 | 40.0% (16.8–68.7) |" in text
    attack = numbers["runs"][0]["threats"][0]["attacks"][0]
    assert [(part["name"], part["broken"], part["left"]["count"]) for part in attack["parts"]] == list(SUITE)
    gap = attack["routing_gap"]
    assert (gap["autoattack"]["count"], gap["all"]["count"], gap["points"]) == (4, 2, pytest.approx(20.0))
    assert (attack["precision"], attack["batch_size"]) == ("strict", 5)
    assert GAP in " ".join(summary_table([Evaluation(header, rows, Checks([R1], 1.0))]).split())


def test_suites_without_a_gap(tmp_path: Path) -> None:
    """A suite that is not ours has parts and no sentence, an unfinished one neither, a simple attack nothing."""
    header, rows = make_suite(attack="a_suite(linf(8/255))")
    write_rows(tmp_path / "other", "suite", header, rows, [R1])
    page, numbers, text, source = made(tmp_path / "other", tmp_path)
    assert source.count("part by part") == 1
    assert '<th scope="row">routers</th><td>2</td>' in source
    assert "knowing the router costs" not in page.text + text
    assert 'scope="rowgroup"' not in source
    assert numbers["runs"][0]["threats"][0]["attacks"][0]["routing_gap"] is None
    header, rows = make_suite()
    write_rows(tmp_path / "half", "suite", header, rows[:5], None)
    page, numbers, text, _ = made(tmp_path / "half", tmp_path)
    assert "part by part Told once every image has its row." in page.text
    assert "part by part" not in text
    assert numbers["runs"][0]["threats"][0]["attacks"][0]["parts"] == []
    page, _, _, _ = made(make_run(tmp_path, n=10, curve=False, training=False, examples=False), tmp_path)
    assert "part by part" not in page.text


def test_the_page_tells_precision_and_batch_size(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=20, curve=False, precision="fast", batch_size=250)
    page, numbers, text, _ = made(run, tmp_path)
    assert "| evaluation batch size | 250 |" in text
    assert "evaluation batch size 250" in page.text
    (attack,) = {(each["precision"], each["batch_size"]) for each in numbers["runs"][0]["threats"][0]["attacks"]}
    assert attack == ("fast", 250)


def test_deep_checks_are_folded_unless_they_speak(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False, examples=False)
    header = read(run / "rows" / "attack0.jsonl").header
    deep = [Check(f"X{at}", f"deep {at}", "pass", at, f"Deep sentence {at}.") for at in (10, 9)]
    deep.append(Check("X1", "deep warning", "warn", {"text": "long " * 10}, "Look at this."))
    deep.append(Check("X2", "deep skip", "not run", None, "Nothing to do."))
    Audit(header.model_hash, ["fgsm"], 64, 0, deep).write(run)
    page, numbers, text, source = made(run, tmp_path)
    for document in (source, text):
        opened, *folded = document[document.index("Checks" if document is text else "Can the numbers") :].split(
            "<details><summary>"
        )
        assert "Look at this." in opened
        assert "attack converged" in opened  # a warning of the attacks themselves
        assert "inside the ball" not in opened
        passed, skipped = folded
        assert passed.startswith("5 checks passed</summary>")  # H2, H4 and R1 of the attacks, and two deep ones
        assert passed.index("Deep sentence 9.") < passed.index("Deep sentence 10.")
        assert skipped.startswith("2 checks not run</summary>")  # G13 and X2
        assert "Nothing to do." in skipped
    assert "Look at this. robustmoe check, 64 images see JSON" in page.text
    assert "long long" not in page.text  # the sentence says what it found; the value is in the JSON
    assert {"attack": "robustmoe check, 64 images", **vars(deep[2])} in numbers["runs"][0]["checks"]
    assert page.tags.count("details") == 2


def test_a_check_counts_once_by_its_worst_answer(tmp_path: Path) -> None:
    """R1 fails under one attack and passes under the other, which sees the router: a warning, as for the verdict."""
    run = tmp_path / "mixed"
    suite = make_suite(n=10)
    header = make_header(n=10, attack="pgd(linf(8/255), steps=50)")
    write_rows(run, "suite", *suite, [*PASSED, R1])
    write_rows(run, "pgd", header, make_rows(header, 0.3), [*PASSED, R1_FAILED])
    page, _, text, source = made(run, tmp_path)
    for words in ("2 checks passed", "2 checks to look at: G5, R1", "1 check not run"):
        assert words in page.text  # the chips
    assert "<summary>2 checks passed</summary>" in source
    assert "<summary>2 checks passed</summary>" in text
    table = summary_table([read(run / "rows" / f"{name}.jsonl") for name in ("suite", "pgd")])
    assert "5 checks: 0 failed, 2 warned, 2 passed, 1 not run (G13)" in table


def test_words() -> None:
    assert [eps_text("linf", value) for value in (8 / 255, 0.5 / 255, 0.1, 1.5 * 0.1)] == [
        "8/255",
        "0.5/255",
        "0.1",
        "0.15",
    ]
    assert [eps_text("linf", 0.0), eps_text("l2", 0.5)] == ["0", "0.5"]
    assert [percent(None), percent(math.nan), percent(0.4736)] == ["–", "–", "47.4%"]
    assert [duration(4.24), duration(200.0), duration(3720.0)] == ["4.2 s", "3 min 20 s", "1 h 02 min"]
    assert route_text({"router": [0, 1, 0]}) == "expert 1"
    assert route_text({"a": [12, 0, 0, 4], "b": [1, 1]}) == "a: e0 ×12, e3 ×4; b: expert 0+1"
    assert ticks(0.0, 100.0) == [0, 25, 50, 75, 100]
    assert ticks(3.0, 3.0) == [3]


@pytest.mark.parametrize("name", ["x.csv", "x.tex", "x.PDF", "x.md", "x.json"])
def test_a_report_is_not_written_as_another_kind_of_file(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=False, curve=False, training=False)
    with pytest.raises(UserError, match="a report is one HTML page"):
        report([run], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["pathway"]
