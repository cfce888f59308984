"""Where the time of a training step goes on a CPU, by kind of operation.

One step is traced by JAX's profiler on one core, where nothing runs beside anything
else, and the times of the compiled program's operations are summed up by what they are.
Convolutions are counted, too: three per 3x3 layer and gradient, and six for a product
with the Hessian, is what the arithmetic needs.

    python -m examples.experiments.speed.step_profile  # 1 minute; SGD and HERO
    python -m examples.experiments.speed.step_profile --model vgg19_bn --method HERO
"""

import argparse
import collections
import functools
import gzip
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

import jax
import jax.numpy as jnp
import optax

from examples.image_classification.results import environment, markdown, write_json

from .step_time import make_step
from .step_variants import METHODS, NETWORKS, loss_of

KINDS = {
    "convolutions": r"conv_general_dilated",
    "matrix products": r"dot_general|/transpose\(.*\)/dot",
    "transpositions": r"/transpose$",
    "BatchNorm": r"BatchNorm|LayerNorm",
    "pooling": r"max_pool|reduce_window|select_and_scatter",
}
"""What an operation is called in the program, in this order."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = .* ([\w\-]+)\(")
_NAME = re.compile(r'op_name="([^"]*)"')


def kinds_of(program: str) -> dict[str, str]:
    """Return the kind of every instruction in the text of a compiled program."""
    kinds = {}
    for line in program.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        name = _NAME.search(line)
        text = f"{name[1] if name else ''}"
        if instruction[2] == "dot":
            text = "dot_general"
        matches = (kind for kind, x in KINDS.items() if re.search(x, text))
        kinds[instruction[1]] = next(matches, "the rest")
    return kinds


def traced(step: Any, *args: Any) -> list[tuple[str, float]]:
    """Return name and milliseconds of all that the profiler saw in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step(*args))
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [(e["name"], e["dur"] / 1e3) for e in events if e.get("ph") == "X"]


def profile(network: str, method: str, batch: int, size: int) -> dict[str, Any]:
    """Return milliseconds by kind, and the number of convolutions, of one step."""
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    chosen = METHODS[method]
    model, loss_fn = loss_of(network, jnp.float32, chosen)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(2), images
    )
    params, stats = variables["params"], variables["batch_stats"]
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    state = (jnp.int32(0), params, stats, tx.init(params))
    step = make_step(chosen.make(loss_fn, network, batch), tx)
    compiled = step.lower(state, images, labels).compile()
    for _ in range(2):
        state = jax.block_until_ready(compiled(state, images, labels))
    kinds = kinds_of(compiled.as_text())
    milliseconds: dict[str, float] = collections.defaultdict(float)
    convolutions = 0
    for name, duration in traced(compiled, state, images, labels):
        if name in kinds:
            milliseconds[kinds[name]] += duration
            convolutions += kinds[name] == "convolutions"
    return {"milliseconds": dict(milliseconds), "convolutions": convolutions}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Profile, print a table and return the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=NETWORKS, default="resnet20")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    usual = NETWORKS[options.model]
    batch, size = options.batch or usual.batch, options.size or usual.size
    methods = options.method or ["SGD", "HERO"]
    profiles = {name: profile(options.model, name, batch, size) for name in methods}
    first = profiles[methods[0]]["milliseconds"]
    titles = [f"{name}, ms" for name in methods]
    ratios = [f"{name} / {methods[0]}" for name in methods[1:]]
    rows = [["", *titles, *ratios]]
    for kind in [*KINDS, "the rest", "all"]:
        times = [
            sum(p["milliseconds"].values())
            if kind == "all"
            else p["milliseconds"].get(kind, 0.0)
            for p in profiles.values()
        ]
        base = sum(first.values()) if kind == "all" else first.get(kind, 0.0)
        shown = [f"{x / base:.1f}" if base else "" for x in times[1:]]
        rows.append([kind, *(f"{x:.0f}" for x in times), *shown])
    counts = [p["convolutions"] for p in profiles.values()]
    shown = [f"{n / counts[0]:.1f}" if counts[0] else "" for n in counts[1:]]
    rows.append(["number of convolutions", *map(str, counts), *shown])
    print(
        f"{options.model}, {size}x{size} images, batch {batch}, float32, one core, "
        f"jax {jax.__version__}\n\n{markdown(rows)}"
    )
    record = {"environment": environment(), "network": options.model, "batch": batch}
    record |= {"size": size, "profiles": profiles}
    if options.out is not None:
        write_json(options.out, record)
    return record


if __name__ == "__main__":
    main()
