"""The report's pictures, titles and what its script reads, on records made by hand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from robustmoe.records import Example, RouterInfo, Row, write_examples
from robustmoe.reporting.figures import Axes, Series, lines
from robustmoe.reporting.routes import CELLS, Patches, patches, shown_in_full
from robustmoe.reporting.words import eps_axis
from test_report import R1, made, make_header, make_rows, make_run, picture, write_rows

TOKENS = {"network.blocks.0.mlp.router": RouterInfo(4, 1, 17), "network.blocks.1.mlp.router": RouterInfo(4, 2, 17)}
FIRST, SECOND = TOKENS


def example(row: Row, change: int, moved: dict[str, list[int]]) -> Example:
    """Every token goes to expert 1 (and 3 of the second router); those that moved go to expert 2 (and 3)."""
    clean = {FIRST: [[1]] * 17, SECOND: [[1, 3]] * 17}
    attacked = {
        name: [[2, *own[1:]] if at in moved.get(name, ()) else own for at, own in enumerate(items)]
        for name, items in clean.items()
    }
    counts = [{name: [sum(e in item for item in items) for e in range(4)] for name, items in each.items()}
              for each in (clean, attacked)]  # fmt: skip
    return Example(row.index, row.label, row.label, (row.label + 3) % 10, *counts, picture(row.index),
                   picture(row.index, change), clean, attacked)  # fmt: skip


def token_run(folder: Path, radii: tuple[int, ...] = (2, 4, 8, 16), n: int = 20) -> tuple[Path, list[Row]]:
    """A run of two routers of 16 patches and a class token, attacked at several radii of k/255; the row of the first
    image is broken at 2 already, so that the larger radii do not attack it."""
    run, kept = folder / "tokens", []
    for eps in radii:
        changes: dict[str, Any] = {} if eps == 8 else {"role": "curve"}
        header = make_header(attack=f"pgd(linf({eps}/255), steps=50)", eps=eps / 255, routers=TOKENS, n=n, **changes)
        one = example(make_rows(header, 0.5)[0], 1, {FIRST: [0]})
        routes = {"route_clean": one.route_clean, "route_adversarial": one.route_adversarial}
        rows = [dataclasses.replace(row, **routes) for row in make_rows(header, 0.5)]
        rows[0] = dataclasses.replace(rows[0], clean=0, adversarial=3)
        if eps != 8:
            rows = [dataclasses.replace(row, part="smaller eps") if row.index == 0 and eps > 2 else row for row in rows]
        kept = [row for row in rows if row.clean == row.label][:3] if eps == 8 else kept
        path = write_rows(run, f"pgd{eps}", header, rows, [R1])
        chosen = [row for row in rows if row.clean == row.label][:3]
        there = [row for row in chosen if eps in (2, 8) or row.index != 0]
        shots = [example(row, eps, {FIRST: [0, 5][: 1 + (eps > 4)], SECOND: []}) for row in there]
        write_examples(path.with_suffix(".examples.jsonl"), shots)
    return run, kept


def test_a_route_is_drawn_patch_by_patch_at_every_radius(tmp_path: Path) -> None:
    run, kept = token_run(tmp_path)
    page, _, _, source = made(run, tmp_path)
    images = source[source.index('id="images"') :]
    assert kept[0].index == 0
    assert images.count('<article class="shot">') == 3
    assert re.findall(r'<label for="eps-0-\d">([^<]+)</label>', images) == ["2/255", "4/255", "8/255", "16/255"]
    assert re.findall(r'id="eps-0-(\d)" checked', images) == ["2"], "the attack's own radius"
    first = images[: images.index("</article>")]
    assert "eps 8/255</span>" in first
    assert "eps 16/255: as at 2/255, where it was broken" in first
    assert first.count('<svg class="patches"') == 4 * 2 * 2, "radii, routers, clean and attacked"
    # The first router: at 2/255 the class token moved, at 8/255 the patch in row 2, column 1 too.
    assert first.count("<b>block 0</b> 1 of 17 items moved") == 3  # at 2 and, from there, at 4 and 16
    assert first.count("<b>block 0</b> 2 of 17 items moved") == 1  # at 8
    assert first.count("<b>block 1</b> nothing moved") == 4
    drawn = first[first.index('<div class="routes at at-2 own">') :]
    attacked = next(svg for svg in re.findall(r"<svg.*?</svg>", drawn) if "block 0, attacked" in svg)
    assert 'aria-label="block 0, attacked: 15 items to expert 1, 2 items to expert 2; 2 moved"' in attacked
    numbers = re.findall(r'<text x="([\d. ]+)" y="([-\d.]+)">(\d+)</text>', attacked)
    row = "0.5 1.5 2.5 3.5"
    assert numbers == [("0.5", "-1", "2"), (row, "0.5", "1111"), (row, "1.5", "2111"), (row, "2.5", "1111"),
                       (row, "3.5", "1111")]  # fmt: skip
    assert '<path class="gone" d="M0.07 -1.43h.86v.86h-.86zM0.07 1.07h.86v.86h-.86z"/>' in attacked
    assert 'data-lie="1 4" data-experts="2 1 1 1 1 2 1' in attacked
    assert len(re.findall(r'<text class="long" [^>]+>1\+3</text>', first)) == 4 * 2 * 17, "both experts are told"
    used = set(re.findall(r'<use href="#([^"]+)"', source))
    assert used <= set(re.findall(r'<image id="([^"]+)"', source))
    assert len(page.ids) == len(set(page.ids))


def test_an_old_record_has_its_counts(tmp_path: Path) -> None:
    run, _ = token_run(tmp_path, radii=(8,))
    path = next((run / "rows").glob("*.examples.jsonl"))
    text = re.sub(r',"experts_clean":.*?,"layout":2', "", path.read_text())
    assert '"experts_clean"' not in text
    path.write_text(text)
    page, _, _, source = made(run, tmp_path)
    assert "svg.patches" in source, "the script's"
    assert '<svg class="patches"' not in source
    assert page.text.count("1 of 2 routers moved: block 0 e1 ×17 → e1 ×15, e2 ×2 block 1 e1 ×17, e3 ×17") == 3


def test_one_router_of_images_is_a_word(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False)
    page, _, _, source = made(run, tmp_path)
    assert re.search(r'<span class="route">expert \d( → expert \d|, unchanged)</span>', source)
    assert 'class="hops"' not in source
    assert '<fieldset class="dial">' not in source, "one radius is no choice"
    assert "experts" in page.ids


def test_layers_of_image_routers_are_a_list(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=60, routers=3, curve=False, training=False)
    page, _, _, source = made(run, tmp_path)
    moved = re.findall(r'<span class="route">(\d) of 3 routers moved:</span><ul class="hops">(.*?)</ul>', source)
    assert moved
    for number, items in moved:
        assert items.count('class="moved"') == int(number) == items.count(" → ")
        assert items.count("<li") == 3
    assert len(moved) + page.text.count("every router sends it where it was") == 6


@pytest.mark.parametrize(
    "items, size, lie",
    [
        (16, (8, 8), Patches(0, 4, 4)),
        (17, (8, 8), Patches(1, 4, 4)),
        (196, (32, 32), Patches(0, 14, 14)),  # of an image that the model enlarges
        (8, (4, 8), Patches(0, 2, 4)),
        (9, (4, 8), Patches(1, 2, 4)),
        (2, (8, 8), Patches(1, 1, 1)),
        (12, (8, 8), None),
        (1, (300, 2), None),
    ],
)
def test_how_items_lie_on_an_image(items: int, size: tuple[int, int], lie: Patches | None) -> None:
    assert patches(items, *size) == lie


def test_the_page_stays_small(tmp_path: Path) -> None:
    header = make_header(routers={f"r{at}": RouterInfo(8, 1, 196) for at in range(12)})
    many = {name: [[0]] * 196 for name in header.routers}
    shot = Example(0, 0, 0, 1, {}, {}, "", "", many, many)
    assert shown_in_full(header, shot, 1, 10) == (3, True)  # 12 x 196 x 2 cells an image
    assert shown_in_full(header, shot, 7, 10) == (3, False), "one image at seven radii would be too much"
    assert 12 * 196 * 2 * 3 <= CELLS < 12 * 196 * 2 * 4
    assert shown_in_full(header, dataclasses.replace(shot, experts_clean={}), 7, 10) == (0, True)
    run, _ = token_run(tmp_path)
    assert len(made(run, tmp_path)[3]) < 400_000


def test_titles_say_what_is_compared(tmp_path: Path) -> None:
    def headed(*names: str, **changes: Any) -> str:
        runs = [write(tmp_path / "-".join(names) / name, **changes) for name in names]
        page, _, text, source = made(runs, tmp_path / "-".join(names))
        (title,) = re.findall(r"<h1>(.*?)</h1>", source)
        assert f"<title>{title} – robustness report</title>" in source
        assert text.split("\n", 2)[1] == f"# Robustness report: {title}"
        assert page.tags.count("input") == (len(names) if len(names) > 1 else 0)
        return title

    def write(run: Path, **changes: Any) -> Path:
        header = make_header(n=4, **changes)
        write_rows(run, "pgd", header, make_rows(header, 0.5), [R1])
        return run

    assert headed("a", data="digits") == "a on digits"
    assert headed("a", "b") == "a and b on cifar10"
    assert (
        headed("a", "b", "c", data="cifar10(root=&#x27;/x/y&#x27;)".replace("&#x27;", "'")) == "a, b and c on cifar10"
    )
    assert headed("a", "b", "c", "d", data="digits") == "4 runs on digits"
    runs = [write(tmp_path / "two" / name, data=name) for name in ("digits", "cifar10")]
    assert "<h1>digits and cifar10 on 2 data sets</h1>" in made(runs, tmp_path / "two")[3]


def test_what_belongs_to_a_run_goes_with_it(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name, n=20) for name in ("first", "second", "third")]
    _, _, _, source = made(runs, tmp_path)
    for at in range(3):
        assert f"body:has(#show-{at}:not(:checked)) .run-{at}{{display:none!important}}" in source
        for part in (
            '<article class="card{}">',  # the verdict
            '<tr class="plain{}">',  # run by run
            '<td class="{}" data-label="',  # attack by attack
            '<g class="values{}" data-name=',  # curves
            '<li class="entry{}">',  # and their legend
            '<td class="rate{}">',
            '<div class="part{}"><h3>',  # images, training, load
            '<div class="card{}"><h2>',  # how it was made
        ):
            assert re.search(part.format(f" ?run-{at}"), source), (part, at)


def test_an_axis_of_eps_is_written_as_the_user_writes_eps() -> None:
    assert eps_axis("linf", (2 / 255, 0.1)) == (255.0, "eps, in grey levels of 255")
    assert eps_axis("linf", (0.0, 0.025, 0.1)) == (1.0, "eps, L∞")
    assert eps_axis("l2", (0.5, 128 / 255)) == (1.0, "eps, L2")


def test_a_line_chart_has_the_values_that_its_script_shows() -> None:
    line = Series(
        "clean & <b>", ((1.0, 0.00347), (10.0, 25.339)), 3, band=((1.0, 0.001, 1.0), (10.0, 20.0, 31.0)), run=2
    )
    drawn = lines("t", [line], Axes("epoch", unit="%", log_x=True))
    (values,) = re.findall(r'<g class="values run-2" data-name="([^"]+)" data-colour="3" data-xy="([^"]+)">', drawn)
    assert values == ("clean &amp; &lt;b&gt;", "1,0.00347,0.001,1 10,25.34,20,31")
    slope, offset, kind = re.findall(r'data-x="([^"]+)"', drawn)[0].split()
    assert (float(offset), kind) == (46.0, "log")  # the left edge of the frame, at 1
    assert float(slope) * 2.302585 + float(offset) == pytest.approx(420 - 14, abs=0.1)
    assert "0.00347% at 1</title>" in drawn
    assert '<li class="entry run-2">' in drawn
