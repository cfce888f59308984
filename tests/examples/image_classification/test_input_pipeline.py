"""Batches: order, noise, standardization, resuming, unreadable files."""

import dataclasses
import multiprocessing
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from examples.image_classification import (
    array_pipeline,
    datasets,
    file_pipeline,
    input_pipeline,
)
from examples.image_classification import devices as devices_of
from examples.image_classification.config import Config
from examples.image_classification.datasets import DatasetError
from examples.image_classification.pipeline import Batch

IN_A_HURRY = True
"""What is compiled here runs for some steps only."""

ROOT = Path(__file__).parents[3]
DIGITS = Config(dataset="digits", augmentation="none", epochs=3)


def batches(pipeline, epoch, first=0):
    """The batches of an epoch, as numpy arrays."""
    for k, item in enumerate(pipeline.epoch(epoch, first), first):
        batch = pipeline.batch(item, np.int32(epoch * pipeline.steps + k))
        yield jax.tree.map(np.asarray, batch)


def joined(pipeline, epoch, first=0):
    each = [*batches(pipeline, epoch, first)]
    return Batch(*map(np.concatenate, zip(*each, strict=True)))


def rows(images):
    return [image.tobytes() for image in images]


def test_an_epoch_shows_each_image_once_in_a_new_order():
    pipeline = input_pipeline.create(dataclasses.replace(DIGITS, batch_size=100))
    assert pipeline.steps == 10
    one, two = joined(pipeline, 0), joined(pipeline, 1)
    assert one.images.shape == (1000, 8, 8, 1)
    assert sorted(rows(one.images)) == sorted(rows(two.images))
    assert rows(one.images) != rows(two.images)
    assert len(set(rows(one.images))) == 1000
    np.testing.assert_allclose(one.images.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(one.images.std(), 1.0, rtol=1e-5)


def test_the_last_partial_batch_is_left_out():
    pipeline = input_pipeline.create(dataclasses.replace(DIGITS, batch_size=300))
    assert pipeline.steps == 3
    images = joined(pipeline, 0).images
    assert len(set(rows(images))) == 900


def test_the_seed_decides_the_order():
    one, again, other = (
        joined(input_pipeline.create(dataclasses.replace(DIGITS, seed=seed)), 1)
        for seed in (0, 0, 1)
    )
    assert rows(one.images) == rows(again.images)
    assert rows(one.images) != rows(other.images)


def test_an_epoch_can_begin_anywhere():
    config = dataclasses.replace(DIGITS, augmentation="crop_flip")
    whole = [*batches(input_pipeline.create(config), 2)]
    rest = [*batches(input_pipeline.create(config), 2, first=3)]
    assert len(rest) == len(whole) - 3
    jax.tree.map(np.testing.assert_array_equal, rest, whole[3:])


def test_augmentation_changes_from_step_to_step():
    config = dataclasses.replace(DIGITS, augmentation="crop_flip", batch_size=1000)
    plain = joined(
        input_pipeline.create(dataclasses.replace(config, augmentation="none")), 0
    )
    pipeline = input_pipeline.create(config)
    one, two = joined(pipeline, 0), joined(pipeline, 1)
    assert not set(rows(one.images)) <= set(rows(plain.images))
    assert not set(rows(two.images)) <= set(rows(one.images))
    np.testing.assert_array_equal(one.labels, plain.labels)  # the same order
    item = next(pipeline.epoch(0))
    again, later = (pipeline.batch(item, np.int32(k)).images for k in (0, 1))
    assert np.any(np.asarray(again) != later)  # steps of two epochs: one has one step


def test_label_noise_keeps_the_clean_labels():
    noisy = dataclasses.replace(DIGITS, label_noise=0.5, batch_size=1000)
    pipeline = input_pipeline.create(noisy)
    one, two = joined(pipeline, 0), joined(pipeline, 1)
    clean = joined(
        input_pipeline.create(dataclasses.replace(noisy, label_noise=0.0)), 0
    )
    np.testing.assert_array_equal(one.clean_labels, clean.labels)
    # 500 redrawn, 450 of them differ on average, deviation 6.7.
    assert abs(np.sum(one.labels != one.clean_labels) - 450) < 34
    by_image = dict(zip(rows(one.images), one.labels, strict=True))
    assert [by_image[image] for image in rows(two.images)] == [*two.labels]
    other = joined(input_pipeline.create(dataclasses.replace(noisy, seed=1)), 0)
    by_other = dict(zip(rows(other.images), other.labels, strict=True))
    assert any(by_image[image] != label for image, label in by_other.items())
    (item,) = pipeline.test_items()
    test = pipeline.test_batches(item)
    labels = load_digits().target[np.random.default_rng(0).permutation(1797)[1000:]]
    np.testing.assert_array_equal(np.asarray(test.labels)[test.real], labels)


def test_all_test_images_come_once_and_the_rest_is_not_real():
    pipeline = input_pipeline.create(dataclasses.replace(DIGITS, test_size=797))
    (item,) = pipeline.test_items()
    test = jax.tree.map(np.asarray, pipeline.test_batches(item))
    assert pipeline.num_test == 797
    assert test.real.sum() == 797
    assert len(set(rows(test.images[test.real]))) == 797


def test_subsets_are_the_same_for_every_seed_and_do_not_overlap():
    sizes = {"train_size": 300, "test_size": 50, "batch_size": 300}
    small = [
        input_pipeline.create(dataclasses.replace(DIGITS, seed=seed, **sizes))
        for seed in (0, 1)
    ]
    one, two = (joined(pipeline, 0) for pipeline in small)
    scale = [pipeline.facts.std for pipeline in small]
    np.testing.assert_array_equal(*scale)
    assert sorted(rows(one.images)) == sorted(rows(two.images))
    assert small[0].num_test == 50

    config = dataclasses.replace(DIGITS, validation_size=200, batch_size=800)
    pipeline = input_pipeline.create(config)
    train = set(rows(joined(pipeline, 0).images))
    (item,) = pipeline.test_items()
    test = pipeline.test_batches(item)
    images = np.asarray(pipeline.standardized(test.images))
    held_out = set(rows(images[np.asarray(test.real)]))
    assert (len(train), len(held_out)) == (800, 200)
    assert not train & held_out


def test_statistics_are_exact_and_those_of_each_channel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 4, 5, 3), np.uint8) // np.array([1, 3, 7])
    images[..., 1] = 9
    mean, std = array_pipeline.mean_and_std(images.astype(np.uint8))
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    expected = images.std((0, 1, 2)) / 255
    np.testing.assert_allclose(std, [expected[0], 1.0, expected[2]], rtol=1e-12)


def test_other_data_have_another_checksum(photographs, tmp_path):
    one, again = (input_pipeline.create(DIGITS).checksum for _ in range(2))
    other = input_pipeline.create(dataclasses.replace(DIGITS, test_size=700)).checksum
    assert one == again != other
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy, copy_function=shutil.copyfile)  # at other times
    expected = files(photographs).checksum
    assert files(copy).checksum == expected
    of_some = {"train_size": 7, "validation_size": 6}
    assert files(photographs, **of_some).checksum == files(copy, **of_some).checksum
    assert files(photographs, **of_some).checksum != expected


def exchange(folder):
    """Two photographs of a class."""
    one, two = (folder / f"{k}.jpeg" for k in (4, 5))
    one_before = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(one_before)


def flip_a_bit(folder):
    data = bytearray((folder / "4.jpeg").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "4.jpeg").write_bytes(data)


def move_to_the_other_class(folder):
    (folder / "9.jpeg").rename(folder.parent / "light" / "0-.jpeg")


@pytest.mark.parametrize(
    "change",
    [
        exchange,
        flip_a_bit,
        move_to_the_other_class,
        lambda folder: (folder / "4.jpeg").unlink(),
        lambda folder: (folder / "4.jpeg").write_bytes(b""),
    ],
)
def test_photographs_that_were_replaced_are_noticed(photographs, tmp_path, change):
    """Whatever their names and times; by hosts, and by runs that go on."""
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    names = sorted(copy.rglob("*"))
    times = {path: path.stat().st_mtime_ns for path in names}
    change(copy / "train" / "dark")
    for path, time in times.items():
        if path.exists():
            os.utime(path, ns=(time, time))
    assert files(copy).checksum != files(photographs).checksum


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_size": 1001}, "train_size must be at most 1000, got 1001"),
        ({"test_size": 798}, "test_size must be at most 797, got 798"),
        ({"validation_size": 1000}, "validation_size must be at most 999, got 1000"),
        ({"train_size": 100}, "100 training images are fewer than batch_size=128"),
        ({"augmentation": "resized_crop"}, "digits has images of one size"),
    ],
)
def test_impossible_sizes_are_named(fields, message):
    with pytest.raises(DatasetError, match=message):
        input_pipeline.create(dataclasses.replace(DIGITS, **fields))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twenty images of two classes to train on, seven to test on; some are broken."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count - label * (split == "val")):
                low, high = (0, 100) if name == "dark" else (156, 256)
                pixels = rng.integers(low, high, (30 + k, 40, 3), np.uint8)
                image = Image.fromarray(pixels).convert("L" if k == 1 else "RGB")
                image.save(folder / f"{k}.jpeg")
    (root / "train" / "dark" / "3.jpeg").write_bytes(b"broken")
    cut = root / "val" / "light" / "2.jpeg"
    cut.write_bytes(cut.read_bytes()[:300])
    return root


def files(photographs, workers=0, devices=None, batch_size=5, **fields):
    config = Config(
        dataset=str(photographs),
        augmentation="resized_crop",
        image_size=16,
        epochs=3,
        batch_size=batch_size,
        **fields,
    )
    return input_pipeline.create(config, workers=workers, devices=devices)


def test_photographs_are_decoded_and_unreadable_ones_replaced(photographs, capsys):
    pipeline = files(photographs)
    assert (pipeline.steps, pipeline.num_test, pipeline.num_classes) == (4, 7, 2)
    assert pipeline.image_shape == (16, 16, 3)
    for epoch in range(2):
        pipeline.skipped = 0
        batch = joined(pipeline, epoch)
        assert batch.images.shape == (20, 16, 16, 3)
        assert pipeline.skipped == 1
        # Labels belong to their images, the replacement's too: bright ones are 1.
        np.testing.assert_array_equal(batch.labels, batch.images.mean((1, 2, 3)) > 0)
        assert len(set(rows(batch.images))) == 20, "another crop of the next image"
    assert capsys.readouterr().err.count("train/dark/3.jpeg") == 1


def test_hosts_share_the_rows_of_a_batch_out(photographs, monkeypatch):
    """Three of them: their rows together are those of one, unreadable images too."""
    config = Config(dataset=str(photographs), image_size=16, batch_size=6, epochs=2)
    data = datasets.load(str(photographs))
    noisy = np.full(len(data.train), -1)

    def sources(host, hosts):
        monkeypatch.setattr(jax, "process_index", lambda: host)
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        steps = len(data.train) // 6
        return (
            file_pipeline.TrainBatches(data.train, noisy, config, steps),
            file_pipeline.EvaluationBatches(data.test, 6, 16, 2),
        )

    for whole, *parts in zip(
        sources(0, 1), *(sources(k, 3) for k in range(3)), strict=True
    ):
        for number in range(len(whole)):
            expected = whole[number]
            rows = [part[number] for part in parts]
            for name, value in expected.items():
                np.testing.assert_array_equal(
                    np.concatenate([row[name] for row in rows]), value
                )


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_photographs_on_four_devices(photographs, parallel):
    """The batches of an epoch, and the test images."""

    def arrays(*way):
        devices = devices_of.choose(*way)
        pipeline = files(photographs, 0, devices, batch_size=4, label_noise=0.5)
        train, test = [*pipeline.epoch(0)], [*pipeline.test_items()]
        for x in jax.tree.leaves((train, test)):
            assert len(x.addressable_shards) == devices.count
        train = jax.tree.map(np.ravel, train)
        tests = [pipeline.test_batches(item) for item in test]
        return train, [np.asarray(x.images)[x.real] for x in tests]

    jax.tree.map(np.testing.assert_array_equal, arrays(parallel, 4), arrays("jit", 1))


def test_unreadable_test_images_do_not_count(photographs, capsys):
    pipeline = files(photographs)
    for _ in range(2):
        tests = [pipeline.test_batches(item) for item in pipeline.test_items()]
        real = np.concatenate([np.asarray(test.real).ravel() for test in tests])
        assert (len(real), real.sum()) == (10, 6)
    assert pipeline.skipped == 2
    assert "val/light/2.jpeg" in capsys.readouterr().err


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(photographs):
    alone, helped = (
        files(photographs, label_noise=0.5),
        files(photographs, workers=2, label_noise=0.5),
    )
    for epoch in range(3):
        jax.tree.map(
            np.testing.assert_array_equal, joined(alone, epoch), joined(helped, epoch)
        )
        for one, two in zip(alone.test_items(), helped.test_items(), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, two)
    resumed = files(photographs, workers=1, label_noise=0.5)
    jax.tree.map(
        np.testing.assert_array_equal,
        joined(alone, 1, first=2),
        joined(resumed, 1, first=2),
    )
    helped.close()
    resumed.close()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_not_a_hang(photographs):
    pipeline = files(photographs, workers=2)
    items = pipeline.epoch(0)
    next(items)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(DatasetError, match=r"a worker process .* was killed, perhaps"):
        [*items, *pipeline.epoch(1), *pipeline.epoch(2)]
    pipeline.close()


def test_photographs_are_cut_anew_in_every_epoch_and_the_sample_stays(photographs):
    pipeline = files(photographs)
    one, two = joined(pipeline, 0), joined(pipeline, 1)
    assert not set(rows(one.images)) & set(rows(two.images))
    skipped = pipeline.skipped
    samples = [pipeline.sample(2), pipeline.sample(2)]
    jax.tree.map(np.testing.assert_array_equal, *samples)
    assert pipeline.skipped == skipped


def test_images_may_be_downsampled():
    whole = input_pipeline.create(DIGITS)
    halved = input_pipeline.create(dataclasses.replace(DIGITS, downsample=2))
    assert halved.image_shape == (4, 4, 1)
    assert halved.checksum != whole.checksum
    (images, *_), (expected, *_) = (next(x.epoch(0)) for x in (halved, whole))
    squares = np.asarray(expected, np.float64).reshape(-1, 4, 2, 4, 2, 1)
    # Rounded to whole levels.
    np.testing.assert_allclose(images, squares.mean((2, 4)), atol=0.5)
    with pytest.raises(DatasetError, match="downsample must divide the images' 8x8"):
        input_pipeline.create(dataclasses.replace(DIGITS, downsample=3))


def test_a_batch_without_a_readable_image_is_an_error(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "copy")
    for path in (tmp_path / "copy" / "train").rglob("*.jpeg"):
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="none of the 5 images of a batch can be re"):
        files(tmp_path / "copy").sample(1)
