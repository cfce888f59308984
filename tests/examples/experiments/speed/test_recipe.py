"""The speed of pipeline and step."""

import pytest

from examples.experiments.speed import recipe as speed
from examples.image_classification import devices


@pytest.mark.slow
def test_all_three_rates_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(speed, "LEAST_STEPS", 2)
    arguments = ["--dataset", "digits", "--augmentation", "none", "--method", "sgd"]
    speed.main([*arguments, "--model", "resnet8", "--train-size", "256"])
    text = capsys.readouterr().out
    assert text.startswith("resnet8, sgd, 8x8x1 images, batch 128, ")
    *table, _, last = text.splitlines()
    rows = [line.split("|")[1:3] for line in table[4:]]
    assert [name.strip() for name, _ in rows] == [
        "input pipeline alone",
        "step alone",
        "both",
    ]
    assert all(float(rate) > 0 for _, rate in rows)
    assert last.startswith("Of the time of both, ")
    assert last.endswith("% is that of the step.")


def test_a_machine_in_use_cannot_be_divided():
    devices.divide_host(None)
    with pytest.raises(devices.DevicesError, match="host_devices must be set before"):
        devices.divide_host(3)
