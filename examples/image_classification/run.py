"""A whole run: what to train, where to write, what comes out."""

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import hero_jax

from . import config as configs
from . import devices as devices_of
from . import evaluate, hosts, input_pipeline, results
from .config import Config
from .datasets import printable
from .devices import Parallel
from .errors import RunError
from .logbook import plot, say, tell
from .loop import Training
from .pipeline import Pipeline
from .stopping import Stop

WEIGHTS, RESULT = "weights.safetensors", "result.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to run; none of it changes the numbers, but for rounding.

    Attributes:
      out: folder to write; the command line makes it `runs/CONFIG/seed_SEED` if None.
      data_dir: where TensorFlow data sets lie; their own default if None.
      dataset_path: file or folder to read in place of the data set that the config
        names.
      download: let TensorFlow Datasets fetch a data set that is not there.
      workers: processes that decode images to train on, and again as many for those
        to test on; 0 for threads.
      devices: devices of this host that share out every micro-batch; all that there
        are if None.
      host_devices: parts of a CPU that pass for devices, each of which runs the
        convolutions of its images on a core of its own; one if None. The command line
        sees to it, since it is too late once JAX is in use.
      parallel: "jit", where the compiler distributes a program, or "pmap", where every
        device runs its own and averages gradients.
      distributed: join the other processes of a run on several hosts, all of which run
        the same command; all of their devices are used.
      keep: number of latest checkpoints that stay, beside the best one.
      minutes: stop after so many, as if asked by SIGTERM; the same command goes on. A
        run of several processes takes no notice.
      quiet: print nothing and show no progress bar.
    """

    out: Path | None = None
    data_dir: Path | None = None
    dataset_path: str | None = None
    download: bool = False
    workers: int = min(8, os.cpu_count() or 1)
    devices: int | None = None
    host_devices: int | None = None
    parallel: Parallel = "jit"
    distributed: bool = False
    keep: int = 2
    minutes: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` where a field is out of range."""
        least = {"workers": 0, "keep": 1, "minutes": 0, "devices": 1, "host_devices": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name} must be at least {limit}, got {value}.")


def run(config: Config, options: Options, stop: Stop | None = None) -> dict[str, Any]:
    """Train and test; go on where an earlier attempt in the same folder ended.

    Of several processes that have joined, only the first one reads and writes files of
    the run; all return the record that is written to `result.json`. A `stop` takes the
    place of signals and `options.minutes`. Raises `Stopped`, or a `RecipeError`.
    """
    if options.out is None:
        raise RunError("out must be a folder, got None.")
    out, first, record = options.out, hosts.is_first(), None
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if first:
                check_config(out, config)
                record = _finished(out)
                if record is None:
                    check_folder(out, config)
                    stack.enter_context(locked(out))
                    record = _finished(out)
        record = hosts.of_first(record)
        if record is not None:
            say(f"finished already: {out / RESULT}", options.quiet or not first)
            return dict(record)
        hosts.check_same("the config", f"{configs.dumps(config)} {options.parallel}")
        with hosts.together():
            pipeline = stack.enter_context(open_pipeline(config, options))
        hosts.check_same("the data", str(pipeline.checksum))
        if stop is None:
            stop = stack.enter_context(Stop(options.minutes))
        return _train_and_test(config, pipeline, out, options, stop)


def open_pipeline(config: Config, options: Options) -> contextlib.closing[Pipeline]:
    """Load the data of a run; a context that stops its workers at the end."""
    devices = devices_of.choose(options.parallel, options.devices)
    devices_of.check(devices, config)
    dataset = options.dataset_path or config.dataset
    config = dataclasses.replace(config, dataset=dataset)
    return contextlib.closing(
        input_pipeline.create(
            config,
            data_dir=options.data_dir,
            download=options.download,
            workers=options.workers,
            devices=devices,
        )
    )


def _train_and_test(
    config: Config, pipeline: Pipeline, out: Path, options: Options, stop: Stop
) -> dict[str, Any]:
    """Train and test; write the files of the run, the result last."""
    quiet = options.quiet or not hosts.is_first()
    with hosts.together():
        training = Training(config, pipeline, out, options.keep, quiet, stop)
    if pipeline.devices.count > 1:
        say(_in_words(config, options, pipeline.devices.count), quiet)
    with contextlib.closing(training):
        state, rows, seconds = training.run()
        networks = {32: evaluate.variables_of(state)}
        for bits in config.bits:
            networks[bits] = evaluate.quantized(networks[32], bits)
        results_of = training.evaluate([*networks.values()])
    tested = dict(zip(networks, results_of, strict=True))
    words = (
        f"{'float' if bits == 32 else f'{bits} bit'} {result.accuracy:.2%}"
        for bits, result in tested.items()
    )
    say(f"test accuracy: {', '.join(words)}", quiet)
    network = {"model": config.model, "dtype": config.dtype, **pipeline.facts._asdict()}
    of_devices = {
        "devices": pipeline.devices.count,
        "processes": jax.process_count(),
        "parallel": options.parallel,
    }
    record = {
        "environment": results.environment() | of_devices,
        "config": dataclasses.asdict(config),
        "network": network,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "train_images_per_epoch": pipeline.steps * config.micro_batch,
        "test_images": pipeline.num_test,
        "seconds": round(seconds, 1),
        "test_loss": tested[32].loss,
        "test_accuracy": tested[32].accuracy,
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        "accuracy_by_bits": {str(k): result.accuracy for k, result in tested.items()},
        "epochs": rows,
    }
    if hosts.is_first():
        results.write_json(out / "weights.json", network)
        hero_jax.quant.save(out / WEIGHTS, networks[32])
        title = f"{config.model} on {Path(config.dataset).name}, {config.method}"
        try:
            plot(rows, record["accuracy_by_bits"], title, out / "curves.png")
        except OSError as error:
            tell(f"the picture is not written: {error}")
        results.write_json(out / RESULT, record)
        say(f"wrote {out / RESULT}", quiet)
    return record


def _in_words(config: Config, options: Options, devices: int) -> str:
    """Say what several devices compute."""
    m = config.examples_per_perturbation or config.micro_batch
    share = config.micro_batch // devices
    normalized = m if config.synchronized_batch_norm else min(m, share)
    return (
        f"{devices} devices by {options.parallel}: {config.micro_batch} images at "
        f"once, one perturbation for every {m}, BatchNorm over {normalized}"
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from running in the same folder."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is running in {out}.") from None
        results.remove_partial(out)
        yield


def read(path: Path) -> dict[str, Any] | None:
    """Read a result, if one was written before."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not record:
            raise ValueError("it is no record")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): delete it.") from None
    return record


def _finished(out: Path) -> dict[str, Any] | None:
    """Return the result of a run, if it is finished."""
    record = read(out / RESULT)
    if record is not None and not record.get("epochs"):
        raise RunError(f"{out / RESULT} is damaged (it has no epochs): delete it.")
    return record


def check_folder(out: Path, config: Config) -> None:
    """Make the folder, or check that it is one of this config."""
    place = str(out.absolute())
    if printable(place) != place:  # Orbax cannot write there
        raise RunError(f"the name of out must be UTF-8, got '{printable(place)}'.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(4096))  # better to fail now than after the training
    except OSError as error:
        raise RunError(
            f"out must be a folder that can be written to: {error}"
        ) from None
    check_config(out, config)


def check_config(out: Path, config: Config) -> None:
    """Raise `RunError` if there is a folder, and it is not one of this config."""
    path = out / "config.toml"
    if not path.exists():
        # A run that was killed as it began may have an empty folder of checkpoints.
        results_of = (*out.glob("checkpoints/*"), out / "result.json")
        if any(x.exists() for x in (*results_of, out / "sweep.json")):
            raise RunError(f"{out} has results, but no config.toml: whose are they?")
        return
    if not path.read_bytes().strip():
        raise RunError(
            f"{path} is empty: bring the run's config back, or choose another --out."
        )
    try:
        before = dataclasses.asdict(configs.load(path))
    except (TypeError, ValueError) as error:
        raise RunError(f"out is not the folder of a run: {error}") from None
    if different := configs.differences(before, config):
        raise RunError(
            f"{out} belongs to a run with another config ({'; '.join(different)}). "
            "Choose another --out, or delete the folder."
        )
