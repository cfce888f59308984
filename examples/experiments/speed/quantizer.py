"""Time the quantizer against a plain copy and qwix, and list the sizes of its files.

    python -m examples.experiments.speed.quantizer  # a minute on 2 cores
    python -m examples.experiments.speed.quantizer --tree vgg19_bn

The trees are the initial weights of ResNet20 and of VGG19 with BatchNorm for CIFAR-10.
GB/s count the bytes of the float32 weights. The copy multiplies every leaf by one; qwix
is left out if it is not installed. "Jitted" is the whole tree in one program of its
own, as inside a larger one; "called" is `quant.quantize` from Python with its checks,
which waits for the device once.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.experiments.common.turns import Program, take_turns
from hero_jax import models, quant

from .harness import machine, report, speed_parser

LAYOUTS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per channel": {"axis": -1},
    "groups of 16": {"axis": (-2, -1), "group_size": (16, 1)},
}


def weights(name: str) -> Any:
    """Return the initial weights of one of the package's networks."""
    model, images = models.create(name, num_classes=10), jnp.zeros((1, 32, 32, 3))
    initialize = jax.jit(functools.partial(model.init, train=False))
    return initialize(jax.random.key(0), images)["params"]


def jitted(function: Callable[[Any], Any], argument: Any) -> Program:
    """Return a compiled call that waits for its result."""
    compiled = jax.jit(function).lower(argument).compile()
    return lambda: jax.block_until_ready(compiled(argument))


def programs(params: Any) -> dict[str, Program]:
    """Return what is timed, compiled, by name; the first is the reference."""
    timed = {"copy": jitted(lambda tree: jax.tree.map(lambda x: x * 1, tree), params)}
    for layout, options in LAYOUTS.items():
        quantize = functools.partial(quant.quantize, bits=8, **options)
        timed[f"quantize, {layout}, jitted"] = jitted(quantize, params)
        tree = quant.quantize(params, 8, **options)
        timed[f"dequantize, {layout}, jitted"] = jitted(quant.dequantize, tree)
    channels = functools.partial(quant.quantize, params, axis=-1)
    timed |= {
        "quantize, per channel, called": lambda: channels(8),
        "quantize, per channel, least squares": lambda: channels(4, calibration="mse"),
        "pack, 4 bits": jitted(quant.pack, channels(4)),
        "dequantize packed, 4 bits": jitted(quant.dequantize, quant.pack(channels(4))),
    }
    return timed | (of_qwix(params) if importlib.util.find_spec("qwix") else {})


def of_qwix(params: Any) -> dict[str, Program]:
    """Return the same by qwix: affine, 8 bits, leaves of two or more dimensions."""
    import qwix

    def quantize(params: Any, channels: bool) -> Any:
        def one(x: Any) -> Any:
            axes = [x.ndim - 1] if channels else []
            options = {"calibration_method": "minmax", "channelwise_axes": axes}
            return x if x.ndim < 2 else qwix.quantize(x, jnp.int8, **options)

        return jax.tree.map(one, params)

    def is_array(x: Any) -> bool:
        return isinstance(x, qwix.QArray)

    def dequantize(tree: Any) -> Any:
        whole = lambda x: qwix.dequantize(x) if is_array(x) else x  # noqa: E731
        return jax.tree.map(whole, tree, is_leaf=is_array)

    timed = {}
    for layout, channels in (("per tensor", False), ("per channel", True)):
        function = functools.partial(quantize, channels=channels)
        tree = jax.jit(function)(params)
        timed[f"qwix quantize, {layout}, jitted"] = jitted(function, params)
        timed[f"qwix dequantize, {layout}, jitted"] = jitted(dequantize, tree)
    return timed


def file_sizes(params: Any) -> dict[str, int]:
    """Return the bytes of the float file and of the quantized ones."""
    trees = {"float": params}
    trees |= {f"{k} bit": quant.quantize(params, k) for k in (8, 6, 5, 4, 3, 2)}
    trees["4 bit, per channel"] = quant.quantize(params, 4, axis=-1)
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        for name, tree in trees.items():
            quant.save(path, tree)
            sizes[name] = path.stat().st_size
    return sizes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the tables of a network, or of both."""
    parser = speed_parser(__doc__, rounds=15)
    networks = ["resnet20", "vgg19_bn"]
    parser.add_argument("--tree", choices=networks, nargs="+", default=networks)
    options = parser.parse_args(arguments)
    print(f"{machine()}\n")
    record = {}
    for name in options.tree:
        params = weights(name)
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        seconds = take_turns(programs(params), options.rounds)
        copy = np.median(seconds["copy"])
        title = f"{name}, {size / 1e6:.2f} MB"
        rows = [[title, "median ms", "GB/s", "time / copy"]]
        for program, turns in seconds.items():
            t = np.median(turns)
            cells = f"{1e3 * t:.3f}", f"{size / t / 1e9:.2f}", f"{t / copy:.2f}"
            rows.append([program, *cells])
        report(rows)
        sizes = file_sizes(params)
        rows = [[f"{name} file", "bytes", "float / this"]]
        rows += [[x, f"{n:,}", f"{sizes['float'] / n:.2f}"] for x, n in sizes.items()]
        record[name] = {"seconds": seconds, "bytes": sizes}
        report(rows, options.out, networks=record)
    return record


if __name__ == "__main__":
    main()
