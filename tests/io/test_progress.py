"""Bars on a terminal, plain lines elsewhere, and times as exact as an estimate is."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from fgvc.io import progress
from fgvc.io.times import about


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 s"), (7.4, "about 7 s"), (41, "about 40 s"), (58, "about 1 min"), (250, "about 4 min"),
        (1400, "about 25 min"), (3540, "about 1 h"), (3600, "about 1 h"), (7900, "about 2 h 10 min"), (86400, "about 24 h"),
        (400_000, "about 5 days"),
    ],
)  # fmt: skip
def test_a_time_has_a_digit_or_two(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_where_there_is_no_terminal_a_line_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 8))  # seconds, of each look at the clock
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    assert list(progress.track([3, 3, 3, 1], "scoring", 10, size=int)) == [3, 3, 3, 1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "scoring: 6 of 10, about 10 s left\n"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "scoring", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    list(progress.track(range(3), "scoring", 3))
    assert capsys.readouterr().err == ""


def test_one_display_holds_all_bars_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    displays: list[list[str]] = []

    def inner() -> Iterator[int]:
        for item in progress.track([1, 2], "inner", 2):
            with progress.bars() as display:
                assert display is not None
                displays.append([task.description for task in display.tasks])
            yield item

    with progress.bars(console) as outer:
        assert outer is not None
        assert list(progress.track(inner(), "outer", 2)) == [1, 2]
        assert outer.tasks == []
    assert displays == [["outer", "inner"]] * 2
    assert progress._live == []
    with pytest.raises(ZeroDivisionError), progress.bars(console):
        _ = 1 / 0
    assert progress._live == []
