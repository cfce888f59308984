"""CIFAR-10 and photographs of ImageNet, where a folder with them lies at hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.image_classification import datasets, input_pipeline
from examples.image_classification.config import Config
from examples.image_classification.run import Options, run

SHARED = Path(__file__).parents[3] / "shared"
PHOTOGRAPHS = SHARED / "data" / "imagenette_mini"
UNPACK = SHARED / "tools" / "unpack_data.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A folder where TensorFlow Datasets finds CIFAR-10 prepared."""
    if not UNPACK.exists():
        pytest.skip(f"needs CIFAR-10, by {UNPACK}")
    folder = tmp_path_factory.mktemp("data")
    for kind in ("tfds", "npz"):
        subprocess.run(
            [sys.executable, UNPACK, "cifar10", "--out", folder, "--format", kind],
            check=True,
            capture_output=True,
        )
    return folder


def test_cifar10_is_whole_and_the_same_by_both_ways(cifar10):
    by_tfds = datasets.load("cifar10", data_dir=cifar10)
    train, test = datasets.decode(by_tfds.train), datasets.decode(by_tfds.test)
    assert (len(train.labels), len(test.labels)) == (50_000, 10_000)
    np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 5000))
    pixels = train.images.reshape(-1, 3) / 255.0
    published = [0.49139968, 0.48215841, 0.44653091]
    np.testing.assert_allclose(pixels.mean(0), published, atol=1e-7)
    np.testing.assert_allclose(
        pixels.std(0), [0.24703223, 0.24348513, 0.26158784], atol=1e-7
    )
    by_npz = datasets.load(str(cifar10 / "cifar10.npz"))
    assert by_npz.num_classes == by_tfds.num_classes == 10

    def pairs(data):
        images = (image.tobytes() for image in data.images)
        return sorted(zip(images, data.labels.tolist(), strict=True))

    assert pairs(by_npz.test) == pairs(test)


@pytest.mark.parametrize("method", ["hero", "sgd"])
def test_two_epochs_on_a_part_of_cifar10_learn_something(cifar10, tmp_path, method):
    config = Config(
        model="resnet8",
        method=method,
        h=0.5,
        gamma=0.1,
        epochs=2,
        train_size=5000,
        test_size=1000,
    )
    record = run(config, Options(out=tmp_path, data_dir=cifar10, devices=1, quiet=True))
    # Chance is 10 %, with a standard deviation of 1 %.
    assert record["test_accuracy"] > 0.25
    assert abs(record["accuracy_by_bits"]["8"] - record["test_accuracy"]) < 0.03


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"needs {PHOTOGRAPHS}")
def test_photographs_go_through_the_imagenet_pipeline(tmp_path):
    config = Config(
        dataset=str(PHOTOGRAPHS),
        augmentation="resized_crop",
        image_size=64,
        model="resnet18",
        method="sgd",
        epochs=6,
        batch_size=50,
        learning_rate=0.02,
    )
    pipeline = input_pipeline.create(config, workers=2)
    assert (pipeline.num_classes, pipeline.steps, pipeline.num_test) == (10, 12, 300)
    labels = [item["labels"] for item in pipeline.epoch(0)]
    pipeline.close()
    np.testing.assert_array_equal(np.bincount(np.concatenate(labels)), np.full(10, 60))
    record = run(config, Options(out=tmp_path, workers=2, devices=1, quiet=True))
    assert all(row["skipped_images"] == 0 for row in record["epochs"])
    # Chance is 10 % of 300 images, with a standard deviation of 1.7 %.
    assert record["best_test_accuracy"] > 0.2
