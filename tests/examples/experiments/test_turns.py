"""Programs take turns, and what is not timed is not counted."""

import pytest

from examples.experiments.common import turns


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a program says so."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(turns.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_turns_alternate_and_first_calls_are_not_timed(clock):
    calls = []

    def program(name, first, later):
        def run():
            clock.now += later if calls and calls[-1] == name else first
            calls.append(name)

        return run

    programs = {"a": program("a", 8.0, 1.0), "b": program("b", 0.5, 2.0)}
    seconds = turns.take_turns(programs, 2, {"a": 3, "b": 1})
    assert calls == 2 * (4 * ["a"] + 2 * ["b"])
    assert seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_short_programs_fill_a_turn(clock):
    calls = []

    def run():
        clock.now += turns.TURN_SECONDS / 4
        calls.append(0)

    turns.take_turns({"a": run}, 1)
    assert len(calls) == 1 + 4
