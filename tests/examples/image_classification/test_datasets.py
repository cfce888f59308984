"""Data sets from files of every kind, good and bad."""

import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from examples.image_classification import datasets, input_pipeline
from examples.image_classification.config import Config
from examples.image_classification.datasets import DatasetError


def arrays(train=6, test=4, size=8):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, size, size, 3), np.uint8),
        "y_train": np.arange(train) % 3,
        "x_test": rng.integers(0, 256, (test, size, size, 3), np.uint8),
        "y_test": np.arange(test)[:, None] % 3,
    }


@pytest.fixture
def folder(tmp_path):
    """Two classes; sizes and modes differ."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (20 + k, 30, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{k}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A few images prepared as if they were CIFAR-10, without TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, "Cifar10", ["image", "label"], "array_record")
    prepare(folder, "Clic", ["image"], "array_record")
    return folder


def prepare(folder, name, features, file_format):
    import io

    import tensorflow_datasets as tfds

    data = arrays(size=32)
    kinds = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }

    def examples(split):
        for k, image in enumerate(data[f"x_{split}"]):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            example = {"image": png, "label": int(data[f"y_{split}"].ravel()[k])}
            yield f"{split}_{k:03d}", {key: example[key] for key in features}

    def info(self):
        chosen = tfds.features.FeaturesDict({key: kinds[key] for key in features})
        return tfds.core.DatasetInfo(builder=self, features=chosen)

    version = {"Cifar10": "3.0.2", "Clic": "1.0.0"}[name]
    with tfds.core.registered.skip_registration():
        builder = type(
            name,
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "VERSION": tfds.core.Version(version),
                "pkg_dir_path": folder,
                "_info": info,
                "_split_generators": lambda self, manager: {
                    split: examples(split) for split in ("train", "test")
                },
                "_generate_examples": lambda self: None,
            },
        )
    builder(data_dir=str(folder), file_format=file_format).download_and_prepare()


def test_tensorflow_datasets_are_read_without_tensorflow(tfds_folder):
    dataset = datasets.load("cifar10", data_dir=tfds_folder)
    assert dataset.num_classes == 10
    expected = arrays(size=32)
    for split, files in (("train", dataset.train), ("test", dataset.test)):
        decoded = datasets.decode(files)
        # Records are shuffled when they are prepared: compare as sets of pairs.
        pairs = {
            (image.tobytes(), int(label))
            for image, label in zip(decoded.images, decoded.labels, strict=True)
        }
        assert pairs == {
            (image.tobytes(), int(label))
            for image, label in zip(
                expected[f"x_{split}"], expected[f"y_{split}"].ravel(), strict=True
            )
        }
        some = datasets.decode(datasets.take(files, np.array([3, 1])))
        np.testing.assert_array_equal(some.images, decoded.images[[3, 1]])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100", r"'cifar100' is not at .*cifar100.*--data-dir.*--download"),
        ("cifar11", "'cifar11' cannot be opened: .*TensorFlow Datasets .*not found"),
        ("clic", r"'clic' must have the features image and label, .* got \['image'\]"),
    ],
)
def test_missing_data_sets_say_what_to_do(tfds_folder, name, message):
    with pytest.raises(DatasetError, match=message) as caught:
        datasets.load(name, data_dir=tfds_folder)
    assert "\n" not in str(caught.value)


def test_digits_come_as_bytes():
    dataset = datasets.load("digits")
    assert dataset.train.images.shape == (1000, 8, 8, 1)
    assert dataset.test.images.shape == (797, 8, 8, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.images.max() == 240
    assert dataset.num_classes == 10


def test_npz(tmp_path):
    expected = arrays()
    np.savez(tmp_path / "mine.npz", **expected)
    dataset = datasets.load(str(tmp_path / "mine.npz"))
    np.testing.assert_array_equal(dataset.train.images, expected["x_train"])
    np.testing.assert_array_equal(dataset.test.labels, expected["y_test"][:, 0])
    assert dataset.num_classes == 3
    np.savez(tmp_path / "grey.npz", **expected | grey(expected))
    assert datasets.load(str(tmp_path / "grey.npz")).train.images.shape == (6, 8, 8, 1)


def grey(data):
    return {name: data[name][..., 0] for name in ("x_train", "x_test")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, r"\['y_test'\] not found among"),
        ({"x_train": np.zeros((6, 8, 8, 3))}, r"x_train must be uint8 .*got float64"),
        ({"x_test": np.zeros((4, 8), np.uint8)}, r"x_test must be uint8 .*got uint8"),
        ({"x_test": np.zeros((4, 9, 8, 3), np.uint8)}, "differ in shape"),
        ({"x_test": np.zeros((4, 8, 8), np.uint8)}, r", \(8, 8, 3\) and \(8, 8\)\."),
        (
            {"x_train": np.zeros((6, 8, 8))},
            r"x_train must be .*got float64 \[6, 8, 8\]",
        ),
        ({"y_test": np.zeros((4, 1))}, r"y_test must be .*got float64 \[4, 1\]"),
        ({"y_train": np.arange(5)}, r"y_train must be integers \[6\].*got int64 \[5\]"),
        ({"y_train": np.zeros(6)}, r"y_train must be integers \[6\].*got float64"),
        ({"y_train": np.arange(-1, 5)}, "without gaps, got 6 classes from -1 to 4"),
        ({"y_train": np.arange(6) << 40}, "without gaps, got 6 classes from 0 to"),
        ({"y_train": np.arange(6) * 2}, "without gaps, got 6 classes from 0 to 10"),
        ({"y_test": np.arange(4)}, "y_test must be from 0 to 2, .* got 0 to 3"),
        ({"y_test": np.array([*"0123"])}, r"y_test must be integers \[4\].*<U1 \[4\]"),
        ({"y_test": np.zeros(0, int)}, r"y_test must be integers \[4\].*int64 \[0\]"),
        ({"y_train": np.int32(0)}, r"y_train must be integers \[6\].*int32 \[\]"),
        ({"y_train": np.zeros(6, "i4,i4")}, r"y_train must be integers \[6\], one"),
        ({"y_test": np.array([{}] * 4)}, "no readable .npz file"),  # would be unpickled
    ],
)
def test_bad_npz_files_are_named(tmp_path, change, message):
    data = {k: v for k, v in (arrays() | change).items() if v is not None}
    np.savez(tmp_path / "mine.npz", **data)
    with pytest.raises(DatasetError, match=message) as caught:
        datasets.load(str(tmp_path / "mine.npz"))
    assert "mine.npz" in str(caught.value)


def test_damaged_and_missing_npz_files_are_named(tmp_path):
    path = tmp_path / "mine.npz"
    with pytest.raises(DatasetError, match=r"no file .*mine.npz"):
        datasets.load(str(path))
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"mine.npz is no readable .npz file"):
        datasets.load(str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DatasetError, match=r"mine.npz is no readable .npz file"):
        datasets.load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path, save):
    """One of any bit of the file; whatever zipfile and NumPy make of it."""
    path = tmp_path / "mine.npz"
    save(path, **arrays())
    whole, expected = path.read_bytes(), datasets.checksum(datasets.load(str(path)))
    rng = np.random.default_rng(0)
    refused = 0
    for bit in rng.choice(8 * len(whole), 600, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            dataset = datasets.load(str(path))
        except DatasetError:
            refused += 1
        else:
            assert datasets.checksum(dataset) == expected, bit
    assert refused > 300  # most of the file is pixels or headers


def test_a_member_that_is_longer_than_its_header_says_is_refused(tmp_path):
    """Its checksum would never be looked at."""
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(size=64))
    path.write_bytes(path.read_bytes().replace(b", 64, 64, 3)", b", 32, 64, 3)"))
    with pytest.raises(DatasetError, match=r"mine.npz is no readable .npz file"):
        datasets.load(str(path))


def test_class_folders(folder):
    dataset = datasets.load(str(folder))
    assert dataset.classes == ["cat", "dog"]
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    labels = [dataset.train.read(k)[1] for k in range(6)]
    assert labels == [0, 0, 0, 1, 1, 1]
    assert dataset.train.name(4).endswith("train/dog/1.png")
    assert datasets.take(dataset.train, np.array([4])).name(0).endswith("dog/1.png")
    with pytest.raises(DatasetError, match=r"1.png has the shape \(21, 30, 3\)"):
        datasets.decode(dataset.train)
    same = datasets.decode(datasets.take(dataset.train, np.array([0, 3])))
    assert same.images.shape == (2, 20, 30, 3)
    np.testing.assert_array_equal(same.labels, [0, 1])


def test_what_is_hidden_is_skipped_at_every_level(folder):
    """What macOS and Jupyter leave behind, and a data set under a hidden folder."""
    image = (folder / "train" / "cat" / "0.png").read_bytes()
    for split in ("train", "val"):
        for place in (".fseventsd", "cat", "cat/.ipynb_checkpoints/more", "dog/more"):
            (folder / split / place).mkdir(parents=True, exist_ok=True)
            (folder / split / place / "._0.png").write_bytes(image)
        (folder / split / "cat/.ipynb_checkpoints/more/0-checkpoint.png").touch()
    for name in ("visible", ".hidden"):
        folder = folder.rename(folder.with_name(name))
        dataset = datasets.load(str(folder))
        assert (len(dataset.train), len(dataset.test)) == (6, 4)
        assert dataset.classes == ["cat", "dog"]


def test_names_need_not_be_utf8(folder):
    """Of images and classes; that of the data set stands in files of the run."""
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / name)
        image = folder / split / name / "0.png"
        image.rename(image.with_name(f"{name}.png"))
    dataset = datasets.load(str(folder))
    assert dataset.classes == ["caf\\xe9", "cat"]
    assert len(dataset.train) == 6
    assert isinstance(datasets.checksum(dataset), int)
    with pytest.raises(DatasetError, match=r"must be UTF-8, got './caf\\xe9'"):
        datasets.load(f"./{name}")


def test_empty_classes_are_named(folder):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DatasetError, match=r"no images in the folders \['bird'\] of"):
        datasets.load(str(folder))


def test_a_folder_of_prepared_data_sets_is_not_one_of_images(tfds_folder, monkeypatch):
    monkeypatch.chdir(tfds_folder)
    assert datasets.load("cifar10", data_dir=tfds_folder).num_classes == 10


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("dataset_info.json", "'cifar10' cannot be opened: .*Failed to load JSON"),
        (
            "cifar10-train.*",
            r"train\[0\] cannot be decoded: ArrayRecord file should be",
        ),
    ],
)
def test_damaged_prepared_data_sets_are_named(damaged, message, tfds_folder, tmp_path):
    shutil.copytree(tfds_folder, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "cifar10" / "3.0.2").glob(damaged)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=message):
        input_pipeline.create(
            Config(dataset="cifar10", batch_size=2), data_dir=tmp_path
        )


def write_split(folder, split, sizes_and_modes):
    (folder / split / "cat").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, (size, mode) in enumerate(sizes_and_modes):
        image = Image.fromarray(rng.integers(0, 256, (size, 9, 3), np.uint8))
        image.convert(mode).save(folder / split / "cat" / f"{k}.png")


def test_a_grey_image_among_others_becomes_rgb(tmp_path):
    modes = ("L", "RGB", "L")
    for split in ("train", "test"):
        write_split(tmp_path, split, [(8, mode) for mode in modes])
    dataset = datasets.load(str(tmp_path))
    images = datasets.decode(dataset.train).images
    assert images.shape == (3, 8, 9, 3)
    for k, image in enumerate(images):
        path = tmp_path / "train" / "cat" / f"{k}.png"
        np.testing.assert_array_equal(image, Image.open(path).convert("RGB"))
    grey = datasets.decode(datasets.take(dataset.train, np.array([0, 2])))
    assert grey.images.shape == (2, 8, 9, 1)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((8, "RGB"), (6, "RGB"), r"differ in shape, \(8, 9, 3\) and \(6, 9, 3\)"),
        ((8, "L"), (8, "RGB"), r"differ in shape, \(8, 9, 1\) and \(8, 9, 3\)"),
    ],
)
def test_splits_that_differ_in_shape_are_refused(tmp_path, train, test, message):
    write_split(tmp_path, "train", [train] * 3)
    write_split(tmp_path, "test", [test] * 2)
    config = Config(dataset=str(tmp_path), augmentation="none", batch_size=2)
    with pytest.raises(DatasetError, match=message) as caught:
        input_pipeline.create(config)
    assert str(tmp_path) in str(caught.value)


def test_an_image_too_large_to_be_true_is_named(folder):
    Image.new("1", (20_000, 10_000)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(DatasetError, match=r"cat/0.png cannot be decoded"):
        datasets.decode(datasets.load(str(folder)).train)


def test_bad_folders_are_named(folder):
    (folder / "val" / "bird").mkdir()
    shutil.copy(folder / "val" / "cat" / "0.png", folder / "val" / "bird" / "0.png")
    with pytest.raises(DatasetError, match=r"classes that train has not: \['bird'\]"):
        datasets.load(str(folder))
    with pytest.raises(DatasetError, match=r"no folder .*/train"):
        datasets.load(str(folder / "train"))
    shutil.rmtree(folder / "val")
    (folder / "val" / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"no images .*/val/CLASS/IMAGE"):
        datasets.load(str(folder))
    with pytest.raises(DatasetError, match=r"no folder .*nowhere"):
        datasets.load("./nowhere")


def test_an_image_that_cannot_be_decoded_is_named(folder):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"cat/0.png cannot be decoded"):
        datasets.decode(datasets.load(str(folder)).train)
