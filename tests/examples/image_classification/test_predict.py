"""A trained network in use: the classes and probabilities that its run had in mind."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from examples.image_classification import __main__ as command
from examples.image_classification import predict
from examples.image_classification.config import Config
from examples.image_classification.predict import Network
from examples.image_classification.run import Options, run
from hero_jax import models
from tests.examples.image_classification import small

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
RUN = Path("runs/digits/seed_0")
NAMES = "dhbjacgfie"
CONFIG = Config(
    model="resnet8",
    method="sgd",
    augmentation="none",
    epochs=2,
    batch_size=20,
    curvature_batches=1,
    bits=(8,),
)


IN_A_HURRY = True
"""What is compiled here runs for some steps only."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_network(small_network, monkeypatch):  # noqa: ARG001
    """Use it, too."""
    monkeypatch.setattr(models, "create", lambda *_, **__: small.Small())


def images(count, size):
    """Noise about a colour of the class, and labels; not all can be told apart."""
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 10
    means = 40 + 17 * labels[:, None] * np.array([1, 0.5, -0.2])
    noise = rng.normal(0, 60, (count, *size, 3))
    return (means[:, None, None] + noise).clip(0, 255).astype(np.uint8), labels


def predicted(capsys, *arguments):
    """Names, classes and probabilities that the command prints."""
    capsys.readouterr()
    assert predict.main([str(RUN), *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names, classes, probabilities = zip(*(x.split("\t") for x in lines), strict=True)
    return names, classes, [*map(float, probabilities)]


def loss_of(probabilities, labels):
    return -np.mean(np.log(probabilities[np.arange(len(labels)), labels]))


def as_on_the_page():
    """What the Python of the page prints."""
    (code,) = re.findall(r"^```python\n(.*?)\n```$", PAGE.read_text(), re.M | re.S)
    lines = [x for x in code.splitlines() if x and "import " not in x]
    assert len(lines) <= 10
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, PAGE.name, "exec"), {})
    name, probability = printed.getvalue().split()
    return name, float(probability)


@pytest.mark.slow
def test_digits(capsys):
    arguments = "digits --method sgd --epochs 1 --devices 1 --train-size 512 --quiet"
    assert command.main(arguments.split()) == 0
    told = json.loads((RUN / "result.json").read_text())
    names, classes, probabilities = predicted(capsys, "digits")
    assert names == tuple(f"test[{k}]" for k in range(797))
    data = load_digits()
    test = np.random.default_rng(0).permutation(1797)[1000:]
    labels = data.target[test]
    assert np.mean([*map(int, classes)] == labels) == told["test_accuracy"]
    pixels = (15 * data.images[test][..., None]).astype(np.uint8)
    network = Network(RUN)
    # Sums in another order, in single precision.
    np.testing.assert_allclose(
        loss_of(network(pixels), labels), told["test_loss"], rtol=1e-4
    )
    assert told["network"] == json.loads((RUN / "weights.json").read_text())
    assert told["network"]["classes"] == [*"0123456789"]
    train = 15 * data.images[np.random.default_rng(0).permutation(1797)[:1000]] / 255
    chosen = np.random.default_rng(0).permutation(1000)[:512]
    np.testing.assert_allclose(told["network"]["mean"], [train[chosen].mean()])
    np.testing.assert_allclose(told["network"]["std"], [train[chosen].std()])
    Image.fromarray(pixels[5, :, :, 0]).save("image.png")
    name, probability = as_on_the_page()
    assert name == classes[5]
    _, (again,), (alone,) = predicted(capsys, "image.png")
    assert again == name
    np.testing.assert_allclose([probability, alone], probabilities[5], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_arrays_that_are_downsampled(capsys):
    (x_train, y_train), (x_test, y_test) = images(60, (8, 6)), images(130, (8, 6))
    arrays = {"x_train": x_train, "y_train": y_train}
    np.savez("mine.npz", **arrays, x_test=x_test, y_test=y_test)
    config = dataclasses.replace(CONFIG, dataset="mine.npz", downsample=2)
    record = run(config, Options(out=RUN, devices=1, quiet=True))
    _, classes, _ = predicted(capsys, "mine.npz")
    assert np.mean([*map(int, classes)] == y_test) == record["test_accuracy"]
    network = Network(RUN)
    np.testing.assert_allclose(
        loss_of(network(x_test), y_test), record["test_loss"], rtol=1e-5
    )
    for wrong in (x_test[:, :4], x_test / 255.0, x_test[0]):
        with pytest.raises(ValueError, match=r"images must be uint8 \['B', 8, 6, 3\]"):
            network(wrong)


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    "augmentation",
    [pytest.param(x, marks=pytest.mark.slow) for x in ("resized_crop", "crop_flip")],
)
def test_photographs(capsys, augmentation):
    """With one size if need be; a grey one, a hidden one, one damaged, odd names."""
    for split, count in (("train", 60), ("val", 70)):
        size = (20, 24)
        for k, (pixels, label) in enumerate(zip(*images(count, size), strict=True)):
            folder = Path("data", split, NAMES[label])
            folder.mkdir(parents=True, exist_ok=True)
            if augmentation == "resized_crop":
                pixels = pixels[: 16 + k % 5, : 24 - k % 3]
            image = Image.fromarray(pixels).convert("L" if k == 7 else "RGB")
            image.save(os.fsdecode(os.fsencode(folder / f"{k:03d}") + b"\xe9.png"))
    (folder / "._hidden.png").write_bytes(b"")
    if augmentation == "resized_crop":
        (folder / "broken.png").write_bytes(b"")
    config = dataclasses.replace(
        CONFIG, dataset="data", augmentation=augmentation, image_size=16
    )
    record = run(config, Options(out=RUN, devices=1, workers=0, quiet=True))
    assert record["network"]["classes"] == sorted(NAMES)
    names, classes, _ = predicted(capsys, "data/val")
    assert len(names) == 70
    truth = [Path(name).parent.name for name in names]
    assert np.mean(np.array(classes) == truth) == record["test_accuracy"]
    network = Network(RUN)
    paths = sorted(Path("data/val").rglob("[0-9]*.png"))
    prepared = np.stack([network.prepared(path.read_bytes()) for path in paths])
    labels = np.array([sorted(NAMES).index(name) for name in truth])
    np.testing.assert_allclose(
        loss_of(network(prepared), labels), record["test_loss"], rtol=1e-5
    )
    shutil.copy(paths[3], "image.png")
    _, (name,), (probability,) = predicted(capsys, "image.png")
    on_page = as_on_the_page()
    assert on_page[0] == name == classes[3]
    np.testing.assert_allclose(on_page[1], probability, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_what_is_wrong_is_said_in_a_line(capsys):
    x, y = images(40, (8, 8))
    np.savez("mine.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    Path("empty").mkdir()
    Path("runs/unfinished").mkdir(parents=True)
    config = dataclasses.replace(CONFIG, dataset="mine.npz")
    run(config, Options(out=RUN, devices=1, quiet=True))
    Image.fromarray(x[0, :7]).save("low.png")
    told = json.loads((RUN / "weights.json").read_text())
    for folder, facts in (
        ("damaged", {"classes": []}),
        ("flat", told | {"image_shape": [8, 8]}),
        ("others", told | {"image_shape": [8, 9, 3]}),
    ):
        shutil.copytree(RUN, Path("runs", folder))
        Path("runs", folder, "weights.json").write_text(json.dumps(facts))
    for folder, name, message in (
        (RUN, "nowhere.png", "no images that can be read in nowhere.png"),
        (RUN, "low.png", "must have 8x8 pixels, 3 channels, as in training, got 8x7"),
        (RUN, "empty", "no images that can be read in empty"),
        (RUN, "nothing.npz", "no file nothing.npz"),
        ("runs/unfinished", "low.png", "must be the folder of a finished run, with"),
        (
            "runs/damaged",
            "low.png",
            "runs/damaged must be the folder of a finished run",
        ),
        ("runs/flat", "low.png", "runs/flat must be the folder of a finished run"),
        ("runs/others", "low.png", "weights.json that fit: "),
    ):
        assert predict.main([str(folder), name]) == 1
        out, error = capsys.readouterr()
        assert not out
        assert message in error
        assert error.splitlines()[-1].startswith("error: ")
    assert predict.main([str(RUN)]) == 2
    assert "name IMAGES, too" in capsys.readouterr().err
    # As `| head` does, which has seen enough.
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed):  # noqa: PTH123
        assert predict.main([str(RUN), "mine.npz"]) == 0
    assert not capsys.readouterr().err
