"""The benchmark of the convolutions, on small layers."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import convolution_speed  # noqa: E402


def test_table(monkeypatch, capsys):
    small = {"tiny": convolution_speed.Case(2, 8, 3, 4, 3, 2)}
    monkeypatch.setattr(convolution_speed, "CASES", small)
    convolution_speed.main(["--rounds=1"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| tiny")]
    assert [line.split("|")[2].strip() for line in lines] == [
        what + where
        for what in ("output", "input gradient", "weight gradient")
        for where in ("", ", in a loop")
    ]


def test_unknown_layers_are_named(capsys):
    with pytest.raises(SystemExit):
        convolution_speed.main(["--case=transformer"])
    assert "--case must be part of one of ['first', " in capsys.readouterr().err
