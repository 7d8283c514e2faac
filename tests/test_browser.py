"""The report in a real browser: with and without its script, by pointer and by keys, narrow, wide, dark, in print.

`make browser` installs playwright and axe-core; Chromium or Chrome has to be on the machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MISSING = "needs playwright and axe-core: run `make browser`"
pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api", reason=MISSING)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=MISSING)

import robustmoe as rm  # noqa: E402
import test_golden  # noqa: E402
import test_report  # noqa: E402
import test_report_pictures  # noqa: E402
from robustmoe import cli  # noqa: E402

EPS = "linf(0.1)"
TRAINED = {
    "dense": "resnet8(width=4)",
    "pathway": "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4), standardise=True)",
    "tokens": "vit_moe(patch=2, width=16, depth=2, heads=2, experts=4, placement=(0, 1))",
}
WIDE, PHONE = 1200, 390
LOCAL = ("file:", "data:")
VISIBLE = "all => all.filter(each => each.getClientRects().length > 0).length"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> a page: of three small trainings, of every kind of record, of routes drawn by hand, of theory."""
    folder = tmp_path_factory.mktemp("browser")
    runs = []
    for name, model in TRAINED.items():
        recipe = rm.Recipe(model=model, data="digits", method=f"at(pgd({EPS}, steps=2))", epochs=2, batch_size=64)
        rm.train(recipe, folder / name)
        rm.evaluate_run(folder / name, limit=40, attacks=[f"pgd({EPS}, steps=5)"], curve=(0.05, 0.2))
        runs.append(folder / name)
    full = [test_golden.full(folder, name) for name in ("first", "second", "third")]
    tokens, _ = test_report_pictures.token_run(folder / "hand")
    assert cli.main(["theory", "x3", "--out", str(folder / "theory")]) == 0
    return {
        "trained": rm.report(runs, folder / "trained.html"),
        "every kind": rm.report(full, folder / "full.html"),
        "routes": rm.report(tokens, folder / "routes.html"),
        "doubted": rm.report(test_report.make_run(folder, name="doubted", r1=test_report.R1_FAILED), folder / "d.html"),
        "theory": next((folder / "theory").glob("*.html")),
    }


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    assert path, f"no browser on the path; expected one of {', '.join(names)}"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Tab:
    """A page in the browser that remembers what the console said."""

    def __init__(self, browser: Any, path: Path, width: int = WIDE, dark: bool = False, script: bool = True) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.said.append(request.url) if request.url[:5] not in LOCAL else None)
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *rest: object) -> None:
        self.context.close()
        assert kind is not None or self.said == []


def overflow(page: Any) -> int:
    """Pixels that the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.outerHTML.slice(0, 60)")


def tip(page: Any) -> str:
    return " ".join(page.locator(".tip").inner_text().split())


def names(table: Any) -> list[str]:
    """The first cell of each row."""
    return [name.strip() for name in table.locator("tbody th").all_inner_texts()]


def robust(table: Any) -> list[float]:
    return [float(text.split("%")[0]) for text in table.locator("tbody td:nth-child(3)").all_inner_texts()]


def after(shot: Any) -> list[str]:
    """The sources of the attacked image that is shown."""
    return shot.locator(".after:visible img").evaluate_all("all => all.map(each => each.src)")


NAMES = ("trained", "every kind", "routes", "doubted", "theory")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(name: str, dark: bool, reports: dict[str, Path], chromium: Any) -> None:
    for width in (WIDE, PHONE):
        with Tab(chromium, reports[name], width, dark) as page:
            assert overflow(page) <= 0
            answer = axe.Axe().run(page).response
            assert len(answer["passes"]) > 10
            loud = [
                (rule["id"], rule["impact"], node["target"], node["failureSummary"])
                for rule in answer["violations"]
                if rule["impact"] in ("serious", "critical")
                for node in rule["nodes"]
            ]
            assert loud == []
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            level = sum(map(int, re.findall(r"\d+", background)[:3]))
            assert level < 100 if dark else level > 700


@pytest.mark.parametrize("name", NAMES)
def test_without_a_script_all_is_there(name: str, reports: dict[str, Path], chromium: Any) -> None:
    words = {}
    for script in (True, False):
        for width in (WIDE, PHONE):
            with Tab(chromium, reports[name], width, script=script) as page:
                assert overflow(page) <= 0
                text = re.sub(r"\b(All|None)\b", "", page.locator("main").inner_text())
                words[script, width] = re.sub(r"[\s\u2195]+", " ", text)
                if not script:
                    assert page.locator("button").count() == 0, "nothing is offered that does not work"
    assert words[False, WIDE] == words[True, WIDE]
    assert len(words[False, WIDE]) > 400


def test_many_runs_fit(tmp_path: Path, chromium: Any) -> None:
    runs = [test_report.make_run(tmp_path, name=f"run-{at}-of-a-long-name", n=20) for at in range(7)]
    path = rm.report(runs, tmp_path / "many.html")
    for width in (320, PHONE, 700, WIDE):
        for script in (True, False):
            with Tab(chromium, path, width, script=script) as page:
                assert overflow(page) <= 0, (width, script)
                assert page.locator("h1").inner_text() == "7 runs on cifar10"


def test_tables_are_sorted_by_their_heads(reports: dict[str, Path], chromium: Any) -> None:
    numbers = json.loads(reports["trained"].with_suffix(".json").read_text())["runs"]
    clean = {run["run"]: run["clean"]["value"] for run in numbers}
    with Tab(chromium, reports["trained"]) as page:
        table = page.locator("table.data.sortable").first
        head = table.locator("thead th").nth(1)
        falling = sorted(clean, key=lambda name: -clean[name])
        assert names(table) == list(TRAINED)
        head.locator("button").click()
        assert [clean[name] for name in names(table)] == [clean[name] for name in falling]
        assert head.get_attribute("aria-sort") == "descending"
        assert page.locator("[role=status]").inner_text() == "sorted by Clean, descending"
        head.locator("button").press("Enter")
        assert [clean[name] for name in names(table)] == sorted(clean.values())
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").press("Space")
        assert names(table) == list(TRAINED)
        assert head.get_attribute("aria-sort") is None
        table.locator("thead th").first.locator("button").click()
        assert names(table) == sorted(TRAINED)
        moved = table.locator("thead th", has_text="Rerouted").locator("button")
        for _ in range(2):  # the dense net has none: last both ways
            moved.click()
            assert names(table)[-1] == "dense"
        # The worst case of all attacks stays below them.
        attacks = page.locator("table.attacks").first
        assert attacks.locator("tfoot tr.worst").count() == 1
    with Tab(chromium, reports["every kind"]) as page:
        attacks = page.locator("table.attacks").first
        attacks.locator("thead th").nth(2).locator("button").click()
        assert robust(attacks) == sorted(robust(attacks), reverse=True)
        assert len(set(robust(attacks))) > 2
    with Tab(chromium, reports["trained"], PHONE) as page:
        button = page.locator("table.data.sortable thead button", has_text="Clean").first
        assert button.is_visible(), "a phone has heads to sort by too"
        button.click()
        assert [clean[name] for name in names(page.locator("table.sortable").first)] == sorted(
            clean.values(), reverse=True
        )


@pytest.mark.parametrize("script", [True, False])
def test_runs_are_chosen(script: bool, reports: dict[str, Path], chromium: Any) -> None:
    with Tab(chromium, reports["every kind"], script=script) as page:
        there = {at: page.locator(f".run-{at}").evaluate_all(VISIBLE) for at in range(3)}
        curves = page.locator("#eps svg g.values")
        assert min(there.values()) > 20
        assert curves.evaluate_all(VISIBLE) == 3
        page.locator("#show-1").uncheck()
        assert page.locator(".run-1").evaluate_all(VISIBLE) == 0
        assert [page.locator(f".run-{at}").evaluate_all(VISIBLE) for at in (0, 2)] == [there[0], there[2]]
        assert curves.evaluate_all(VISIBLE) == 2
        assert page.locator("#eps .legend li").evaluate_all(VISIBLE) == 2
        assert "second" not in re.sub(r"^.*\bRuns\b.*$", "", page.locator("#verdict").inner_text(), flags=re.M)
        page.locator("#show-1").focus()
        page.keyboard.press("Space")
        assert page.locator(".run-1").evaluate_all(VISIBLE) == there[1]
        if script:
            page.get_by_role("button", name="None", exact=True).click()
            assert [page.locator(f".run-{at}").evaluate_all(VISIBLE) for at in range(3)] == [0, 0, 0]
            page.get_by_role("button", name="All", exact=True).click()
            assert page.locator(".run-2").evaluate_all(VISIBLE) == there[2]


def test_cards_leave_no_hole(reports: dict[str, Path], chromium: Any) -> None:
    """Three cards, or three charts: the last row is as wide as the others, whichever runs are chosen."""
    boxes = """all => all.map(each => each.getBoundingClientRect()).filter(box => box.width)
        .map(box => [box.top, box.left, box.right])"""
    with Tab(chromium, reports["every kind"]) as page:
        for chosen in ((), (1,), (1, 2)):
            for at in range(3):
                page.locator(f"#show-{at}").set_checked(at not in chosen)
            for group in ("#verdict .cards", "#made .cards"):
                rows: dict[float, list[tuple[float, float]]] = {}
                for top, left, right in page.locator(f"{group} > *").evaluate_all(boxes):
                    rows.setdefault(round(top), []).append((round(left), round(right)))
                assert sum(map(len, rows.values())) == 3 - len(chosen)
                assert (
                    len({(min(left for left, _ in row), max(right for _, right in row)) for row in rows.values()}) == 1
                )


def test_a_chart_tells_its_values(reports: dict[str, Path], chromium: Any) -> None:
    (run,) = json.loads(reports["routes"].with_suffix(".json").read_text())["runs"]
    points = [(point["eps"] * 255, 100 * point["accuracy"]["value"]) for point in run["curves"][0]["points"]]
    told = [f"eps, in grey levels of 255: {round(eps)} pgd(linf(eps), steps=50) {rate:.4g}%" for eps, rate in points]
    with Tab(chromium, reports["routes"]) as page:
        svg = page.locator("#eps svg")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        assert not page.locator(".tip").is_visible()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 40)  # the right edge: the last point
        assert tip(page).startswith(told[-1])
        assert svg.locator(".cursor circle").count() == 1
        page.mouse.move(box["x"] + 60, box["y"] + 100)
        assert tip(page).startswith(told[0])
        page.mouse.move(2, 2)
        assert not page.locator(".tip").is_visible()
        assert svg.locator(".cursor").count() == 0
        svg.focus()
        for words in told:
            page.keyboard.press("ArrowRight")
            assert tip(page).startswith(words)
        assert page.locator("[role=status]").inner_text().startswith("eps, in grey levels of 255: 16; pgd")
        page.keyboard.press("ArrowRight")
        assert tip(page).startswith(told[-1]), "there is no further one"
        page.keyboard.press("Home")
        assert tip(page).startswith(told[0])
        page.keyboard.press("Escape")
        assert not page.locator(".tip").is_visible()
        page.keyboard.press("End")
        page.keyboard.press("Tab")
        assert not page.locator(".tip").is_visible()


def test_bars_crosses_areas_and_patches_tell_theirs(reports: dict[str, Path], chromium: Any) -> None:
    with Tab(chromium, reports["every kind"]) as page:
        for selector, words in (
            ("#dissection figure svg", r"^(clean|attacked), expert \d: [\d.]+% \([\d.]+–[\d.]+\)$"),
            ("#blend .plots svg", r"^under attack, 0"),
            ("#routers svg", r"^epoch: 1 expert 0 [\d.]+% expert 1 [\d.]+% expert 2 [\d.]+% expert 3 [\d.]+%$"),
            ("#certificates svg", r"^L∞ radius in pixels.*: 0 "),
        ):
            page.locator(selector).first.focus()
            page.keyboard.press("ArrowRight")
            assert re.search(words, tip(page)), (selector, tip(page))
        assert page.locator("figure title").count() == 0, "the browser's own tooltips would stand over ours"
    with Tab(chromium, reports["routes"]) as page:
        attacked = page.locator("svg.patches[data-side=attacked]:visible").first
        attacked.focus()
        told = []
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
            told.append(tip(page))
        assert told == [
            "class token: expert 1 → 2",
            "row 1, column 1: expert 1, as before",
            "row 2, column 1: expert 1 → 2",
        ]
        box = attacked.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.85, box["y"] + box["height"] * 0.9)
        assert tip(page) == "row 4, column 4: expert 1, as before"


@pytest.mark.parametrize("script", [True, False])
def test_the_dial_over_eps(script: bool, reports: dict[str, Path], chromium: Any) -> None:
    with Tab(chromium, reports["routes"], script=script) as page:
        shot = page.locator("article.shot").first
        own = after(shot)
        assert len(own) == 1
        assert "eps 8/255" in shot.inner_text()
        assert "2 of 17 items moved" in shot.inner_text()
        page.locator(".kept .stops input").nth(2).focus()
        page.keyboard.press("ArrowRight")
        assert "eps 16/255: as at 2/255, where it was broken" in shot.inner_text()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert "eps 4/255" in shot.inner_text()
        assert "1 of 17 items moved" in shot.inner_text()
        assert len(after(shot)) == 1
        assert after(shot) != own
        assert shot.locator("svg.patches:visible").count() == 4
        labels = page.locator(".kept .stops label")
        if script:  # the dial follows the pointer
            first, last = labels.first.bounding_box(), labels.last.bounding_box()
            page.mouse.move(first["x"] + first["width"] / 2, first["y"] + 18)
            page.mouse.down()
            page.mouse.move(last["x"] + last["width"] / 2, last["y"] + 18, steps=8)
            page.mouse.up()
        else:
            labels.last.click()
        assert page.locator(".kept .stops input").last.is_checked()
        assert "eps 16/255" in shot.inner_text()


def test_the_keyboard_reaches_everything(reports: dict[str, Path], chromium: Any) -> None:
    """Tab goes through links, boxes, heads, charts and the dial in the order of the page; each is seen to have it."""
    with Tab(chromium, reports["trained"]) as page:
        seen, kinds = [], set()
        for _ in range(400):
            page.keyboard.press("Tab")
            here = focused(page)
            if here.startswith("<body"):
                break
            outline = page.evaluate(
                """(() => { const here = document.activeElement;
                    const drawn = here.matches('.stops>input') ? here.nextElementSibling : here;
                    return getComputedStyle(drawn).outlineStyle; })()"""
            )
            assert outline != "none", here
            seen.append(page.evaluate("document.activeElement.getBoundingClientRect().top + scrollY"))
            kinds.add(re.match(r"<(\w+)", here)[1])
        assert kinds >= {"a", "input", "button", "svg", "summary", "div"}
        assert focused(page).startswith("<body"), "it comes to an end: nothing traps the focus"


def test_print_has_everything(reports: dict[str, Path], chromium: Any) -> None:
    with Tab(chromium, reports["trained"], width=794) as page:
        page.emulate_media(media="print")
        assert overflow(page) <= 0
        assert not page.locator("nav").is_visible()
        assert not page.locator(".chooser").is_visible()
        assert page.locator(".arrow:visible").count() == 0
        assert page.locator("details:not([open])").count() > 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() > 0
        document = page.pdf(format="A4", print_background=True)
        assert document.startswith(b"%PDF-")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 60
