"""The speed of pipeline and step."""

from examples.image_classification import speed


def test_all_three_rates_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(speed, "LEAST_STEPS", 2)
    arguments = ["--dataset", "digits", "--augmentation", "none", "--method", "sgd"]
    speed.main([*arguments, "--model", "resnet8", "--train-size", "256"])
    text = capsys.readouterr().out
    assert text.startswith("resnet8, sgd, 8x8x1 images, batch 128, ")
    rows = [line.split("|")[1:3] for line in text.splitlines()[4:]]
    assert [name.strip() for name, _ in rows] == [
        "input pipeline alone",
        "step alone",
        "both",
    ]
    assert all(float(rate) > 0 for _, rate in rows)
