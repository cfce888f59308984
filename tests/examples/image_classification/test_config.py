"""Configs: the paper's tables, types and ranges, files and the command line."""

import dataclasses
import inspect
import sys

import pytest

from examples.image_classification import __main__ as command
from examples.image_classification import config as configs
from examples.image_classification.config import Config
from examples.image_classification.named import named, names
from examples.image_classification.run import Options


def test_names_of_the_table_are_configs_that_differ():
    table = {name: named(name) for name in names()}
    assert len(table) == 7 * 6 * 5
    for name, config in table.items():
        noise = f"_noise{100 * config.label_noise:.0f}" if config.label_noise else ""
        method = name.removeprefix(f"{config.dataset}_{config.model}_")
        method = method.removesuffix(noise)
        assert name == f"{config.dataset}_{config.model}_{method}{noise}"
        imagenet = config.dataset == "imagenet2012"
        assert config.epochs == (100 if imagenet else 200)
        assert config.batch_size == (256 if imagenet else 128)
        assert (config.learning_rate, config.momentum) == (0.1, 0.9)
        assert config.weight_decay == 1e-4
        assert config.augmentation == ("resized_crop" if imagenet else "crop_flip")
        assert config.bits == (8, 6, 5, 4, 3)
        rest = {"released": "hero", "released_first_order": "first_order"}
        assert config.method == rest.get(method, method)


def test_hero_has_our_settings_and_released_those_of_the_authors():
    for name, expected in (
        ("cifar10_resnet20_hero_noise40", ("relative", "norm", 0.02, 0.5)),
        ("cifar100_vgg19_bn_hero", ("relative", "norm", 0.02, 0.5)),
        ("cifar10_resnet20_released", ("adaptive", "mean", 0.5, 5.0)),
        ("cifar100_mobilenet_v2_released", ("adaptive", "mean", 1.0, 5.0)),
        ("imagenet2012_resnet18_released", ("adaptive", "mean", 1.0, 5.0)),
    ):
        config = named(name)
        found = (config.perturbation, config.reduction, config.h, config.gamma)
        assert found == expected
    for name, expected in (
        ("cifar10_resnet20_first_order", (0.001, 0.3, 0)),
        ("imagenet2012_resnet18_hero", (0.02, 0.0, 10)),
    ):
        config = named(name)
        assert (config.h, config.share, config.h_warmup_epochs) == expected
    assert named("cifar10_resnet20_released_first_order").h == 0.5


def test_samples_are_found_by_their_names():
    assert named("digits").dataset == "digits"
    assert named("photographs").augmentation == "resized_crop"
    assert named("photographs").dataset == "./DIR"  # not the default, CIFAR-10


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
        (
            "optimizer",
            "adamw",
            r"learning_rate must be at most 0.02 with .* \(0.001 is usual\), got 0.1",
        ),
        ("warmup_epochs", 200.0, "warmup_epochs must be below epochs=200, got 200.0"),
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


def test_an_h_that_follows_the_loss_begins_small_along_relative():
    with pytest.raises(ValueError, match="share must be 0 with perturbation='layerw"):
        Config(h=0.001, share=0.3, perturbation="layerwise")
    with pytest.raises(ValueError, match=r"h must be at most 0\.01 with a share"):
        Config(h=0.04, share=0.3)
    with pytest.raises(ValueError, match="h_warmup_epochs must be 0 with a share, got"):
        Config(h=0.001, share=0.3, h_warmup_epochs=2)
    assert Config(method="sgd", share=0.3, perturbation="layerwise").h == Config.h
    with pytest.raises(ValueError, match=r"share must be 0 to 1, got 1\.5"):
        Config(h=0.001, share=1.5)


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
    before = named(name)
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
        (["cifar10_resnet20"], "no config 'cifar10_resnet20': neither a TOML file nor"),
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
