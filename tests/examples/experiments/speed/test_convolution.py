"""The benchmark of the convolutions, on small layers."""

from pathlib import Path

import pytest

from examples.experiments.speed import convolution as convolution_speed

EXAMPLES = Path(__file__).parents[4] / "examples"


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
