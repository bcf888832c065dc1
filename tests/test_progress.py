"""Progress where there is no terminal: a line now and then, of what takes long."""

from __future__ import annotations

import pytest

from halfbyte import progress
from halfbyte.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be changed."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_is_done_soon_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Quantizing", 30, unit="blocks") as ticker:
        for _ in range(30):
            clock[0] += 0.6
            ticker.advance()
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_says_so_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Quantizing", 30, unit="blocks") as ticker:
        for _ in range(12):
            clock[0] += 10
            ticker.advance()
    assert capsys.readouterr() == (
        "",
        "halfbyte: Quantizing: 2 of 30 blocks, 0:20 so far, about 4:40 to go\n"
        "halfbyte: Quantizing: 8 of 30 blocks, 1:20 so far, about 3:40 to go\n",
    )


def test_before_the_first_step_there_is_no_estimate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Fetching", 5e6, unit="bytes") as ticker:
        clock[0] += 25
        ticker.describe("Fetching weights")
        ticker.advance(1e6)
        clock[0] += 60
        ticker.advance(1e6)
    assert capsys.readouterr().err == (
        "halfbyte: Fetching weights: 0 of 5 MB, 0:25 so far\n"
        "halfbyte: Fetching weights: 2 of 5 MB, 1:25 so far, about 2:08 to go\n"
    )


def test_whoever_wants_silence_gets_it(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Quantizing", 30, enabled=False) as ticker:
        clock[0] += 1000
        ticker.advance()
    assert capsys.readouterr() == ("", "")
