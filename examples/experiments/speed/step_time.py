"""Time and memory of a training step: SGD, first-order, GRAD-L1, HERO and its options.

All steps are compiled first and then take turns within one process, so that the ratios
hold where the machine's speed drifts. In its turn, a method takes one step that is not
timed, since the first one after another program pays for fresh memory, and two that
are (four where the penalty comes at every fourth). Random images, initial weights.

    python -m examples.experiments.speed.step_time  # 4 minutes on 2 cores
    python -m examples.experiments.speed.step_time --method "HERO, finite difference" --rounds 10
    python -m examples.experiments.speed.step_time --model all --out step_time.json

It prints, for each network, the median time over the rounds and its ratio to that of
SGD, the least ratio of a round, images/s, operations and temporary memory as XLA counts
them, and the seconds of compilation; `--out` writes all of it with the hardware.
Operations are those of the program as written, before XLA merges what is equal.

On CPUs: `--host-devices 2` shares a batch out among so many parts of the machine, each
of which runs the convolutions of its images on one core. Where glibc is 2.35 or later,
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment spares page faults.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples.image_classification.results import environment, markdown, write_json

from .step_variants import METHODS, NETWORKS, loss_of

ALL = [name for name in NETWORKS if name != "resnet8"]
TUNABLES = "GLIBC_TUNABLES"


def make_step(value_and_grad: Any, tx: optax.GradientTransformation) -> Any:
    """Return the jitted `(state, images, labels) -> state`, which uses the state up."""

    def step(state: Any, images: Any, labels: Any) -> Any:
        count, params, stats, opt_state = state
        (_, (stats, _)), grads = value_and_grad(count, params, stats, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return count + 1, params, stats, opt_state

    return jax.jit(step, donate_argnums=0)


def measure(
    network: str,
    *,
    size: int,
    batch: int,
    dtype: str = "float32",
    methods: Sequence[str] = (),
    rounds: int = 5,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure the steps of one network.

    Args:
      network: one of NETWORKS.
      size: height and width of the images.
      batch: images per step, shared out among all devices.
      dtype: in which the network computes.
      methods: names in METHODS; SGD is always among them. None at all means all that
        make a difference on this platform.
      rounds: turns of each method.
      quiet: show no progress bar.

    Returns:
      Per method: seconds per step of each round, images per second, flops, bytes of
      temporary memory on one device, seconds of compilation.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    everywhere, shared = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    images, labels = jax.device_put((images, labels), shared)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    on_cpu = jax.default_backend() == "cpu"
    chosen = {
        name: method
        for name, method in METHODS.items()
        if name == "SGD" or (name in methods if methods else on_cpu or not method.stock)
    }

    steps, states = {}, {}
    results: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(chosen) * (1 + rounds), disable=quiet, desc=network)
    for name, method in chosen.items():
        bar.set_postfix_str(f"compiling {name}")
        model, loss_fn = loss_of(network, jnp.dtype(dtype), method)
        variables = jax.jit(
            lambda key, model=model: model.init(key, images[:1], False)
        )(jax.random.key(2))
        params, stats = variables["params"], variables["batch_stats"]
        state = (jnp.int32(0), params, stats, tx.init(params))
        states[name] = jax.device_put(state, everywhere)
        step = make_step(method.make(loss_fn, network, batch), tx)
        lowered = step.lower(states[name], images, labels)
        start = time.perf_counter()
        steps[name] = lowered.compile()
        results[name] = {
            "compile_seconds": round(time.perf_counter() - start, 1),
            "flops": (lowered.cost_analysis() or {}).get("flops"),
            "temporary_bytes": steps[name].memory_analysis().temp_size_in_bytes,
            "seconds": [],
        }
        bar.update()
    for _ in range(rounds):
        for name, step in steps.items():
            bar.set_postfix_str(name)
            states[name] = jax.block_until_ready(step(states[name], images, labels))
            count = METHODS[name].timed_steps
            start = time.perf_counter()
            for _ in range(count):
                states[name] = step(states[name], images, labels)
            jax.block_until_ready(states[name])
            seconds = (time.perf_counter() - start) / count
            results[name]["seconds"].append(seconds)
            bar.update()
    bar.close()
    for result in results.values():
        result["images_per_second"] = batch / float(np.median(result["seconds"]))
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results of a network."""
    titles = [
        *("method", "median ms", "ratio", "least ratio", "images/s"),
        *("Gflop", "temporary MiB", "compile s"),
    ]
    rows = [titles]
    baseline = np.array(results["SGD"]["seconds"])
    for name, result in results.items():
        seconds = np.array(result["seconds"])
        flops = result["flops"]
        rows.append(
            [
                name,
                f"{1e3 * np.median(seconds):.0f}",
                f"{np.median(seconds) / np.median(baseline):.2f}",
                f"{np.min(seconds / baseline):.2f}",
                f"{result['images_per_second']:.0f}",
                "" if flops is None else f"{flops / 1e9:.1f}",
                f"{result['temporary_bytes'] / 2**20:.0f}",
                f"{result['compile_seconds']:.1f}",
            ]
        )
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table per network, return the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*NETWORKS, "all"], default="resnet20")
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", choices=METHODS, action="append", default=[])
    parser.add_argument("--host-devices", type=int, help="parts of the CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    for name in ("size", "batch", "rounds", "host_devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if options.host_devices is not None:
        jax.config.update("jax_num_cpu_devices", options.host_devices)
    on_cpu = jax.default_backend() == "cpu"
    record: dict[str, Any] = {
        "environment": environment()
        | {"devices": len(jax.devices()), TUNABLES: os.environ.get(TUNABLES, "")},
        "dtype": options.dtype,
        "networks": {},
    }
    for network in ALL if options.model == "all" else [options.model]:
        usual = NETWORKS[network]
        size = options.size or usual.size
        batch = options.batch or (usual.batch if on_cpu else usual.large_batch)
        if batch % len(jax.devices()):
            parser.error(
                f"--batch must be a multiple of the {len(jax.devices())} devices, "
                f"got {batch}."
            )
        results = measure(
            network,
            size=size,
            batch=batch,
            dtype=options.dtype,
            methods=options.method,
            rounds=options.rounds,
            quiet=options.quiet,
        )
        record["networks"][network] = {"size": size, "batch": batch, "methods": results}
        print(
            f"\n{network}, {size}x{size} images, batch {batch}, {options.dtype}, "
            f"{len(jax.devices())} x {jax.devices()[0].device_kind}, "
            f"jax {jax.__version__}\n\n{table(results)}",
            flush=True,
        )
        if options.out is not None:
            write_json(options.out, record)
    return record


if __name__ == "__main__":
    main()
