"""Two processes on this machine, joined as those of two hosts would be."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.image_classification import __main__ as command
from examples.image_classification import config as configs
from examples.image_classification import hosts
from examples.image_classification.config import Config
from examples.image_classification.run import Options, run
from examples.image_classification.stopping import STOPPED
from hero_jax import quant

ROOT = Path(__file__).parents[3]
CONFIG = Config(
    dataset="digits",
    augmentation="crop_flip",
    model="resnet8",
    method="hero",
    train_size=320,
    test_size=101,
    batch_size=64,
    epochs=4,
    curvature_batches=1,
    bits=(3,),
)
SMALL = "tests.examples.image_classification.small"
"""The command, with a network that is quick to compile."""

END_SECONDS = 60
"""A process ends so soon after another one was killed."""


class Pair:
    """Two processes that run the same command; killed at the end of the test."""

    def __init__(self, folder, *options, config=CONFIG, each=((), ()), ids=(0, 1)):
        path = folder / "two.toml"
        path.write_text(configs.dumps(config))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.files = [(folder / f"process{k}.txt").open("w+") for k in range(2)]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-u", "-m", SMALL),
                    *(str(path), f"--out={folder / 'run'}", "--distributed"),
                    *options,
                    *each[k],
                ],
                cwd=ROOT,
                stdout=self.files[k],
                stderr=subprocess.STDOUT,
                env=os.environ
                | {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(ids[k]),
                    "JAX_NUM_CPU_DEVICES": "1",
                },
            )
            for k in range(2)
        ]

    def said(self, k):
        return Path(self.files[k].name).read_text()

    def wait_for(self, text):
        deadline = time.monotonic() + 120
        while text not in self.said(0):
            assert self.processes[0].poll() is None, self.said(0)
            assert time.monotonic() < deadline, self.said(0)
            time.sleep(0.02)

    def wait(self, seconds=120):
        return [process.wait(seconds) for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process, file in zip(self.processes, self.files, strict=True):
            process.kill()
            process.wait()
            file.close()


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_two_processes_train_as_one_with_two_devices(tmp_path, parallel):
    """Twenty steps; the sum of two numbers does not depend on the order."""
    with Pair(tmp_path, f"--parallel={parallel}") as pair:
        assert pair.wait() == [0, 0], pair.said(0)
        assert "wrote" in pair.said(0)
        assert "epoch" not in pair.said(1), "only the first one prints"
        assert "2 devices by" in pair.said(0)
    alone = tmp_path / "alone"
    options = Options(out=alone, parallel=parallel, devices=2, quiet=True)
    record = run(CONFIG, options)
    two = json.loads((tmp_path / "run" / "result.json").read_text())
    assert two["environment"]["processes"] == 2
    assert two["environment"]["devices"] == 2
    assert two["epochs"][-1]["step"] == 20
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *(quant.load(p / "weights.safetensors") for p in (tmp_path / "run", alone)),
    )
    for one, other in zip(record["epochs"], two["epochs"], strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path, victim):
    """The other one stops with an error, in time; then one device goes on alone."""
    config = dataclasses.replace(CONFIG, epochs=30)
    with Pair(tmp_path, "--parallel=pmap", config=config) as pair:
        pair.wait_for("epoch   2")
        pair.processes[victim].kill()
        killed = time.monotonic()
        status = pair.processes[1 - victim].wait(END_SECONDS)
        assert status not in (0, None)
        assert time.monotonic() - killed < END_SECONDS
        said = pair.said(1 - victim)
        assert "another process of the run has ended" in said or "another task" in said
    out = tmp_path / "run"
    before = (out / "metrics.csv").read_text().splitlines()
    assert len(before) >= 3
    if victim == 1:
        record = run(config, Options(out=out, devices=1, quiet=True))
        after = (out / "metrics.csv").read_text().splitlines()
        assert after[: len(before)] == before
        assert record["epochs"][-1]["step"] == 150


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_sigterm_to_one_process_stops_all_and_both_resume(tmp_path):
    """At the same step; the end is that of a run that nothing interrupted."""
    config = dataclasses.replace(CONFIG, epochs=20)
    with Pair(tmp_path, config=config) as pair:
        pair.wait_for("epoch   2")
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [STOPPED, STOPPED], pair.said(0)
        assert "saved; the same command resumes" in pair.said(0)
    step = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped after step {step} and saved" in pair.said(0)
    assert not (tmp_path / "run" / "result.json").exists()
    with Pair(tmp_path, config=config) as pair:
        assert pair.wait() == [0, 0], pair.said(0)
        assert f"resumed after step {step} of 100" in pair.said(0)
    alone = run(config, Options(out=tmp_path / "alone", devices=2, quiet=True))
    both = json.loads((tmp_path / "run" / "result.json").read_text())
    for one, other in zip(alone["epochs"], both["epochs"], strict=True):
        np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-3)


@pytest.mark.slow
def test_processes_that_disagree_are_told(tmp_path):
    with Pair(tmp_path, each=[["--seed=1"], ["--seed=2"]]) as pair:
        assert all(pair.wait(END_SECONDS))
        assert "error: the config of process 1 differs from that of" in pair.said(0)


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_in_words(tmp_path):
    """The folder belongs to another run, which only the first process looks at."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("epochs = 1")
    with Pair(tmp_path) as pair:
        assert pair.wait(END_SECONDS) == [1, 1]
        assert "belongs to a run with another config" in pair.said(0)
        assert "error: another process of the run cannot begin" in pair.said(1)


def test_one_process_agrees_with_itself():
    assert hosts.is_first()
    assert hosts.of_first({"a": [1, None]}) == {"a": [1, None]}
    assert hosts.total(3) == 3
    hosts.check_same("anything", "at all")
    tree = {"w": np.arange(3)}
    assert hosts.arrays_of_first(tree) is tree


def test_wrong_variables_are_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(hosts.HostsError, match=r"'one' .*JAX_PROCESS_ID"):
        hosts.join()


@pytest.mark.slow
def test_two_processes_with_one_number_are_told_what_they_wait_for(tmp_path):
    with Pair(tmp_path, ids=(1, 1)) as pair:
        pair.wait_for("waiting for the other processes of the run at localhost:")
        assert "each of 2 must have a JAX_PROCESS_ID of its own" in pair.said(0)


def test_waiting_for_other_processes_is_not_silent(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "one:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    hosts.join()
    told = capsys.readouterr().err
    assert "at one:1234: each of 3 must have" in told
    assert "and this one has 2." in told


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("UNAVAILABLE: no\nmore"), ValueError("Gloo: no\nmore")],
)
def test_the_end_of_another_process_is_one_line(error, tmp_path, monkeypatch, capsys):
    def ended(*_):
        raise error

    monkeypatch.setattr(command, "run", ended)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "leave", lambda status: status)
    assert command.main(["digits", f"--out={tmp_path}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: another process of the run has ended, or cannot be")
    assert told.endswith(": no\n")
    assert told.count("\n") == 1


@pytest.mark.slow
def test_where_no_other_process_is_known_it_is_said(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "examples.image_classification", "digits"),
            *(f"--out={tmp_path}", "--distributed"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot join the other processes: ")
    assert "set JAX_COORDINATOR_ADDRESS" in done.stderr
    assert done.stderr.count("\n") == 1
