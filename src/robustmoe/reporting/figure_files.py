"""The figures of a report as files for papers and slides: SVG by ourselves, PNG and PDF by vl-convert (extra
``figures``)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from robustmoe.errors import UserError, printable
from robustmoe.records import assert_ours, write_atomic, write_own
from robustmoe.records.files import explained
from robustmoe.reporting.collect import RunView
from robustmoe.reporting.grid import safe
from robustmoe.reporting.page import page
from robustmoe.reporting.standalone import Drawing, drawings

MARK = "<!-- robustmoe figures -->"
LIST = "figures.md"
"""Which figures are in a folder, and what is seen in each, in words. What it does not name is not written over."""

PNG_SCALE = 3.0  # pixels a unit: about 290 an inch at the size of the SVG


def figure_writer(folder: str | os.PathLike[str], ending: str) -> Callable[[Sequence[RunView]], list[Path]]:
    """Returns what writes the figures of runs into the folder, as ``ending``: svg, png or pdf. UserError where they
    cannot be written: the folder is a file, or what writes this kind is not installed.
    """
    rendered = _renderer(ending)
    place = Path(folder)
    with explained("write", place):
        place.mkdir(parents=True, exist_ok=True)
    assert_ours(place / LIST, MARK)

    def write(views: Sequence[RunView]) -> list[Path]:
        made = drawings(page(views), [view.name for view in views])
        if not made:
            raise UserError("these runs have no figure yet; robustmoe evaluate, dissect, certify and others make them")
        files = {place / f"{drawing.name}.{ending}": drawing for drawing in made}
        ours = _listed(place)
        for path in files:
            if os.path.lexists(path) and path.name not in ours:
                raise UserError(
                    f"{path} is there, and {place / LIST} does not name it, so it was left alone; move it away, "
                    "or choose another folder"
                )
        write_own(place / LIST, _list(files, ours, place), MARK)
        for path, drawing in files.items():
            write_atomic(path, rendered(drawing))
        return list(files)

    return write


def _renderer(ending: str) -> Callable[[Drawing], bytes]:
    """Returns what makes a file of a drawing. UserError where it cannot be made here."""
    if ending == "svg":
        return lambda drawing: drawing.svg.encode()
    if ending not in ("png", "pdf"):
        raise UserError(f"figures are written as svg, png or pdf; got {ending!r}")
    try:
        import vl_convert
    except ImportError:
        raise UserError(
            f"figures as {ending} need vl-convert-python; expected the extra: pip install 'robustmoe[figures]' "
            "(as svg they need nothing)"
        ) from None
    if ending == "pdf":
        return lambda drawing: bytes(vl_convert.svg_to_pdf(drawing.svg))
    return lambda drawing: _told(vl_convert.svg_to_png(drawing.svg, scale=PNG_SCALE), drawing)


def _told(png: bytes, drawing: Drawing) -> bytes:
    """Returns the picture with its resolution, and with title and alternative text in it."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", drawing.title)
    info.add_itxt("Description", drawing.alt)
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(out, "PNG", pnginfo=info, dpi=(96 * PNG_SCALE, 96 * PNG_SCALE), optimize=True)
    return out.getvalue()


def _listed(folder: Path) -> dict[str, str]:
    """Returns the line of each file that we wrote into the folder before."""
    path = folder / LIST
    with explained("read", path):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`|]+)` \|.*$", text, re.MULTILINE)}


def _list(files: dict[Path, Drawing], ours: dict[str, str], folder: Path) -> str:
    lines = {name: line for name, line in ours.items() if (folder / name).is_file()}
    lines |= {path.name: f"| `{path.name}` | {safe(each.title)} | {safe(each.alt)} |" for path, each in files.items()}
    head = [MARK, "", "| file | title | what is seen, in words |", "| --- | --- | --- |"]
    return printable("\n".join([*head, *(lines[name] for name in sorted(lines))]) + "\n")
