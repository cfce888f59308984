"""Configs: the paper's tables, types and ranges, files and the command line."""

import dataclasses
import inspect
import sys

import pytest

from examples.image_classification import __main__ as command
from examples.image_classification import config as configs
from examples.image_classification.config import Config
from examples.image_classification.run import Options

METHODS = ("hero", "grad_l1", "sgd")
TABLE_1 = {
    ("cifar10", "resnet20"): (93.44, 92.82, 92.82),
    ("cifar10", "mobilenet_v2"): (95.03, 92.52, 92.45),
    ("cifar10", "vgg19_bn"): (94.79, 93.41, 93.89),
    ("cifar100", "resnet20"): (70.72, 69.30, 69.52),
    ("cifar100", "mobilenet_v2"): (76.90, 74.13, 73.12),
    ("cifar100", "vgg19_bn"): (76.09, 74.05, 74.61),
    ("imagenet2012", "resnet18"): (71.05, 70.82, 70.74),
}
NOISE = (0.2, 0.4, 0.6, 0.8)
TABLE_2 = {
    ("resnet20", "hero"): (90.63, 88.71, 84.61, 72.11),
    ("resnet20", "grad_l1"): (85.91, 78.66, 65.86, 48.28),
    ("resnet20", "sgd"): (85.64, 78.73, 66.42, 42.17),
    ("mobilenet_v2", "hero"): (91.70, 88.57, 81.73, 72.03),
    ("mobilenet_v2", "grad_l1"): (89.00, 85.56, 79.73, 30.34),
    ("mobilenet_v2", "sgd"): (89.28, 85.84, 80.49, 62.91),
}
TABLE_3 = {
    "hero": "93.45 / 94.90 / 95.03 / 95.03",
    "first_order": "91.61 / 93.92 / 94.00 / 94.06",
    "sgd": "85.88 / 91.81 / 92.33 / 92.45",
}


def rows():
    """What the paper reports: (dataset, model, method, noise) and the text of it."""
    for (data, model), values in TABLE_1.items():
        for method, value in zip(METHODS, values, strict=True):
            yield (data, model, method, 0.0), f"Table 1 of the paper: {value:.2f} %"
    for (model, method), values in TABLE_2.items():
        for noise, value in zip(NOISE, values, strict=True):
            text = f"Table 2 of the paper: {value:.2f} %"
            yield ("cifar10", model, method, noise), text
    for method, values in TABLE_3.items():
        yield ("cifar10", "mobilenet_v2", method, 0.0), values


def paths():
    return sorted(configs.CONFIGS.glob("*_*.toml"))


def key(config):
    return config.dataset, config.model, config.method, config.label_noise


def test_there_is_one_file_for_each_number_of_the_tables():
    files = {key(configs.load(path)): path for path in paths()}
    assert len(files) == len(paths()) == 51
    compared = {("cifar10", "resnet20", "first_order", x) for x in (0.0, *NOISE)}
    assert set(files) == {row for row, _ in rows()} | compared
    for row, text in rows():
        assert text in files[row].read_text()


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_files_hold_the_recipe_of_the_paper(path):
    config = configs.load(path)
    imagenet = config.dataset == "imagenet2012"
    assert config.epochs == (100 if imagenet else 200)
    assert config.batch_size == (256 if imagenet else 128)
    assert (config.learning_rate, config.momentum) == (0.1, 0.9)
    assert config.weight_decay == 1e-4
    assert config.augmentation == ("resized_crop" if imagenet else "crop_flip")
    assert config.image_size == 224
    assert config.bits == (8, 6, 5, 4, 3)
    if config.method in ("hero", "first_order"):
        assert config.h == (0.5 if config.dataset == "cifar10" else 1.0)
    name = f"{config.dataset}_{config.model}_{config.method}"
    noise = f"_noise{100 * config.label_noise:.0f}" if config.label_noise else ""
    assert path.stem == name + noise
    assert f"image_classification {path.stem} " in path.read_text()


def test_what_is_written_reads_back_equal(tmp_path):
    for config in (
        Config(),
        Config(
            dataset='/data/"ü"\\\t.npz',
            train_size=7,
            clip_norm=1.5,
            bits=(16, 2),
            epoch_on_device=True,
            learning_rate=1e-30,
        ),
    ):
        path = tmp_path / "config.toml"
        path.write_text(configs.dumps(config))
        assert configs.load(path) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "resnet50", "model must be one of .*'resnet20'.*, got 'resnet50'"),
        ("method", "adam", "method must be one of .*, got 'adam'"),
        ("label_noise", 1.5, "label_noise must be 0 to 1, got 1.5"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("epochs", 2.5, "epochs must be an integer, got 2.5"),
        ("epochs", True, "epochs must be an integer, got True"),
        ("h", -1.0, "h must be at least 0, got -1.0"),
        ("h", float("nan"), "h must be a finite number, got nan"),
        ("h", "1", "h must be a finite number, got '1'"),
        ("clip_norm", 0.0, "clip_norm must be positive, got 0.0"),
        ("accumulation", 3, "accumulation must divide batch_size=128, got 3"),
        ("hvp", "fd", "hvp must be one of"),
        ("hvp_examples", 5, "hvp_examples must divide the 128 images that share a p"),
        ("penalty_every", 0, "penalty_every must be at least 1, got 0"),
        (
            "penalty_layers",
            "(",
            r"penalty_layers must be a regular expression, got '\('",
        ),
        ("bits", [8, 9], "bits must be 2 to 8, or 16, got 9"),
        ("bits", [4, 4], r"bits must differ from each other, got \(4, 4\)"),
        ("dataset", "", "dataset must be a name or a path, got ''"),
        ("bits", 4, "bits must be a list of integers, got 4"),
        ("seed", -1, "seed must be 0 to 4294967295, got -1"),
        ("train_size", "all", "train_size must be an integer, got 'all'"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Config(**{field: value})


def test_a_difference_is_no_match_for_bfloat16():
    with pytest.raises(ValueError, match="hvp must be 'exact' with dtype='bfloat16'"):
        Config(dtype="bfloat16", hvp="finite_difference")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epoch = 3\n")
    with pytest.raises(ValueError, match=r"mine.toml has unknown fields \['epoch'\]"):
        configs.load(path)
    path.write_text("epochs = three\n")
    with pytest.raises(ValueError, match=r"mine.toml is not a TOML file"):
        configs.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine.toml is not a TOML file"):
        configs.load(path)
    path.write_text("epochs = -3\n")
    with pytest.raises(ValueError, match=r"mine.toml: epochs must be at least 1"):
        configs.load(path)


def test_the_command_line_overrides_the_file():
    name = "cifar10_resnet20_hero"
    config, options = command.parse(
        [name, "--h", "2", "--bits", "8", "4", "--clip-norm", "0.1", "--seed", "3"]
    )
    before = configs.load(configs.CONFIGS / f"{name}.toml")
    expected = dataclasses.replace(before, h=2.0, bits=(8, 4), clip_norm=0.1, seed=3)
    assert config == expected
    assert str(options.out) == f"runs/{name}/seed_3"


def test_a_config_written_beside_results_runs_again(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(configs.dumps(Config(epochs=7, method="sgd")))
    config, _ = command.parse([str(path), "--epochs", "8"])
    assert config == Config(epochs=8, method="sgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10_resnet20"], "no config 'cifar10_resnet20': neither a file nor one"),
        (["digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["digits", "--workers", "-1"], "workers must be at least 0, got -1"),
        (["digits", "--epoch", "3"], "--epochs"),
    ],
)
def test_bad_commands_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(command.main(arguments))
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_every_field_is_explained():
    for kind in (Config, Options):
        for field in dataclasses.fields(kind):
            assert f"\n  {field.name}: " in inspect.getdoc(kind)
