"""Time the convolutions of `hero_jax.models` against XLA's own, on a CPU.

    python -m examples.experiments.speed.convolution  # 4 minutes on 2 cores
    python -m examples.experiments.speed.convolution --layer "shortcut 1x1"

For each kind of layer in the paper's networks: output, input gradient and weight
gradient, alone and inside a `lax.scan` of three steps. The least time over the rounds
counts, since other work on the machine can only add to it.

Inside the loop a step depends on the one before, so that none is left out, and hands
its whole result on, so that XLA cannot merge what follows with the convolution. On
another backend than the CPU both columns are the same program.
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from hero_jax.models import conv_general_dilated

from .harness import Parser, Program, machine, report, take_turns

LOOP_STEPS = 3
SLOW_SECONDS = 0.3
LAYERS = {
    "first": (128, 32, 3, 16, 3, 1, 1),
    "dense 32x32x16": (128, 32, 16, 16, 3, 1, 1),
    "dense 16x16x32": (128, 16, 32, 32, 3, 1, 1),
    "dense 8x8x64": (128, 8, 64, 64, 3, 1, 1),
    "strided": (128, 32, 16, 32, 3, 2, 1),
    "shortcut 1x1": (128, 16, 32, 64, 1, 2, 1),
    "expansion 1x1": (32, 32, 32, 192, 1, 1, 1),
    "depthwise": (32, 32, 192, 192, 3, 1, 192),
    "depthwise, strided": (32, 32, 144, 144, 3, 2, 144),
}
"""Batch, height and width, inputs, outputs, kernel, stride, groups."""


def programs(layer: Sequence[int], convolve: Any) -> dict[str, tuple[Program, int]]:
    """Return what is timed, compiled, and how many times each computes its result."""
    batch, size, inputs, outputs, width, stride, groups = layer
    kernel_shape = (width, width, inputs // groups, outputs)
    x = jax.random.normal(jax.random.key(0), (batch, size, size, inputs))
    kernel = jax.random.normal(jax.random.key(1), kernel_shape)
    conv = functools.partial(
        convolve,
        window_strides=(stride, stride),
        padding=[(width // 2, width // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    args = (x, kernel, jnp.ones_like(conv(x, kernel)))
    functions: dict[str, Any] = {
        "output": lambda x, kernel, _: conv(x, kernel),
        "input gradient": lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy)[0],
        "weight gradient": lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy)[1],
    }

    def loop(f: Any, *args: chex.Array) -> Any:
        def body(last: chex.Array, _: None) -> tuple[chex.Array, None]:
            c = 1e-30 * last[0, 0, 0, 0]
            return f(*(x + c for x in args)), None

        start = jnp.zeros_like(jax.eval_shape(f, *args))
        return lax.scan(body, start, None, length=LOOP_STEPS)[0]

    timed: dict[str, tuple[Program, int]] = {}
    for name, f in functions.items():
        once = jax.jit(f).lower(*args).compile()
        timed[name] = functools.partial(once, *args), 1
        looped = jax.jit(functools.partial(loop, f)).lower(*args).compile()
        timed[f"{name}, in a loop"] = functools.partial(looped, *args), LOOP_STEPS
    return timed


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table and return the record."""
    parser = Parser(__doc__, rounds=5)
    parser.add_argument("--layer", choices=LAYERS, action="append")
    options = parser.read(arguments)
    print(f"{machine()}\n")
    rows = [["layer", "what", "stock ms", "ours ms", "stock / ours"]]
    for layer in options.layer or LAYERS:
        both: list[Any] = [lax.conv_general_dilated, conv_general_dilated]
        stock, ours = (programs(LAYERS[layer], convolve) for convolve in both)
        for what, (_, times) in ours.items():
            pair = {"stock": stock[what][0], "ours": ours[what][0]}
            seconds = take_turns(pair, options.rounds, slow=SLOW_SECONDS)
            a, b = (1e3 * min(turns) / times for turns in seconds.values())
            rows.append([layer, what, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}"])
    return report(rows, options.out, rows=rows)


if __name__ == "__main__":
    main()
