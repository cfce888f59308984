"""The demos: the networks of the experiments, and alone in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tqdm import tqdm

from examples import quickstart
from examples.experiments.common import digits
from examples.experiments.common.networks import load

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_networks_are_those_of_the_experiment(tmp_path):
    """Bit for bit; accuracies but for an image of 797, whose logits may tie."""
    quickstart.main(["--epochs=1", "--seeds=0", f"--out={tmp_path}"])
    accuracy = json.loads((tmp_path / "quickstart.json").read_text())["accuracy"]
    data = digits.load_data(0.4, 0)
    for method in digits.METHODS:
        program = digits.make_program(digits.METHODS[method], 7)
        with tqdm(disable=True) as progress:
            state = digits.train(program, data, 1, 0, progress)
        name = digits.save_weights(tmp_path, method, 0, state).name
        trained = load(tmp_path / "weights" / name)
        for old, new in zip(
            jax.tree.leaves((state.params, state.batch_stats)),
            jax.tree.leaves((trained["params"], trained["batch_stats"])),
            strict=True,
        ):
            np.testing.assert_array_equal(old, new)
        expected = [float(100 * digits.evaluate(state, data, b)) for b in digits.BITS]
        np.testing.assert_allclose(accuracy[method], [expected], rtol=0, atol=0.126)
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_has_the_methods_of_the_experiment():
    assert [*digits.METHODS] == quickstart.METHODS
    assert quickstart.BITS == digits.BITS


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--label-noise", "1.5"], "1.5"),
        (["--seeds", "-1"], "[-1]"),
        (["--seeds", "0", "2", "0"], "[0, 2, 0]"),
        (["--epochs", "-3"], "-3"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, value, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    message = capsys.readouterr().err
    assert f"{arguments[0]}" in message.partition("error:")[2]
    assert f": {value}" in message


@pytest.mark.slow
def test_a_network_that_diverges_is_named(tmp_path, monkeypatch):
    def steep(params, *arguments):
        loss, stats = quickstart.loss_fn(params, *arguments)
        return 1e30 * loss, stats

    gradients = {"steep": jax.value_and_grad(steep, has_aux=True)}
    monkeypatch.setattr(quickstart, "GRADIENTS", gradients)
    monkeypatch.setattr(quickstart, "METHODS", ["steep"])
    with pytest.raises(SystemExit, match=r"^steep diverged: "):
        quickstart.main(["--epochs=1", "--seeds=0", f"--out={tmp_path}"])


@pytest.mark.slow
def test_demos_run_when_copied_alone(tmp_path):
    """With the package, and nothing else of the repository; warnings are errors."""
    packages, alone = tmp_path / "packages", tmp_path / "alone"
    for folder in (packages, alone):
        folder.mkdir()
    (packages / "hero_jax").symlink_to(ROOT / "hero_jax")
    environment = {**os.environ, "PYTHONPATH": str(packages)}

    def run(demo, *arguments):
        shutil.copy(ROOT / "examples" / demo, alone)
        command = [sys.executable, "-W", "error", demo, *arguments]
        return subprocess.run(
            *(command,),
            cwd=alone,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert "| HERO " in run("quickstart.py", "--epochs=1", "--seeds=0")
    weights = sorted((alone / "quickstart_results" / "weights").iterdir())
    assert len(weights) == 6
    assert "4 bits, packed" in run("deploy.py", str(weights[0]))


@pytest.mark.slow
def test_hero_beats_sgd_clearly_with_the_defaults(tmp_path):
    """Forty percent of the labels are noise: about 20 points apart, 30 at 3 bits."""
    quickstart.main(["--seeds=0", f"--out={tmp_path}"])
    accuracy = json.loads((tmp_path / "quickstart.json").read_text())["accuracy"]
    (hero,) = accuracy["HERO"]
    for baseline in ("SGD", "SGD, tuned"):
        (sgd,) = accuracy[baseline]
        assert hero[0] > sgd[0] + 8.0
        assert hero[-1] > sgd[-1] + 15.0
