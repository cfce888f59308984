"""Programs take turns, and what is not timed is not counted."""

import json

import pytest

from examples.experiments.speed import harness


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a program says so."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(harness.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_turns_alternate_and_first_calls_are_not_timed(clock):
    calls = []

    def program(name, first, later):
        def run():
            clock.now += later if calls and calls[-1] == name else first
            calls.append(name)

        return run

    programs = {"a": program("a", 8.0, 1.0), "b": program("b", 0.5, 2.0)}
    seconds = harness.take_turns(programs, 2, {"a": 3, "b": 1})
    assert calls == 2 * (4 * ["a"] + 2 * ["b"])
    assert seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_short_programs_fill_a_turn(clock):
    calls = []

    def run():
        clock.now += harness.TURN_SECONDS / 4
        calls.append(0)

    harness.take_turns({"a": run}, 1)
    assert len(calls) == 1 + 4


def test_records_have_an_origin(tmp_path, capsys):
    path = tmp_path / "record.json"
    record = harness.report([["a", "b"], ["1", "2"]], path, rows=[3])
    assert "| 1 | 2 |" in capsys.readouterr().out
    assert json.loads(path.read_text()) == record
    assert record["rows"] == [3]
    assert record["environment"]["jax"]
