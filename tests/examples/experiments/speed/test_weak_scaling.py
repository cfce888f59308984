"""The measurement of weak scaling runs, and counts what crosses the devices."""

import re
from pathlib import Path

import jax
import pytest

from examples.experiments.speed import weak_scaling

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.slow
def test_table(capsys):
    arguments = ["--size=8", "--batch=4", "--rounds=1", "--devices", "1", "2"]
    weak_scaling.main([*arguments, "--method", "SGD", "--way", "pmap local"])
    rows = re.findall(r"\| SGD .*", capsys.readouterr().out)
    one, two = ([cell.strip() for cell in row.split("|")[2:-1]] for row in rows)
    assert (one[:2], two[:2]) == (["pmap local", "1"], ["pmap local", "2"])
    assert int(one[2]) > 0
    assert one[3] == "1.00"
    assert one[4] == "0"
    if jax.__version_info__ >= (0, 8):  # which joins gradient, statistics and accuracy
        assert two[4] == "1"


def test_devices_that_are_not_there_are_named(capsys):
    with pytest.raises(SystemExit):
        weak_scaling.main(["--devices", "9"])
    assert "--devices must be 1 to 8, got [9]" in capsys.readouterr().err
