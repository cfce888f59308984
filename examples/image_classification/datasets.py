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
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from . import mosaics
from .photographs import UNREADABLE, to_rgb

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TEST_SPLITS = ("test", "val", "validation")
READERS = 8
"""Threads that read files for their checksum."""


class DatasetError(Exception):
    """A data set is missing or malformed; the message says what to do."""


class Arrays(NamedTuple):
    """Decoded images.

    Attributes:
      images: uint8 `[N, H, W, C]`.
      labels: int32 `[N]`.
    """

    images: np.ndarray
    labels: np.ndarray


class Files(Protocol):
    """Encoded images by number; can be sent to worker processes."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label; `OSError` if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Return what to call an image in a message."""
        ...


class Dataset(NamedTuple):
    """Training and test images, both held in the same way.

    Attributes:
      train: what to train on.
      test: what to test on.
      classes: their names, in the order of the labels.
    """

    train: Any
    test: Any
    classes: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return len(self.classes)


class FolderFiles:
    """Images as files, labelled by the name of their folder."""

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self._root, self._paths, self._labels = root, [], []
        for label, name in enumerate(classes):
            for path in image_files(root / name):
                self._paths.append(path.relative_to(root).as_posix())
                self._labels.append(label)
        if not self._paths:
            raise DatasetError(
                f"no images in {root}: expected {root}/CLASS/IMAGE with the suffixes "
                f"{sorted(IMAGE_SUFFIXES)}."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""
        return (self._root / self._paths[index]).read_bytes(), self._labels[index]

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self._root / self._paths[index])

    def missing(self, classes: Sequence[str]) -> list[str]:
        """Return the classes that have no images."""
        present = set(self._labels)
        return [name for label, name in enumerate(classes) if label not in present]


class TfdsFiles:
    """Images of a split of a TensorFlow data set, not decoded."""

    def __init__(self, source: Sequence[dict[str, Any]], split: str) -> None:
        self._source, self._split = source, split

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""
        try:
            record = self._source[index]
        except Exception as error:  # whatever damaged files make ArrayRecord raise
            raise OSError(str(error).splitlines()[0]) from error
        return record["image"], int(record["label"])

    def name(self, index: int) -> str:
        """Return split and number."""
        return f"{self._split}[{index}]"


class Subset:
    """Some of the images, by number."""

    def __init__(self, files: Files, indices: np.ndarray) -> None:
        self._files, self._indices = files, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""
        return self._files.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return the name in the whole."""
        return self._files.name(int(self._indices[index]))


def image_files(folder: Path) -> list[Path]:
    """Return the images at any depth, in order; what is hidden is left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def load(name: str, *, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Open a data set; encoded images are not decoded yet.

    Args:
      name: "digits", a name of TensorFlow Datasets, an `.npz` file, a folder of images
        by class, or one of mosaics.
      data_dir: where TensorFlow data sets lie; their default if None.
      download: whether a TensorFlow data set that is not there may be downloaded.

    Raises:
      DatasetError: it is missing or malformed.
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
    return Subset(data, indices)


def printable(name: str) -> str:
    """Return the name of a file, with what is not UTF-8 in it as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def decode(data: Any) -> Arrays:
    """Return arrays, of files by decoding all of them, which must have one size.

    They are grey if all files are; one of colours makes all of them RGB.

    Raises:
      DatasetError: they differ in size, or one cannot be decoded.
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


def differing(where: str, train: np.ndarray, test: np.ndarray) -> DatasetError:
    """Return the error of training and test images that differ in shape."""
    return DatasetError(
        f"{where}: training and test images differ in shape, {train.shape[1:]} and "
        f"{test.shape[1:]}."
    )


def downsampled(data: Arrays, factor: int) -> Arrays:
    """Average squares of `factor` pixels a side.

    Raises:
      DatasetError: the factor does not divide height and width.
    """
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
        _numbers(10),
    )


def _numbers(count: int) -> list[str]:
    """Return names for classes that have none."""
    return [str(label) for label in range(count)]


def _npz(path: Path) -> Dataset:
    if not path.is_file():
        raise DatasetError(f"no file {path}.")
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {x: _member(archive, f"{x}.npy") for x in wanted if x in found}
    except Exception as error:  # whatever damaged files make zipfile and NumPy raise
        raise DatasetError(
            f"{path} is no readable .npz file: {str(error) or type(error).__name__}"
        ) from None
    if missing := sorted({*wanted} - found):
        raise DatasetError(
            f"{path} must hold x_train, y_train, x_test and y_test; {missing} not "
            f"found among {sorted(found)}."
        )
    train, test = (
        _checked(path, arrays[f"x_{split}"], arrays[f"y_{split}"], split)
        for split in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise differing(str(path), arrays["x_train"], arrays["x_test"])
    classes = np.unique(train.labels)
    num_classes = len(classes)
    if classes[-1] != num_classes - 1:
        raise DatasetError(
            f"{path}: y_train must number the classes from 0 without gaps, got "
            f"{num_classes} classes up to {classes[-1]}."
        )
    if test.labels.max() >= num_classes:
        raise DatasetError(
            f"{path}: y_test has the class {test.labels.max()}, which y_train has not."
        )
    return Dataset(train, test, _numbers(num_classes))


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array to its end, where its checksum stands."""
    with archive.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} is longer than the array that it describes")
    return array


def _checked(path: Path, x: np.ndarray, y: np.ndarray, split: str) -> Arrays:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
        raise DatasetError(
            f"{path}: x_{split} must be uint8 [N, H, W, C] or [N, H, W], got "
            f"{x.dtype} {list(x.shape)}."
        )
    x = x[..., None] if x.ndim == 3 else x
    if not np.issubdtype(y.dtype, np.integer) or y.shape not in (
        (len(x),),
        (len(x), 1),
    ):
        raise DatasetError(
            f"{path}: y_{split} must be integers [{len(x)}], one for each image, got "
            f"{y.dtype} {list(y.shape)}."
        )
    y = y.ravel()
    if y.min() < 0 or y.max() >= 2**31:
        raise DatasetError(
            f"{path}: y_{split} must be from 0 to 2^31 - 1, got {y.min()} to {y.max()}."
        )
    return Arrays(x, y.astype(np.int32))


def _mosaics(root: Path) -> Dataset:
    try:
        splits, classes = mosaics.read(root)
    except mosaics.MosaicError as error:
        raise DatasetError(str(error)) from None
    train, test = (_checked(root, *splits[x], x) for x in ("train", "test"))
    highest = max(train.labels.max(), test.labels.max())
    if highest >= len(classes):
        raise DatasetError(
            f"{root} must have labels below {len(classes)}, the number of classes, got "
            f"{highest}."
        )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise differing(str(root), train.images, test.images)
    return Dataset(train, test, classes)


def _folder(root: Path) -> Dataset:
    if not (root / "train").is_dir():
        raise DatasetError(f"no folder {root / 'train'}: expected train/CLASS/IMAGE.")
    tests = [root / split for split in TEST_SPLITS if (root / split).is_dir()]
    if not tests:
        raise DatasetError(f"no folder {', '.join(TEST_SPLITS)} in {root}.")
    classes, others = (
        sorted(
            path.name
            for path in folder.iterdir()
            if path.is_dir() and not path.name.startswith(".")
        )
        for folder in (root / "train", tests[0])
    )
    if unknown := sorted(set(others) - set(classes)):
        raise DatasetError(f"{tests[0]} has classes that train has not: {unknown}.")
    train, test = FolderFiles(root / "train", classes), FolderFiles(tests[0], classes)
    if missing := train.missing(classes):
        raise DatasetError(f"no images in the folders {missing} of {root / 'train'}.")
    return Dataset(train, test, [*map(printable, classes)])


def _tfds(name: str, data_dir: Path | None, download: bool) -> Dataset:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"data set {name!r} is none of 'digits', an .npz file and a folder that "
            f"exists, and TensorFlow Datasets cannot be imported ({error}): install "
            "the extra 'training'."
        ) from None
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(
            f"no data set {name!r}: not 'digits', not an .npz file or a folder that "
            f"exists, and TensorFlow Datasets says: {reason}"
        ) from None
    except Exception as error:  # whatever a damaged description makes it raise
        reason = str(error).splitlines()[0]
        raise DatasetError(f"data set {name!r} cannot be opened: {reason}") from None
    if download:
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise DatasetError(
                f"data set {name!r} cannot be downloaded: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    folder = builder.data_path
    if not (folder / "dataset_info.json").exists():
        raise DatasetError(
            f"data set {name!r} is not at {folder}. Point --data-dir to a folder where "
            f"it is prepared, or let --download fetch it, or give an .npz file or a "
            "folder of images as --dataset."
        )
    features, splits = builder.info.features, builder.info.splits
    if "image" not in features or "label" not in features:
        raise DatasetError(
            f"data set {name!r} must have the features image and label, got "
            f"{sorted(features)}."
        )
    tests = [split for split in TEST_SPLITS if split in splits]
    if "train" not in splits or not tests:
        raise DatasetError(
            f"data set {name!r} must have the splits train and one of "
            f"{', '.join(TEST_SPLITS)}, got {sorted(splits)}."
        )
    raw = {"image": tfds.decode.SkipDecoding()}
    try:
        train, test = (
            TfdsFiles(builder.as_data_source(split=split, decoders=raw), split)
            for split in ("train", tests[0])
        )
    except NotImplementedError:
        raise DatasetError(
            f"data set {name!r} at {folder} is prepared as "
            f"{builder.info.file_format.value}, which cannot be read without "
            "TensorFlow: prepare it with `tfds build --file_format=array_record`."
        ) from None
    return Dataset(train, test, [*features["label"].names])
