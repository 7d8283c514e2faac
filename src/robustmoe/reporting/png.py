"""Charts as PNG files, drawn with pillow: for `robustmoe theory`, whose figures stand alone (a report's are SVG)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from robustmoe.records.theory import Chart, Curve
from robustmoe.reporting.figures import ticks

SCALE = 2
WIDTH, HEIGHT = 560 * SCALE, 430 * SCALE
LEFT, RIGHT, BOTTOM = 62.0 * SCALE, 18.0 * SCALE, 52.0 * SCALE
INK, SOFT, RULE, PAPER = "#191c22", "#5a606c", "#e2dfd7", "#ffffff"
COLOURS = ("#255cc4", "#c4570f", "#0e7a6d", "#7d3fc0", "#b9306f", "#66740a")
Point = tuple[float, float]


def png(charts: Sequence[Chart]) -> bytes:
    """The charts side by side, as the content of a PNG file."""
    page = Image.new("RGB", (WIDTH * len(charts), HEIGHT), PAPER)
    for place, chart in enumerate(charts):
        panel = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        _panel(ImageDraw.Draw(panel), chart)
        page.paste(panel, (place * WIDTH, 0))
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


@cache
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points * SCALE)


class _Axis:
    """One direction of a chart: data to pixels, and where the ticks are."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, from_zero: bool) -> None:
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = min(kept), max(kept)
        if from_zero and not log and low >= 0:
            low = 0.0
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (math.log(low), math.log(high)) if log else (low, high)
        pad = 0.04 * (self.high - self.low) or 1.0
        self.high += pad
        if not (from_zero and self.low == 0 and not log):
            self.low -= pad

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log(value) if value > 0 else self.low
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, 7)
        low, high = math.exp(self.low), math.exp(self.high)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
            if len(found) <= 9:
                break
        return found


def _panel(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    draw.text((LEFT, 12 * SCALE), chart.title, INK, _font(15))
    top = _legend(draw, chart.curves, 36.0 * SCALE) + 24 * SCALE
    points = [point for curve in chart.curves for point in curve.points]
    marked = [chart.mark[0]] if chart.mark and not chart.log_x else []
    x = _Axis([p[0] for p in points] + marked, LEFT, WIDTH - RIGHT, chart.log_x, False)
    y = _Axis([p[1] for p in points], HEIGHT - BOTTOM, top, chart.log_y, True)
    for value in y.ticks():
        draw.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], RULE, SCALE)
        draw.text((LEFT - 8 * SCALE, y(value)), f"{value:g}", SOFT, _font(12), anchor="rm")
    for value in x.ticks():
        draw.line([(x(value), HEIGHT - BOTTOM), (x(value), HEIGHT - BOTTOM + 4 * SCALE)], SOFT, SCALE)
        draw.text((x(value), HEIGHT - BOTTOM + 8 * SCALE), f"{value:g}", SOFT, _font(12), anchor="ma")
    draw.line([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], SOFT, SCALE)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8 * SCALE), chart.x_label, INK, _font(13), anchor="md")
    draw.text((8 * SCALE, top - 8 * SCALE), chart.y_label, INK, _font(13), anchor="ld")
    if chart.mark:
        at, words = chart.mark
        _dashes(draw, [(x(at), top), (x(at), HEIGHT - BOTTOM)], SOFT)
        draw.text((x(at), top - 2 * SCALE), words, SOFT, _font(12), anchor="md")
    for number, curve in enumerate(chart.curves):
        shown = [(x(a), y(b)) for a, b in curve.points if math.isfinite(b) and (b > 0 or not chart.log_y)]
        _curve(draw, curve, shown, COLOURS[number % len(COLOURS)])


def _curve(draw: ImageDraw.ImageDraw, curve: Curve, shown: list[Point], colour: str) -> None:
    if curve.style == "dashed":
        _dashes(draw, shown, colour)
        return
    if curve.style == "line" and len(shown) > 1:
        draw.line(shown, colour, 2 * SCALE, joint="curve")
    if curve.style == "dots" or len(shown) <= 24:
        for at in shown:
            draw.circle(at, (3.5 if len(shown) <= 24 else 2) * SCALE, colour)


def _dashes(draw: ImageDraw.ImageDraw, shown: list[Point], colour: str, on: float = 7.0, off: float = 5.0) -> None:
    """A dashed line through the points: the pattern runs on round corners."""
    drawing, left = True, on * SCALE
    for (ax, ay), (bx, by) in pairwise(shown):
        length, done = math.hypot(bx - ax, by - ay), 0.0
        while done < length:
            step = min(left, length - done)
            ends = [(ax + (bx - ax) * s / length, ay + (by - ay) * s / length) for s in (done, done + step)]
            if drawing:
                draw.line(ends, colour, round(1.6 * SCALE))
            done, left = done + step, left - step
            if left <= 1e-9:
                drawing = not drawing
                left = (on if drawing else off) * SCALE


def _legend(draw: ImageDraw.ImageDraw, curves: Sequence[Curve], top: float) -> float:
    """Names and keys from left to right, in as many lines as they need; where they end."""
    left, line = LEFT, 19 * SCALE
    for number, curve in enumerate(curves):
        colour, wide = COLOURS[number % len(COLOURS)], 30 * SCALE + draw.textlength(curve.name, _font(12))
        if left + wide > WIDTH - RIGHT and left > LEFT:
            left, top = LEFT, top + line
        middle = top + line / 2
        ends: list[Point] = [(left, middle), (left + 22 * SCALE, middle)]
        if curve.style == "dashed":
            _dashes(draw, ends, colour)
        elif curve.style == "line":
            draw.line(ends, colour, 2 * SCALE)
        else:
            draw.circle((left + 11 * SCALE, middle), 3.5 * SCALE, colour)
        draw.text((left + 27 * SCALE, middle), curve.name, INK, _font(12), anchor="lm")
        left += wide + 12 * SCALE
    return top + line
