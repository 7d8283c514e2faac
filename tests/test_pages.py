"""What README, docs and recipes say in numbers is what the results files say, and costs and counts are taken anew."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks import aims

from pages import RESULTS, ROOT, Results, faults, numbers, pages, rendered, study_of
from robustmoe import recipe
from robustmoe.costs import Costs, costs
from test_recipes_advmoe import has_base

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
FILES = sorted(RESULTS.rglob("*.json"))
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_a_page_is_a_results_files(name: str, results: Results) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert faults(text, results, study_of(PAGES[name])) == [], "tests/pages.py says how a number is tied to a file"
    assert rendered(text, results) == text, "what `python -m tests.pages` writes"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_results_file_says_where_it_is_from(file: Path) -> None:
    about = json.loads(file.read_text(encoding="utf-8"))["about"]
    if "source" in about:
        assert re.fullmatch(r"transcribed from \S+\.md at [0-9a-f]{7}; not run again", about["source"])
        assert about["commands"]
    else:
        assert re.fullmatch(r"[0-9a-f]{40}", about["commit"]), "measured with changes that no commit has"
        command = about["command"].split()
        file_run = f"{command[2].replace('.', '/')}.py" if command[1] == "-m" else command[1]
        assert (ROOT / file_run).is_file(), about["command"]
        assert {"hardware", "versions"} <= set(about)
        assert "seeds" in about or file.stem in ("costs", "recipe_costs", "facts"), "which draws?"


def test_the_page_on_speed_shows_what_was_aimed_at() -> None:
    assert aims.table() in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), "python benchmarks/aims.py"


def test_the_headline_is_a_mean_over_seeds_and_instruction_sets(results: Results) -> None:
    """One training says little: rounding alone moves the worst case by points."""
    about = results.file("demo")["about"]
    runs = results.file("demo")["runs"]
    assert len(set(about["instruction_sets"].values())) >= 2
    assert {run["set"] for run in runs} == set(about["instruction_sets"])
    assert {run["seed"] for run in runs} == set(about["seeds"])
    assert len(about["seeds"]) >= 5
    worst = [run["pathway"]["worst"] for run in runs]
    leaf = results.value("demo:pathway.worst")
    assert leaf["mean"] == pytest.approx(sum(worst) / len(worst))
    assert (leaf["min"], leaf["max"], leaf["n"]) == (min(worst), max(worst), len(worst))


# ------------------------------------------------------------------------------------------------ taken anew

SERIES = {str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in RECIPES if has_base(path)}
SPECS: dict[tuple[str, int, tuple[int, int, int]], list[tuple[str, str]]] = {}
"""Every model of the two files, and where it stands in them."""
for _file in ("recipe_costs", "costs"):
    for _name, _each in json.loads((RESULTS / f"{_file}.json").read_text(encoding="utf-8"))["specs"].items():
        _model = (_each["spec"], _each["classes"], tuple(_each["image_shape"]))
        SPECS.setdefault(_model, []).append((_file, _name))


def quick(model: tuple[str, int, tuple[int, int, int]]) -> bool:
    """In `make recipes` also the others: large images, many layers, and what varies a recipe that is counted here."""
    small = model[1:] == (10, (3, 32, 32)) and "densenet" not in model[0]
    return any(file == "costs" or (small and name not in SERIES) for file, name in SPECS[model])


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id="-".join(at[0]).replace("/", "-"), marks=[] if quick(model) else [pytest.mark.recipes])
        for model, at in SPECS.items()
    ],
)
def test_a_cost_is_its_specs(model: tuple[str, int, tuple[int, int, int]], results: Results) -> None:
    counted = costs(*model)
    for file, name in SPECS[model]:
        assert counted == Costs(**results.file(file)["numbers"][name]), name


def test_the_counts_are_those_of_the_sources(results: Results) -> None:
    """Those of the recipes stand in blocks of code too, where numbers are not tied."""
    folders = {folder.name: len(list(folder.glob("*.toml"))) for folder in (ROOT / "recipes").iterdir()}
    missed = sum(row["pyautoattack"] == 100 for row in results.file("planted")["numbers"].values())
    counts = {"planted_missed": missed, **{f"recipes_{name}": count for name, count in folders.items() if count}}
    assert results.file("facts")["numbers"] == counts
    for page in PAGES.values():
        for folder, count in re.findall(r"recipes/(\w+) has (\d+)", page.read_text(encoding="utf-8")):
            assert int(count) == counts[f"recipes_{folder}"], page.name


COST = re.compile(
    r"Cost: (?P<macs>[\d.]+) GMAC an image and pass"
    r"(?:, the router's (?P<router>[\d.]+) GMAC included)?(?: in eval mode, attacks included)?"
    r"(?:: (?P<share>\d+) % of the dense network's (?P<dense>[\d.]+) GMAC)?"
    r".*?(?P<millions>[\d.]+) M (?:parameters|trained numbers)"
)
"""The sentence on the cost in the head of a recipe."""


def cost_faults(text: str, name: str, numbers: dict[str, dict[str, int]]) -> list[str]:
    """What a recipe says of its cost beside what ``numbers`` has of it and of its dense twin."""
    said = COST.search(" ".join(text.replace("\n#", " ").split()))
    if said is None:
        return ["no sentence on the cost that can be read"]
    own, dense = numbers[name], numbers.get(re.sub(r"_(advmoe|at_\w+)$", "_at_dense", name), {"macs": 1})
    true = {
        "macs": f"{own['macs'] / 1e9:.{4 if own['macs'] < 1e6 else 3}f}",
        "router": f"{own['router_macs'] / 1e9:.3f}",
        "share": f"{100 * own['macs'] / dense['macs']:.0f}",
        "dense": f"{dense['macs'] / 1e9:.3f}",
        "millions": f"{own['parameters'] / 1e6:.2f}",
    }
    return [f"{part}: {said[part]}, counted {true[part]}" for part in true if said[part] not in (None, true[part])]


def test_the_costs_that_recipes_state(results: Results) -> None:
    """Of each recipe: the file counts the model that it trains, and it says what the file says."""
    file = results.file("recipe_costs")
    wrong, seen = [], set()
    for path in RECIPES:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT / "recipes").with_suffix(""))
        if "GMAC" in text:
            seen.add(name)
            model = file["specs"].get(name, {}).get("spec")
            if model != recipe.load_recipe(path).model:
                wrong.append(f"{name}: recipe_costs.json counts {model}")
            else:
                wrong += [f"{name}: {fault}" for fault in cost_faults(text, name, file["numbers"])]
        result = re.search(r"# Result: (.*)", text)
        if result and re.search(r"\d", result[1]):
            wrong.append(f"{name}: a result belongs to README or a page of docs, which are tied to its file")
    assert wrong == []
    assert seen == set(file["specs"])


# ------------------------------------------------------------------------------------------------ the checker itself

PAGE = """# A page of 2 nets

Of 359 images PGD-20 (linf 0.1) leaves **85.0 %** (81.1-88.3); three seeds, 14 epochs. <!-- numbers: demo net.pgd -->
Steering leaves 54.6 ± 1.2, 30.4 points less, and `eps=0.25` is code. <!-- numbers: demo net.worst net.pgd-net.worst -->

| model | parameters | clean |
|---|---|---|
| `resnet8(width=32)` | 308,650 | 97.8 (95.7-98.9) |

<!-- numbers: demo costs:small.parameters net.clean -->

A threshold of 0.5 is ours. <!-- defined -->

- 1.5 times as fast, with `x = 3.5` left out <!-- numbers: demo fast -->
- at 1e-5 <!-- numbers: demo = -->

<!-- output: printed -->
```
all 3.5 lines
of it
```
"""


@pytest.fixture
def planted(tmp_path: Path) -> Results:
    net = {
        "pgd": {"mean": 85.04, "sd": 2.0, "min": 81.1, "max": 88.3, "n": 3},
        "worst": {"mean": 54.63, "sd": 1.2},
        "clean": {"count": 351, "n": 359},
    }
    files = {
        "demo": {"numbers": {"net": net, "fast": 1.5}},
        "costs": {"numbers": {"small": {"parameters": 308650}}, "specs": {"small": {"spec": "resnet8(width=32)"}}},
        "printed": {"numbers": {}, "output": ["all 3.5 lines", "of it"]},
        "study": {"numbers": {"arms": {"a": {"mean": 3.0, "sd": 0.5}}}, "text": ["7.5"]},
    }
    for name, file in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    return Results(tmp_path)


def test_a_true_page_has_no_fault(planted: Results) -> None:
    assert faults(PAGE, planted) == []
    assert rendered(PAGE, planted) == PAGE


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("85.0 %", "86.0 %", "line 3: the page says 86.0 (81.1-88.3), demo:net.pgd is 85.0 (81.1-88.3)"),
        ("81.1-88.3", "81.1-89.3", "line 3: the page says 85.0 (81.1-89.3), demo:net.pgd is 85.0 (81.1-88.3)"),
        ("± 1.2", "± 0.2", "line 4: the page says 54.6 ± 0.2, demo:net.worst is 54.6 ± 1.2"),
        ("30.4 points", "31.4 points", "line 4: the page says 31.4, demo:net.pgd-net.worst is 30.4"),
        ("308,650", "308,651", "line 8: the page says 308,651, costs:small.parameters is 308,650"),
        ("(width=32)` |", "(width=16)` |", "line 8: costs:small.parameters is the cost of `resnet8(width=32)`, which"),
        ("95.7-98.9", "95.7-99.9", "line 8: the page says 97.8 (95.7-99.9), demo:net.clean is 97.8 (95.7-98.9)"),
        ("1.5 times", "2.5 times", "line 14: the page says 2.5, demo:fast is 1.5"),
        ("3.5 lines", "4.5 lines", "line 17: the code block is not the output in printed.json"),
        ("three seeds", "3.1 seeds", "line 3: 2 numbers (85.0 (81.1-88.3), 3.1) and 1 keys (demo:net.pgd)"),
        ("nets\n", "nets\n\nIt is 40 % faster.\n", "line 3: not tied to a results file: 40"),
        ("is ours. <!-- defined -->", "is ours.", "line 12: not tied to a results file: 0.5"),
        ("net.clean -->", "net.dirty -->", "line 8: demo:net.dirty: no net.dirty in demo.json (no dirty)"),
        ("numbers: demo fast", "numbers: demos fast", "line 14: demos:fast: there is no demos.json in docs/results"),
    ],
)
def test_a_lie_is_caught(old: str, new: str, fault: str, planted: Results) -> None:
    assert PAGE.count(old) == 1
    (said,) = faults(PAGE.replace(old, new), planted)
    assert said.startswith(fault)


@pytest.mark.parametrize("wrong", ["86.0 %** (80.0-90.1)", "8.0 %** (1.0-2.0)"])
def test_rendering_writes_the_files_numbers(wrong: str, planted: Results) -> None:
    page = (
        PAGE.replace("85.0 %** (81.1-88.3)", wrong)
        .replace("308,650", "1,000")
        .replace("30.4", "1.0")
        .replace("of it", "of")
    )
    assert rendered(page, planted) == PAGE


def test_a_study_may_say_what_its_file_holds(planted: Results) -> None:
    text = "The net loses 3.0 ± 0.5 points, 7.5 % of them at once, not 8.5 %.\n"
    assert faults(text, planted) == ["line 1: not tied to a results file: 3.0 ± 0.5, 7.5, 8.5"]
    assert faults("It loses 3.0 points and 7.5 %, not 8.5 %.", planted, "study") == [
        "line 1: not tied to a results file: 8.5"
    ]


@pytest.mark.parametrize(
    "text, counted",
    [
        (
            "ResNet-18, E16, Theorem 5.4, claims 13 and 14, 95 % intervals, 1.5/255, 2210.10253, 2026-11-22",
            [],
        ),
        ("linf 0.1, radius 0.25, `eps=0.3`, k = 2, alpha = 0.7 or 0.9, [page](docs/1.5.md), three of four", []),
        ("200 images, 14 epochs, 1000 random points, 12 things, 5 seeds", []),
        ("300 things, 3 points, 2 times, 6 of 7 or so, 50 %, 1,000 images, 1e-5, 0.5, +1.0, -2.5 and 61.6-67.5", None),
    ],
)
def test_what_counts_as_a_number(text: str, counted: list[str] | None) -> None:
    expected = ["300", "3", "2", "6", "50", "1,000", "1e-5", "0.5", "+1.0", "-2.5", "61.6", "67.5"]
    assert [str(number) for number in numbers(text)] == (expected if counted is None else counted)


@pytest.mark.parametrize("old, new", [("0.192", "0.182"), ("5.83", "5.38"), ("35 %", "34 %"), ("0.041", "0.040")])
def test_a_lie_about_a_recipes_cost_is_caught(old: str, new: str, results: Results) -> None:
    name = "advmoe/resnet18_cifar10_advmoe"
    text = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    counts = results.file("recipe_costs")["numbers"]
    assert cost_faults(text, name, counts) == []
    assert len(cost_faults(text.replace(old, new), name, counts)) == 1
