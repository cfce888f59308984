"""Run a network from integer weights, and export it to a file.

Quantizes the weights that the quick start saved, and compares three ways to hold them:
floats, integers of one byte, and integers packed without gaps. In each, the weights are
an argument of the compiled function and turned into floats inside it, so that between
calls nothing but the integers is in memory. Then the function is exported as StableHLO,
which needs no Python code of the network, read back, and gives the same logits: once
with the packed integers as an argument, which whoever reads it builds with
`import hero_jax`, and once with them inside, which needs JAX alone.

    python -m examples.experiments.common.digits --save-weights
    python examples/deploy.py quickstart_results/weights/hero_seed0.safetensors

Beside the weights it writes `NAME.4bit.safetensors`, the packed integers,
`NAME.stablehlo`, the function of weights and images, and `NAME.4bit.stablehlo`, the
function of images, both for any number of images. To run the latter:

    import jax.export
    data = open("hero_seed0.4bit.stablehlo", "rb").read()
    logits = jax.export.deserialize(bytearray(data)).call(images)
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from examples.experiments.common import digits as quickstart
from examples.experiments.common.networks import load, logits_fn
from hero_jax import quant


def predict(tree: Any, images: chex.Array) -> chex.Array:
    """Return logits `[N, 10]`; the weights become floats here."""
    floats = quant.dequantize(tree)
    return logits_fn(floats["params"], floats["batch_stats"], images)


def memory(tree: Any, images: chex.Array) -> tuple[int, int]:
    """Return the bytes resident before a call, and the temporary ones during it."""
    analysis: Any = jax.jit(predict).lower(tree, images).compile().memory_analysis()
    return analysis.argument_size_in_bytes - images.nbytes, analysis.temp_size_in_bytes


def export(function: Callable[..., Any], *trees: Any) -> bytes:
    """Return a function of trees and any number of images as serialized StableHLO."""
    batch = jax.export.symbolic_shape("n, 8, 8, 1")
    images = jax.ShapeDtypeStruct(batch, jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))
    return bytes(exported(*shapes, images).serialize())


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize, measure, export, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="file that the quick start saved")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 5, 6, 7, 8))
    options = parser.parse_args(arguments)
    try:
        floats = load(options.weights)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    params = quant.quantize(floats["params"], options.bits, axis=-1)
    bytewise = {**floats, "params": params}
    packed = quant.pack(bytewise)

    images = quickstart.load_data(0.0, seed=0).test_images
    print("| weights | bytes resident | bytes temporary |\n|---|---|---|")
    for name, tree in {
        "float32": floats,
        f"{options.bits} bits, one per byte": bytewise,
        f"{options.bits} bits, packed": packed,
    }.items():
        resident, temporary = memory(tree, images[:1])
        print(f"| {name} | {resident:,} | {temporary:,} |")

    stem = options.weights.with_suffix("")
    weights_file = stem.with_name(f"{stem.name}.{options.bits}bit.safetensors")
    quant.save(weights_file, packed)
    print(f"\nWrote {weights_file} ({weights_file.stat().st_size:,} bytes).")
    expected = jax.jit(predict)(packed, images)
    for name, program, trees in (
        (f"{stem.name}.stablehlo", export(predict, packed), [quant.load(weights_file)]),
        (
            f"{stem.name}.{options.bits}bit.stablehlo",
            export(functools.partial(predict, packed)),
            [],
        ),
    ):
        file = stem.with_name(name)
        quant.write_file(file, program)
        served = jax.export.deserialize(bytearray(file.read_bytes()))
        logits = served.call(*trees, images)
        print(
            f"Wrote {file} ({len(program):,} bytes).\nRead back, they differ by at "
            f"most {np.abs(logits - expected).max():.1e} in {logits.size} logits."
        )


if __name__ == "__main__":
    main()
