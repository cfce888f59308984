"""The commands around quantized weights, small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hero_jax
from examples import deploy
from examples.experiments import accuracy_against_bits
from examples.experiments.common import digits as quickstart
from examples.experiments.speed import quantizer as quantizer_speed
from hero_jax import quant

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Networks of two seeds, hardly trained."""
    folder = tmp_path_factory.mktemp("weights")
    program = quickstart.make_program(quickstart.METHODS["HERO"], 7)
    data = quickstart.load_data(0.0, 0)
    paths = []
    for seed in (0, 1):
        with quickstart.progress_bar("", 35, quiet=True) as progress:
            state = quickstart.train(program, data, 5, seed, progress)
        paths.append(quickstart.save_weights(folder, "HERO", seed, state))
    return paths


@pytest.mark.slow
def test_accuracy_is_that_of_the_quick_start(weights, tmp_path, capsys):
    settings = ["per tensor", "per tensor, new BatchNorm statistics"]
    chosen = [f"--setting={setting}" for setting in settings]
    record = accuracy_against_bits.main(
        [*map(str, weights), *chosen, f"--out={tmp_path}", "--quiet"]
    )
    data = quickstart.load_data(0.4, 0)
    for i, path in enumerate(weights):
        tree = accuracy_against_bits.load(path)
        state = quickstart.TrainState(tree["params"], tree["batch_stats"], None)
        for k, bits in enumerate(accuracy_against_bits.BITS):
            expected = 100.0 * quickstart.evaluate(state, data, bits)
            actual = record["accuracy"]["per tensor"]["hero"][k]["values"][i]
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert list(record["accuracy"]) == settings
    written = json.loads((tmp_path / "accuracy_against_bits.json").read_text())
    assert written["accuracy"] == record["accuracy"]
    picture = (tmp_path / "accuracy_against_bits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "| hero " in capsys.readouterr().out


@pytest.mark.slow
def test_accuracy_without_files_trains_first(tmp_path):
    record = accuracy_against_bits.main(
        ["--epochs=1", f"--out={tmp_path}", "--quiet", "--setting=symmetric"]
    )
    assert list(record["accuracy"]) == ["symmetric"]
    assert list(record["accuracy"]["symmetric"]) == ["sgd", "hero"]
    assert len(list((tmp_path / "weights").iterdir())) == 2


@pytest.mark.slow
def test_statistics_of_a_batch_are_those_of_numpy(weights):
    """The first layer's, whose input is the image."""
    params = accuracy_against_bits.load(weights[0])["params"]
    images = quickstart.load_data(0.0, 0).train_images[:50]
    stats = accuracy_against_bits.stats_fn(params, images)["BatchNorm_0"]
    kernel = np.asarray(params["Conv_0"]["kernel"])[:, :, 0]
    padded = np.pad(np.asarray(images)[..., 0], ((0, 0), (1, 1), (1, 1)))
    output = sum(
        padded[:, i : i + 8, j : j + 8, None] * kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(stats["mean"], output.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], output.var((0, 1, 2)), rtol=1e-4)


def test_bad_files_are_named(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    hero_jax.quant.save(other, {"w": np.ones(3, np.float32)})
    (tmp_path / "text").write_text("hello")
    for path, message in [
        (tmp_path / "missing", "No such file"),
        (tmp_path / "text", "is not a valid safetensors file"),
        (other, "like must have the structure of the file"),
    ]:
        for main in (accuracy_against_bits.main, deploy.main):
            with pytest.raises(SystemExit):
                main([str(path)])
            assert message in capsys.readouterr().err


@pytest.mark.slow
def test_deployment(weights, capsys):
    deploy.main([str(weights[0])])
    printed = capsys.readouterr().out
    resident = [
        int(line.split("|")[2].replace(",", ""))
        for line in printed.splitlines()
        if line.startswith(("| float", "| 4"))
    ]
    floats, bytewise, packed = resident
    assert packed < bytewise < 0.3 * floats
    assert packed < 0.16 * floats
    differences = re.findall(r"differ by at most (\S+) in 17970 logits", printed)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-4
    files = {path.name: path for path in weights[0].parent.iterdir()}
    assert {"hero_seed0.4bit.safetensors", "hero_seed0.stablehlo"} <= {*files}

    # With the weights inside, JAX alone is enough. They stay packed there.
    alone = files["hero_seed0.4bit.stablehlo"]
    assert alone.stat().st_size < files["hero_seed0.stablehlo"].stat().st_size + packed
    images = quickstart.load_data(0.0, seed=0).test_images
    np.save(alone.with_suffix(".npy"), images)
    reader = (
        "import sys; sys.modules['hero_jax'] = None\n"
        "import jax.export, numpy as np\n"
        f"program = bytearray(open({str(alone)!r}, 'rb').read())\n"
        "served = jax.export.deserialize(program)\n"
        f"images = np.load({str(alone.with_suffix('.npy'))!r})\n"
        f"np.save({str(alone.with_suffix('.npy'))!r}, served.call(images))\n"
        "assert sys.modules['hero_jax'] is None"
    )
    subprocess.run([sys.executable, "-c", reader], check=True)
    floats = quant.load(files["hero_seed0.4bit.safetensors"])
    np.testing.assert_allclose(
        np.load(alone.with_suffix(".npy")), deploy.predict(floats, images), atol=1e-4
    )


@pytest.mark.slow
def test_four_bits_of_resnet20_take_a_seventh_of_the_floats():
    sizes = quantizer_speed.file_sizes(quantizer_speed.weights("resnet20"))
    assert 7 * sizes["4 bit"] <= sizes["float"]
    for bits in ("8", "6", "5", "3", "2"):
        assert sizes[f"{bits} bit"] < sizes["float"] * int(bits) / 32 + 20_000


@pytest.mark.slow
def test_vgg19_has_the_size_of_the_paper():
    params = quantizer_speed.weights("vgg19_bn")
    weights = sum(x.size for x in quickstart.jax.tree.leaves(params))
    assert round(weights / 1e6, 2) == 20.04


@pytest.mark.slow
def test_speed_table(capsys):
    quantizer_speed.main(["--tree=resnet20", "--rounds=1"])
    printed = capsys.readouterr().out
    assert re.search(r"\| copy +\|", printed)
    assert re.search(r"\| 4 bit +\|", printed)
