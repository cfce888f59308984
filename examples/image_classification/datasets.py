"""Data sets by name: digits, TensorFlow Datasets, `.npz` files, folders, mosaics.

A data set is held in one of two ways: :class:`Arrays`, all images of one size, or
:class:`Files`, encoded images of any size that are decoded as they are needed.
TensorFlow Datasets are read as random-access sources, without TensorFlow.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from . import mosaics
from .errors import DatasetError
from .photographs import UNREADABLE, to_rgb

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TEST_SPLITS = ("test", "val", "validation")
READERS = 8
"""Threads that read files for their checksum."""


class Arrays(NamedTuple):
    """Decoded images, uint8 `[N, H, W, C]`, and their labels, int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray


class Files:
    """Encoded images by number; can be sent to worker processes.

    Args:
      records: pairs of a path and a label, or records of TensorFlow Datasets.
      title: of the whole; for pairs the folder that the paths are relative to.
      chosen: numbers of the records that count, in order; all if None.
    """

    def __init__(
        self, records: Sequence[Any], title: str, chosen: np.ndarray | None = None
    ) -> None:
        self._records, self._title = records, title
        self._chosen = np.arange(len(records)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label; `OSError` if it cannot be read."""
        try:
            record = self._records[int(self._chosen[index])]
        except Exception as error:  # whatever damaged files make ArrayRecord raise
            raise OSError(str(error).splitlines()[0]) from error
        if isinstance(record, tuple):
            return Path(self._title, record[0]).read_bytes(), record[1]
        return record["image"], int(record["label"])

    def name(self, index: int) -> str:
        """Return what to call an image in a message."""
        number = int(self._chosen[index])
        if isinstance(self._records, list):
            return str(Path(self._title, self._records[number][0]))
        return f"{self._title}[{number}]"

    def take(self, indices: np.ndarray) -> "Files":
        """Return some of the images, by number."""
        return Files(self._records, self._title, self._chosen[indices])


class Dataset(NamedTuple):
    """Training and test images, both :class:`Arrays` or both :class:`Files`.

    The names of the classes are in the order of the labels.
    """

    train: Any
    test: Any
    classes: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return len(self.classes)


def image_files(folder: Path) -> list[Path]:
    """Return the images at any depth, in order; what is hidden is left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def load(name: str, *, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Open a data set by name or path (see :class:`Config`), not decoded yet.

    TensorFlow data sets lie in `data_dir`, and may be downloaded if so asked.
    `DatasetError` if it is missing or malformed.
    """
    path = Path(name).expanduser()
    if printable(name) != name:
        raise DatasetError(
            f"the name of a data set must be UTF-8, got '{printable(name)}': rename "
            "it, or link to it. The files in it may have any name."
        )
    if name == "digits":
        return _digits()
    if path.suffix == ".npz":
        return _npz(path)
    if mosaics.found(path):
        return _mosaics(path)
    if (path / "train").is_dir() or name.startswith((".", "/", "~")):
        return _folder(path)
    return _tfds(name, data_dir, download)


def take(data: Any, indices: np.ndarray) -> Any:
    """Return some of the images, of arrays or of files."""
    if isinstance(data, Arrays):
        return Arrays(data.images[indices], data.labels[indices])
    return data.take(indices)


def printable(name: str) -> str:
    """Return the name of a file, with what is not UTF-8 in it as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def decode(data: Any) -> Arrays:
    """Return arrays, of files by decoding all of them, which must have one size.

    They are grey if all files are; one of colours makes all of them RGB.
    """
    if isinstance(data, Arrays):
        return data
    files: Files = data
    images: list[np.ndarray] = []
    labels = []
    for index in range(len(files)):
        try:
            data, label = files.read(index)
            picture: Image.Image = Image.open(io.BytesIO(data))
            image = np.asarray(picture if picture.mode == "L" else to_rgb(picture))
        except UNREADABLE as error:
            raise DatasetError(
                f"{files.name(index)} cannot be decoded: {error}"
            ) from None
        image = image[..., None] if image.ndim == 2 else image
        if images and image.shape[:2] != images[0].shape[:2]:
            raise DatasetError(
                f"{files.name(index)} has the shape {image.shape}, others "
                f"{images[0].shape}: use augmentation 'resized_crop'."
            )
        images.append(image)
        labels.append(label)
    if any(image.shape[2] == 3 for image in images):
        images = [np.broadcast_to(x, (*x.shape[:2], 3)) for x in images]
    return Arrays(np.stack(images), np.array(labels, np.int32))


def check_shapes(where: str, train: np.ndarray, test: np.ndarray) -> None:
    """Raise `DatasetError` if training and test images differ in shape."""
    if train.shape[1:] != test.shape[1:]:
        raise DatasetError(
            f"{where}: training and test images differ in shape, {train.shape[1:]} "
            f"and {test.shape[1:]}."
        )


def downsampled(data: Arrays, factor: int) -> Arrays:
    """Average squares of `factor` pixels a side; `DatasetError` if it cannot be."""
    if factor == 1:
        return data
    size, height, width, channels = data.images.shape
    if height % factor or width % factor:
        raise DatasetError(
            f"downsample must divide the images' {height}x{width} pixels, got {factor}."
        )
    squares = (size, height // factor, factor, width // factor, factor, channels)
    means = data.images.reshape(squares).mean((2, 4), dtype=np.float32)
    return Arrays(np.rint(means).astype(np.uint8), data.labels)


def checksum(dataset: Dataset) -> int:
    """Return a number that tells different data apart; encoded images are read once."""
    crc = 0
    for data in (dataset.train, dataset.test):
        if isinstance(data, Arrays):
            for array in data:
                crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        else:
            crc = _checksum_of_files(data, crc)
    return crc


def _checksum_of_files(files: Files, crc: int) -> int:
    """Return a CRC-32 of labels and contents in their order, whatever the names."""

    def of_some(indices: range) -> int:
        crc = 0
        for index in indices:
            try:
                data, label = files.read(index)
            except OSError:
                data, label = b"", -1
            crc = zlib.crc32(data, zlib.crc32(b"%d %d" % (label, len(data)), crc))
        return crc

    size = len(files)
    parts = [range(k, min(k + 100, size)) for k in range(0, size, 100)]
    with ThreadPoolExecutor(READERS) as pool:
        return zlib.crc32(repr([*pool.map(of_some, parts)]).encode(), crc)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (15 * digits.images[order][..., None]).astype(np.uint8)  # from 0 to 16
    labels = digits.target[order].astype(np.int32)
    return Dataset(
        Arrays(images[:1000], labels[:1000]),
        Arrays(images[1000:], labels[1000:]),
        [*map(str, range(10))],
    )


def _npz(path: Path) -> Dataset:
    if not path.is_file():
        raise DatasetError(f"no file {path}.")
    wanted = {f"{kind}_{split}" for kind in "xy" for split in ("train", "test")}
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {x: _member(archive, f"{x}.npy") for x in wanted & names}
    except Exception as error:  # whatever damaged files make zipfile and NumPy raise
        raise DatasetError(
            f"{path} is no readable .npz file: {str(error) or type(error).__name__}"
        ) from None
    if missing := sorted(wanted - names):
        raise DatasetError(
            f"{path} must hold x_train, y_train, x_test and y_test; {missing} not "
            f"found among {sorted(names)}."
        )
    train, test = ((arrays[f"x_{x}"], arrays[f"y_{x}"]) for x in ("train", "test"))
    return _checked(path, train, test)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array to its end, where its checksum stands."""
    with archive.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} is longer than the array that it describes")
    return array


def _checked(
    path: Path, train: Any, test: Any, classes: Sequence[str] | None = None
) -> Dataset:
    """Return pairs of images and labels as a data set, if they can be one."""
    splits = []
    for split, (x, y) in (("train", train), ("test", test)):
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
            raise DatasetError(
                f"{path}: x_{split} must be uint8 [N, H, W, C] or [N, H, W], got "
                f"{x.dtype} {list(x.shape)}."
            )
        shapes = ((len(x),), (len(x), 1))
        if not np.issubdtype(y.dtype, np.integer) or y.shape not in shapes:
            raise DatasetError(
                f"{path}: y_{split} must be integers [{len(x)}], one for each image, "
                f"got {y.dtype} {list(y.shape)}."
            )
        splits.append(Arrays(x[..., None] if x.ndim == 3 else x, y.ravel()))
    if splits[0].images.shape[1:] != splits[1].images.shape[1:]:
        check_shapes(str(path), train[0], test[0])  # as they are in the file
    numbers = np.unique(splits[0].labels)
    if classes is None and (numbers[0] != 0 or numbers[-1] != len(numbers) - 1):
        raise DatasetError(
            f"{path}: y_train must number the classes from 0 without gaps, got "
            f"{len(numbers)} classes from {numbers[0]} to {numbers[-1]}."
        )
    classes = [*map(str, range(len(numbers)))] if classes is None else classes
    for split, (_, y) in zip(("train", "test"), splits, strict=True):
        if y.min() < 0 or y.max() >= len(classes):
            raise DatasetError(
                f"{path}: y_{split} must be from 0 to {len(classes) - 1}, the last "
                f"class, got {y.min()} to {y.max()}."
            )
    one, two = (Arrays(x, y.astype(np.int32)) for x, y in splits)
    return Dataset(one, two, classes)


def _mosaics(root: Path) -> Dataset:
    try:
        splits, classes = mosaics.read(root)
    except Exception as error:  # whatever damaged files make Pillow and NumPy raise
        reason = repr(error) if isinstance(error, KeyError) else str(error)
        raise DatasetError(
            f"{root} cannot be read: {reason or type(error).__name__}"
        ) from None
    return _checked(root, splits["train"], splits["test"], classes)


def _folder(root: Path) -> Dataset:
    tests = [split for split in TEST_SPLITS if (root / split).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DatasetError(
            f"no folder {root / 'train' if tests else root}, or none to test on: "
            f"expected train/CLASS/IMAGE and {tests[0] if tests else 'val'}/CLASS/"
            f"IMAGE, with the suffixes {sorted(IMAGE_SUFFIXES)}."
        )
    classes: dict[str, int] = {}
    files: list[Files] = []
    for folder in (root / "train", root / tests[0]):
        images = [x.relative_to(folder) for x in image_files(folder)]
        names = sorted({x.parts[0] for x in images if len(x.parts) > 1})
        folders = {x.name for x in folder.iterdir() if x.is_dir() and x.name[0] != "."}
        if not classes and (missing := sorted(folders - {*names})):
            raise DatasetError(f"no images in the folders {missing} of {folder}.")
        classes = classes or {name: label for label, name in enumerate(names)}
        if unknown := sorted({*names} - {*classes}):
            raise DatasetError(f"{folder} has classes that train has not: {unknown}.")
        if not names:
            raise DatasetError(f"no images {folder}/CLASS/IMAGE.")
        pairs = [(str(x), classes[x.parts[0]]) for x in images if len(x.parts) > 1]
        files.append(Files(pairs, str(folder)))
    return Dataset(files[0], files[1], [*map(printable, classes)])


def _tfds(name: str, data_dir: Path | None, download: bool) -> Dataset:
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if download:
            builder.download_and_prepare()
    except Exception as error:  # for wrong names, damaged folders, no connection
        reason = (str(error).splitlines() or [""])[0]
        raise DatasetError(
            f"data set {name!r} cannot be opened: it is not 'digits', no .npz file or "
            "folder that exists, and TensorFlow Datasets (of the extra 'training') "
            f"says: {type(error).__name__}: {reason}"
        ) from None
    folder = builder.data_path
    if not (folder / "dataset_info.json").exists():
        raise DatasetError(
            f"data set {name!r} is not at {folder}. Point --data-dir to a folder where "
            "it is prepared, or let --download fetch it, or give an .npz file or a "
            "folder of images as --dataset."
        )
    features, splits = builder.info.features, builder.info.splits
    tests = [split for split in TEST_SPLITS if split in splits]
    if not {"image", "label"} <= {*features} or "train" not in splits or not tests:
        raise DatasetError(
            f"data set {name!r} must have the features image and label, and the splits "
            f"train and one of {', '.join(TEST_SPLITS)}, got {sorted(features)} and "
            f"{sorted(splits)}."
        )
    raw = {"image": tfds.decode.SkipDecoding()}
    try:
        train, test = (
            Files(builder.as_data_source(split=split, decoders=raw), split)
            for split in ("train", tests[0])
        )
    except NotImplementedError:
        raise DatasetError(
            f"data set {name!r} at {folder} is prepared as "
            f"{builder.info.file_format.value}, which cannot be read without "
            "TensorFlow: prepare it with `tfds build --file_format=array_record`."
        ) from None
    return Dataset(train, test, [*features["label"].names])
