"""`robustmoe.progress`: a bar on a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from robustmoe import progress as module
from robustmoe.progress import Pace, note, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def to_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of stderr (inside the test: pytest puts its own stderr there before each phase)."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("ROBUSTMOE_PROGRESS")
    return out


def test_without_a_terminal_only_notes_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in progress("abc", "letters"):
        note(f"saw {item} [bold]")
        seen.append(item)
    with progress(3, "steps") as bar:
        bar.advance()
        bar.say("loss 1")
    assert seen == ["a", "b", "c"]
    assert capsys.readouterr().err == "saw a [bold]\nsaw b [bold]\nsaw c [bold]\n"


def test_a_terminal_gets_a_bar_with_text_and_whole_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = to_terminal(monkeypatch)
    with progress(2, "epoch 1", unit="batches") as bar:
        bar.advance()
        bar.say("loss 0.31")
        module._display.refresh()
        note("a note [red]" + "x" * 200)
    text = terminal.getvalue()
    assert "epoch 1" in text
    assert "1/2" in text
    assert "batches" in text
    assert "loss 0.31" in text
    assert "a note [red]" + "x" * 200 in text


def test_the_total_may_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = to_terminal(monkeypatch)
    with progress(900, "attack", unit="passes") as bar:
        bar.advance(30)
        bar.expect(60)
        module._display.refresh()
        assert (bar.total, bar._display.tasks[0].total, bar._display.tasks[0].completed) == (60, 60, 30)
    assert "30/60" in terminal.getvalue()
    quiet = progress(2, "x")
    quiet.expect(1)  # not shown: the same calls do nothing but count
    assert quiet.total == 1


def test_bars_nest_and_an_abandoned_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = to_terminal(monkeypatch)
    for _ in progress(range(3), "outer"):
        for _ in progress(iter("ab"), "inner", total=2):
            assert module._open_bars == 2
            break
        break
    assert module._open_bars == 0
    assert module._display is None
    assert "inner" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


def test_an_error_inside_closes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    to_terminal(monkeypatch)
    with pytest.raises(RuntimeError, match="inside"), progress(2, "x"):
        raise RuntimeError("inside")
    assert module._display is None


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = to_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    assert list(progress([1, 2], "x")) == [1, 2]
    note("hello")
    assert terminal.getvalue() == ""


def test_the_total_is_the_length_unless_given() -> None:
    assert progress([1, 2], "x").total == 2
    assert progress(iter([1, 2]), "x").total is None
    assert progress(5, "x").total == 5


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def to_file(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No terminal, as in a log file, and a clock of the test's own."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "_told", 0.0)
    monkeypatch.setattr(module, "_closed", 0.0)
    monkeypatch.delenv("ROBUSTMOE_PROGRESS")
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_a_log_file_gets_a_line_an_interval_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = to_file(monkeypatch)
    with progress(101, "epoch 1/3", unit="steps") as bar:
        bar.advance(1)
        for _ in range(100):
            clock.now += 7.0
            bar.say("loss 0.31")
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/3: 6/101 steps, 11:05 left, loss 0.31"
    assert lines[1] == "epoch 1/3: 11/101 steps, 10:30 left, loss 0.31"
    assert len(lines) == 700 // 35


def test_short_jobs_are_silent_and_long_rows_of_them_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = to_file(monkeypatch)
    for _ in range(3):  # each for itself
        clock.now += 60.0
        for _ in progress(29, "short"):
            clock.now += 1.0
    assert capsys.readouterr().err == ""
    clock.now += 60.0
    for number in range(4):  # one after the other, and nested
        for _ in progress(2, f"attack {number}", unit="images"):
            for _ in progress(2, "inner"):
                clock.now += 6.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert any("; inner: " in line for line in lines)


def test_a_resume_s_steps_took_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = to_file(monkeypatch)
    with progress(100, "epoch 1/1", unit="steps") as bar:
        bar.advance(90)
        clock.now += 40.0
        bar.advance(4)
    assert capsys.readouterr().err == "epoch 1/1: 94/100 steps, 1:00 left\n"


@pytest.mark.parametrize("said, lines", [("off", 0), ("5", 4), ("nonsense", 0)])
def test_the_interval_can_be_said(
    said: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = to_file(monkeypatch)
    monkeypatch.setenv("ROBUSTMOE_PROGRESS", said)
    for _ in progress(20, "x"):
        clock.now += 1.0
    assert len(capsys.readouterr().err.splitlines()) == lines


NOTEBOOK = """
from robustmoe import progress as module
from robustmoe.progress import progress
module._IN_NOTEBOOK = 0.0
for _ in progress(3, "done", unit="steps"):
    pass
open_bar = progress(4, "epoch 1/1", unit="steps").__enter__()
for _ in range(3):
    open_bar.say("loss 0.5")
    open_bar.advance()
"""


@pytest.mark.notebooks
def test_a_notebook_gets_a_bar_in_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.delenv("ROBUSTMOE_PROGRESS")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    texts = [output["data"]["text/plain"] for output in notebook.cells[0].outputs]
    assert texts[0] == "", "a bar that is done is taken off"
    assert re.fullmatch(r"epoch 1/1: 3/4 steps, 0:00 left, loss 0\.5", texts[1])
    assert len(texts) == 2


def test_a_pace_leaves_out_the_first_batch() -> None:
    pace = Pace(3)
    rates = []
    for seconds in (50.0, 1.0, 3.0):
        pace.add(8, seconds)
        rates.append(pace.rate)
    assert rates == [None, None, 16 / 4]


def test_a_log_file_is_told_at_once_a_terminal_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROBUSTMOE_PROGRESS", "1000")
    with progress(4, "attack", unit="images") as bar:
        bar.advance(2)
        bar.say("8 images/s")
        bar.log()
    assert capsys.readouterr().err == "attack: 2/4 images, 8 images/s\n"
    terminal = to_terminal(monkeypatch)
    with progress(4, "attack", unit="images") as bar:
        bar.log()
    assert "attack: " not in terminal.getvalue()
