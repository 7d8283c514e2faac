"""`robustmoe.progress`: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from robustmoe import progress as module
from robustmoe.progress import note, progress


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
