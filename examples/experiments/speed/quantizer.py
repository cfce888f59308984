"""Time the quantizer against a plain copy and qwix, and list the sizes of its files.

Two trees, the initial weights of ResNet20 and of VGG19 with BatchNorm for CIFAR-10.
Every program is compiled first; then all take turns within one process, so that the
ratios hold where the machine's speed drifts. Throughput counts the bytes of the float32
weights. The copy multiplies every leaf by one; qwix is left out if it is not installed.

    python -m examples.experiments.speed.quantizer  # a minute on 2 cores
    python -m examples.experiments.speed.quantizer --tree vgg19_bn    # one of the two

"jitted" is the whole tree in one program of its own, as inside a larger one; "called"
is `quant.quantize` from Python with its checks, which waits for the device once.
"""

import argparse
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import models, quant

TREES = ("resnet20", "vgg19_bn")
FILE_BITS = (8, 6, 5, 4, 3, 2)
TIMED_SECONDS = 0.02
Program = Callable[[], Any]


def weights(name: str) -> Any:
    """Return the initial weights of one of the package's networks."""
    model = models.create(name, num_classes=10)
    images = jnp.zeros((1, 32, 32, 3))
    initialize = jax.jit(lambda key: model.init(key, images, train=False))
    return initialize(jax.random.key(0))["params"]


def programs(params: Any) -> dict[str, Program]:
    """Return what is timed, compiled, by name; the first is the reference."""
    timed: dict[str, Program] = {"copy": _jitted(_copy, params)}
    layouts: dict[str, dict[str, Any]] = {
        "per tensor": {},
        "per channel": {"axis": -1},
        "groups of 16": {"axis": (-2, -1), "group_size": (16, 1)},
    }
    for layout, options in layouts.items():
        quantize = functools.partial(quant.quantize, bits=8, **options)
        timed[f"quantize, {layout}, jitted"] = _jitted(quantize, params)
        quantized = quant.quantize(params, 8, **options)
        timed[f"dequantize, {layout}, jitted"] = _jitted(quant.dequantize, quantized)
    timed["quantize, per channel, called"] = lambda: quant.quantize(params, 8, axis=-1)
    timed["quantize, per channel, least squares"] = lambda: quant.quantize(
        params, 4, axis=-1, calibration="mse"
    )
    nibbles = quant.quantize(params, 4, axis=-1)
    packed = quant.pack(nibbles)
    timed["pack, 4 bits"] = _jitted(quant.pack, nibbles)
    timed["dequantize packed, 4 bits"] = _jitted(quant.dequantize, packed)
    return timed | (_qwix(params) if importlib.util.find_spec("qwix") else {})


def _jitted(function: Callable[[Any], Any], argument: Any) -> Program:
    compiled = jax.jit(function).lower(argument).compile()
    return lambda: compiled(argument)


def _copy(params: Any) -> Any:
    return jax.tree.map(lambda x: x * 1, params)


def _qwix(params: Any) -> dict[str, Program]:
    """The same by qwix: affine, 8 bits, leaves of two or more dimensions."""
    import qwix

    def quantize(params: Any, channels: bool) -> Any:
        def one(x: Any) -> Any:
            if x.ndim < 2:
                return x
            axes = [x.ndim - 1] if channels else []
            return qwix.quantize(
                x, jnp.int8, channelwise_axes=axes, calibration_method="minmax"
            )

        return jax.tree.map(one, params)

    def dequantize(tree: Any) -> Any:
        def is_array(x: Any) -> bool:
            return isinstance(x, qwix.QArray)

        return jax.tree.map(
            lambda x: qwix.dequantize(x) if is_array(x) else x, tree, is_leaf=is_array
        )

    timed = {}
    for layout, channels in (("per tensor", False), ("per channel", True)):
        function = jax.jit(lambda p, c=channels: quantize(p, c))
        timed[f"qwix quantize, {layout}, jitted"] = _jitted(function, params)
        timed[f"qwix dequantize, {layout}, jitted"] = _jitted(
            dequantize, function(params)
        )
    return timed


def measure(timed: dict[str, Program], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of a call in every round; the programs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, program in timed.items():
            # The first call after another program is slower, and says how many follow.
            calls = max(1, round(TIMED_SECONDS / _seconds(program, 1)))
            seconds[name].append(_seconds(program, calls))
    return {name: np.array(times) for name, times in seconds.items()}


def _seconds(program: Program, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(program())
    return (time.perf_counter() - start) / calls


def file_sizes(params: Any) -> dict[str, int]:
    """Return the bytes of the float file and of the quantized ones."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        trees = {"float": params}
        for bits in FILE_BITS:
            trees[f"{bits} bit"] = quant.quantize(params, bits)
        trees["4 bit, per channel"] = quant.quantize(params, 4, axis=-1)
        for name, tree in trees.items():
            quant.save(path, tree)
            sizes[name] = path.stat().st_size
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", choices=TREES, help="one tree only")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    for name in [options.tree] if options.tree else TREES:
        params = weights(name)
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        seconds = measure(programs(params), options.rounds)
        copy = np.median(seconds["copy"])
        print(f"| {name}, {size / 1e6:.2f} MB | median ms | GB/s | time / copy |")
        print("|---|---|---|---|")
        for program, times in seconds.items():
            t = np.median(times)
            rate = f"{size / t / 1e9:.2f}"
            print(f"| {program} | {1e3 * t:.3f} | {rate} | {t / copy:.2f} |")
        sizes = file_sizes(params)
        print(f"\n| {name} file | bytes | float / this |\n|---|---|---|")
        for label, n in sizes.items():
            print(f"| {label} | {n:,} | {sizes['float'] / n:.2f} |")
        print()


if __name__ == "__main__":
    main()
