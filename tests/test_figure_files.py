"""The figures of a report as files that stand alone: what is in each SVG, what they are called, what is not written
over, and PNG and PDF made of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

import robustmoe as rm
from robustmoe import cli
from robustmoe.reporting.collect import collect
from robustmoe.reporting.page import page
from robustmoe.reporting.standalone import Drawing, drawings
from test_report import R1_FAILED, make_run
from test_report_pictures import token_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str, list[Drawing]]:
    """Two runs, one of them doubted; their page; its figures."""
    folder = tmp_path_factory.mktemp("figures")
    runs = [make_run(folder, name="a <b> & c"), make_run(folder, name="dense", routed=False, r1=R1_FAILED)]
    runs.append(make_run(folder, name="doubted", r1=R1_FAILED, training=False, curve=False))
    views = collect(runs)
    text = page(views)
    return runs, text, drawings(text, [view.name for view in views])


def texts(drawing: Drawing) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.fromstring(drawing.svg).iter(f"{SVG}text")]


def test_every_figure_of_the_page_is_there_once(both: tuple[list[Path], str, list[Drawing]]) -> None:
    _, text, made = both
    shown = [re.sub(r"&(amp|lt|gt);", "", title) for title in re.findall(r"<figcaption>(.*?)</figcaption>", text)]
    strips, heats = text.count('<div class="strip '), text.count("<caption>")
    assert min(len(shown), strips, heats) >= 2
    assert len(made) == len(shown) + strips + heats + len(["verdict"])
    assert len({drawing.name for drawing in made}) == len(made)
    assert len({drawing.svg for drawing in made}) == len(made)
    for drawing in made:
        assert re.fullmatch(r"[a-z0-9-]+", drawing.name)


def test_each_stands_alone(both: tuple[list[Path], str, list[Drawing]]) -> None:
    for drawing in both[2]:
        root = ElementTree.fromstring(drawing.svg)
        assert root.tag == f"{SVG}svg"
        assert "var(" not in drawing.svg
        assert " class=" not in drawing.svg
        first = root.find(f"{SVG}rect")
        assert first is not None
        assert (first.get("width"), first.get("height"), first.get("fill")) == ("100%", "100%", "#ffffff")
        assert root.findtext(f"{SVG}title") == drawing.title
        assert root.findtext(f"{SVG}desc") == drawing.alt
        assert drawing.alt
        assert " ".join(texts(drawing)).startswith(" ".join(drawing.title.split())[:20])
        for shape in root.iter():
            if shape.tag in (f"{SVG}path", f"{SVG}line"):
                assert {"stroke", "fill"} & set(shape.keys()), "black is nobody's choice"
            for name in ("fill", "stroke"):
                assert re.fullmatch(r"none|#[0-9a-f]{3,6}|rgb\(\d+,\d+,\d+\)", shape.get(name, "none"))
            assert shape.get("href", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_what_is_written_fits(both: tuple[list[Path], str, list[Drawing]]) -> None:
    """No text begins left of the drawing, or ends right of it, at the width that letters have in the middle."""
    for drawing in both[2]:
        root = ElementTree.fromstring(drawing.svg)
        width = float(root.get("width", "0"))
        for text in root.iter(f"{SVG}text"):
            long = 0.5 * float(text.get("font-size", "12")) * len("".join(text.itertext()))
            back = {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor", ""), 0.0) * long
            start = 14 + float(text.get("x", "0")) - back
            assert start >= 0, drawing.title
            assert start + long <= width + 1, drawing.title


def test_the_look_is_the_pages(both: tuple[list[Path], str, list[Drawing]]) -> None:
    line = next(drawing for drawing in both[2] if drawing.name == "eps-accuracy-against-eps-linf")
    root = ElementTree.fromstring(line.svg)
    strokes = {each.get("stroke") for each in root.iter(f"{SVG}path") if each.get("stroke-width") == "2.2"}
    assert strokes == {"#255cc4", "#c4570f"}, "--c1 and --c2 of the light page"
    bands = [each for each in root.iter(f"{SVG}path") if each.get("opacity") == ".15"]
    assert len(bands) == 2
    assert "eps, in grey levels of 255" in texts(line)
    assert any(text.startswith("a <b> & c: ") for text in texts(line)), "the legend is drawn"


def test_each_says_which_run_it_is_of(both: tuple[list[Path], str, list[Drawing]]) -> None:
    titles = [drawing.title for drawing in both[2]]
    assert {"a <b> & c: Accuracy", "dense: Accuracy", "a <b> & c: router, clean"} <= set(titles)
    alone = drawings(page(collect([both[0][1]])), ["dense"])
    assert {drawing.title.partition(":")[0] for drawing in alone} == {"dense"}


def test_a_heat_map_has_the_numbers_of_the_table(both: tuple[list[Path], str, list[Drawing]]) -> None:
    drawing = next(each for each in both[2] if each.title == "a <b> & c: router, clean")
    table = re.search(r"<caption>router, clean</caption>(.*?)</table>", both[1])
    assert table is not None
    cells = re.findall(r"<td.*?>(.*?)</td>", table[1].partition("<tbody>")[2])
    shares = [float(value) for value in re.findall(r"--v:([\d.]+)", table[1])]
    root = ElementTree.fromstring(drawing.svg)
    drawn = [each for each in root.iter(f"{SVG}rect") if each.get("fill") == "rgb(37,92,196)"]
    assert [float(each.get("fill-opacity", "")) for each in drawn] == pytest.approx(
        [0.66 * share for share in shares], abs=1e-3
    )
    assert [text for text in texts(drawing) if text in set(cells)][-len(cells) :][:4] == cells[:4]
    assert all(cell in drawing.alt for cell in cells)


def test_a_doubted_number_is_doubted_in_its_figure_too(both: tuple[list[Path], str, list[Drawing]]) -> None:
    verdict = both[2][0]
    assert verdict.name == "verdict-clean-and-worst-case-accuracy"
    assert "doubted †" in texts(verdict)
    assert "dense" in texts(verdict)
    assert any("do not quote" in text for text in texts(verdict))


def test_the_expert_of_each_patch_at_the_attacks_own_eps(tmp_path: Path) -> None:
    run, _ = token_run(tmp_path)
    views = collect([run])
    made = [each for each in drawings(page(views), ["tokens"]) if "expert of each patch" in each.title]
    assert made[0].title == "tokens: image 0, a airplane: the expert of each patch"
    assert len(made) == 3
    root = ElementTree.fromstring(made[0].svg)
    assert [text for text in texts(made[0]) if "moved" in text] == [
        "block 0: 2 of 17 items moved",
        "block 1: nothing moved",
    ]
    grids = [each for each in root.iter(f"{SVG}g") if "scale" in each.get("transform", "")]
    assert len(grids) == len(["clean", "attacked"]) * len(["block 0", "block 1"])
    clean, attacked, *_ = ("".join(filter(str.isdigit, "".join(each.itertext()))) for each in grids)
    assert [at for at, (was, now) in enumerate(zip(clean, attacked, strict=True)) if was != now] == [0, 5]
    assert {attacked[0], attacked[5]} == {"2"}
    assert all(each.find(f"{SVG}image") is not None for each in grids), "the image itself is in the file"
    assert not list(root.iter(f"{SVG}use"))
    assert "block 0, attacked: 15 items to expert 1, 2 items to expert 2; 2 moved" in made[0].alt


# ----------------------------------------------------------------------------------------------------------- files


def test_the_verb_writes_them_and_a_list_with_their_words(
    tmp_path: Path, both: tuple[list[Path], str, list[Drawing]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", *map(str, both[0]), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "figures")]
    for _ in range(2):  # what we wrote is written over
        assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"figures: {tmp_path / 'figures' / 'figures.md'}"
    written = {path.name: path.read_text() for path in (tmp_path / "figures").glob("*.svg")}
    assert written == {f"{drawing.name}.svg": drawing.svg for drawing in both[2]}
    told = (tmp_path / "figures" / "figures.md").read_text()
    assert all(f"| `{name}` | " in told for name in written)
    assert "Certified" not in told
    assert told.count("a &lt;b&gt; &amp; c: Accuracy |") == 1


def test_anothers_file_is_left_alone(tmp_path: Path, both: tuple[list[Path], str, list[Drawing]]) -> None:
    theirs = tmp_path / "verdict-clean-and-worst-case-accuracy.svg"
    theirs.write_text("theirs")
    with pytest.raises(rm.UserError, match="does not name it, so it was left alone"):
        rm.report(both[0], tmp_path / "r.html", figures=tmp_path)
    assert theirs.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name], "nothing was written"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--figures", "f", "--format", "pdf"], "pip install 'robustmoe[figures]'"),
        (["--figures", "f", "--format", "png"], "as svg they need nothing"),
        (["--figures", "f", "--format", "jpg"], "--format must be one of 'svg', 'png', 'pdf'"),
        (["--format", "svg"], "expected --figures FOLDER"),
        (["--figures", "file"], "a part of that path is a file"),
        (["--out", "x.svg"], "--figures FOLDER writes its figures"),
    ],
)
def test_what_cannot_be_written_is_one_line_before_the_work(
    arguments: list[str], said: str, tmp_path: Path, both: tuple[list[Path], str, list[Drawing]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    Path("file").touch()
    assert cli.main(["report", *map(str, both[0]), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not Path("report.html").exists()


def test_python_takes_no_other_ending(tmp_path: Path, both: tuple[list[Path], str, list[Drawing]]) -> None:
    with pytest.raises(rm.UserError, match="svg, png or pdf; got 'eps'"):
        rm.report(both[0], tmp_path / "r.html", figures=tmp_path / "f", format="eps")


@pytest.mark.crosscheck
def test_png_and_pdf_show_the_same(tmp_path: Path, both: tuple[list[Path], str, list[Drawing]]) -> None:
    for ending in ("png", "pdf"):
        rm.report(both[0], tmp_path / "r.html", figures=tmp_path / "f", format=ending)
    drawing = next(each for each in both[2] if each.name == "eps-accuracy-against-eps-linf")
    with Image.open(tmp_path / "f" / f"{drawing.name}.png") as picture:
        assert picture.info["Title"] == drawing.title
        assert picture.info["Description"] == drawing.alt
        assert round(picture.info["dpi"][0]) == 288
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        size = ElementTree.fromstring(drawing.svg)
        assert picture.size == tuple(int(3 * float(size.get(side, "0"))) for side in ("width", "height"))
    assert {(255, 255, 255), (0x25, 0x5C, 0xC4), (0xC4, 0x57, 0x0F)} <= colours
    for each in both[2]:
        pdf = (tmp_path / "f" / f"{each.name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-1")
        assert b"LiberationSans" in pdf, "its letters are in the file"
    told = (tmp_path / "f" / "figures.md").read_text()
    assert told.count(f"`{drawing.name}.") == 2
