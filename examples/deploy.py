"""Run a network from integer weights, and export it to a file.

Quantizes weights that the quick start saved, and compares three ways to hold them:
floats, integers of one byte, and integers packed without gaps. In each, the weights are
an argument of the compiled function and turned into floats inside it, so that between
calls nothing but the integers is in memory. Then the function is exported as StableHLO,
which needs no Python code of the network, read back, and gives the same logits.

    python examples/quickstart.py
    python examples/deploy.py quickstart_results/weights/hero_seed0.safetensors

Beside the weights it writes `NAME.4bit.safetensors`, the packed integers;
`NAME.stablehlo`, the function of weights and images, for those who `import hero_jax`;
and `NAME.4bit.stablehlo`, the function of images, both for any number of images. The
latter needs JAX alone:

    import jax.export
    data = open("hero_seed0.4bit.stablehlo", "rb").read()
    logits = jax.export.deserialize(bytearray(data)).call(images)
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from hero_jax import quant


class ConvNet(nn.Module):
    """The quick start's network, at evaluation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[B, 8, 8, 1]` to logits `[B, 10]`."""
        for features, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def predict(tree: Any, images: Any) -> Any:
    """Return logits `[N, 10]`; the weights become floats here."""
    return ConvNet().apply(quant.dequantize(tree), images)


def memory(tree: Any, images: Any) -> tuple[int, int]:
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


def main(arguments: list[str] | None = None) -> None:
    """Quantize, measure, export, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="file that the quick start saved")
    parser.add_argument(
        "--bits", type=int, default=4, choices=range(2, 9), help="of a weight"
    )
    options = parser.parse_args(arguments)
    images = load_digits().images[:, :, :, None].astype(np.float32)
    images = (images - images.mean()) / images.std()  # about as in the training
    like = jax.eval_shape(ConvNet().init, jax.random.key(0), images)
    try:
        floats = quant.dequantize(quant.load(options.weights, like=dict(like)))
    except (OSError, ValueError) as error:
        parser.error(str(error))

    params = quant.quantize(floats["params"], options.bits, axis=-1)
    bytewise = {**floats, "params": params}
    packed = quant.pack(bytewise)
    print("| weights | bytes resident | bytes temporary |\n|---|---|---|")
    for name, tree in {
        "float32": floats,
        f"{options.bits} bits, one per byte": bytewise,
        f"{options.bits} bits, packed": packed,
    }.items():
        resident, temporary = memory(tree, images[:1])
        print(f"| {name} | {resident:,} | {temporary:,} |")

    stem = options.weights.with_suffix("")
    weights_file = Path(f"{stem}.{options.bits}bit.safetensors")
    quant.save(weights_file, packed)
    print(f"\nWrote {weights_file} ({weights_file.stat().st_size:,} bytes).")
    expected = jax.jit(predict)(packed, images)
    alone = functools.partial(predict, packed)
    for name, program, trees in (
        (f"{stem}.stablehlo", export(predict, packed), [quant.load(weights_file)]),
        (f"{stem}.{options.bits}bit.stablehlo", export(alone), []),
    ):
        Path(name).write_bytes(program)
        served = jax.export.deserialize(bytearray(Path(name).read_bytes()))
        difference = np.abs(served.call(*trees, images) - expected).max()
        print(
            f"Wrote {name} ({len(program):,} bytes).\nRead back, they differ by at "
            f"most {difference:.1e} in {expected.size} logits."
        )


if __name__ == "__main__":
    main()
