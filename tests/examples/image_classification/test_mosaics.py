"""Mosaics: every tile in its place, and what is wrong with a folder."""

import json

import numpy as np
import pytest

from examples.image_classification import datasets
from examples.image_classification.datasets import DatasetError
from tests.examples.image_classification import mosaic_files


@pytest.fixture
def written(tmp_path):
    """Images and labels, and the folder with them; the last row is not full."""
    rng = np.random.default_rng(0)
    images, labels = (
        {
            split: rng.integers(0, 256, (size, 6, 6, 3), np.uint8)
            for split, size in (("train", 18), ("test", 5))
        },
        {"train": np.arange(18) % 3, "test": np.arange(5) % 3},
    )
    mosaic_files.write(tmp_path / "mosaics", images, labels)
    return images, labels, tmp_path / "mosaics"


def test_every_image_is_found_in_its_place(written):
    images, labels, folder = written
    dataset = datasets.load(str(folder))
    assert dataset.classes == ["0", "1", "2"]
    for split, found in (("train", dataset.train), ("test", dataset.test)):
        np.testing.assert_array_equal(found.images, images[split])
        np.testing.assert_array_equal(found.labels, labels[split])


def lose_a_picture(folder):
    (folder / "train-01.webp").unlink()


def swap_two(folder):
    (folder / "train-00.webp").rename(folder / "x")
    (folder / "train-01.webp").rename(folder / "train-00.webp")
    (folder / "x").rename(folder / "train-01.webp")


def lose_all(folder):
    for path in folder.glob("test-*.webp"):
        path.unlink()


def damage(folder):
    (folder / "train-00.webp").write_bytes(b"RIFF")


def change_columns(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"mosaic_columns": 5}))


def forget_a_split(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["splits"]["test"]
    (folder / "meta.json").write_text(json.dumps(meta))


def make_one_class_of_all(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"classes": ["a"]}))


def permute_labels(folder):
    labels = np.load(folder / "train-labels.npy")
    np.save(folder / "train-labels.npy", np.roll(labels, 1))


def empty_labels(folder):
    (folder / "train-labels.npy").write_bytes(b"")


def lose_labels(folder):
    (folder / "test-labels.npy").unlink()


def damage_the_header_of_labels(folder):
    path = folder / "test-labels.npy"
    path.write_bytes(path.read_bytes().replace(b"'descr'", b"'descr("))


def leave_nothing_of_meta(folder):
    (folder / "meta.json").write_text('["mosaic_columns"]')


def pickle_labels(folder):
    np.save(folder / "test-labels.npy", np.array([{}] * 5), allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_picture, "must have 18 images and labels to train, got 12 and 18"),
        (swap_two, "the train images do not match their checksum"),
        (lose_all, "cannot be read: no pictures test-00.webp and so on"),
        (damage, "cannot be read: .*train-00.webp"),
        (change_columns, "must be rows of 5 squares, got 24x12 pixels"),
        (forget_a_split, "cannot be read: KeyError..test"),
        (make_one_class_of_all, "y_train must be from 0 to 0, the last class"),
        (permute_labels, "the train labels do not match their checksum"),
        (empty_labels, "cannot be read: No data left in file"),
        (lose_labels, "test-labels.npy"),
        (damage_the_header_of_labels, "cannot be read: "),
        (leave_nothing_of_meta, "cannot be read: "),
        (pickle_labels, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_bad_folders_are_named(written, change, message):
    *_, folder = written
    change(folder)
    with pytest.raises(DatasetError, match=message):
        datasets.load(str(folder))
