"""Time the convolutions of `hero_jax.models` against XLA's own, on a CPU.

For each kind of layer in the paper's networks: output, input gradient and weight
gradient, alone and inside a `lax.scan` of three steps, ours and the stock convolution
taking turns within one process. The least time over the rounds counts, since other work
on the machine can only add to it.

    python -m examples.experiments.speed.convolution  # 4 minutes on 2 cores
    python -m examples.experiments.speed.convolution --case dense  # layers whose name has that

Inside the loop a step depends on the one before, so that none is left out, and hands
its whole result on, so that XLA cannot merge what follows with the convolution (a sum
over all of it would be part of ours, never of the stock one). On another backend than
the CPU both columns are the same program.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from hero_jax.models import conv_general_dilated

LOOP_STEPS = 3
SLOW_SECONDS = 0.3
Run = Callable[[], Any]


class Case(NamedTuple):
    """A layer: batch, height and width, inputs, outputs, kernel, stride, groups."""

    batch: int
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int = 1


CASES = {
    "first": Case(128, 32, 3, 16, 3, 1),
    "dense 32x32x16": Case(128, 32, 16, 16, 3, 1),
    "dense 16x16x32": Case(128, 16, 32, 32, 3, 1),
    "dense 8x8x64": Case(128, 8, 64, 64, 3, 1),
    "strided": Case(128, 32, 16, 32, 3, 2),
    "shortcut 1x1": Case(128, 16, 32, 64, 1, 2),
    "expansion 1x1": Case(32, 32, 32, 192, 1, 1),
    "depthwise": Case(32, 32, 192, 192, 3, 1, 192),
    "depthwise, strided": Case(32, 32, 144, 144, 3, 2, 144),
}


def functions(
    case: Case, convolve: Callable[..., chex.Array]
) -> dict[str, tuple[Run, int]]:
    """Return what is timed, compiled, and how many times each computes its sum."""
    shape = (case.kernel, case.kernel, case.inputs // case.groups, case.outputs)
    x = jax.random.normal(
        jax.random.key(0), (case.batch, case.size, case.size, case.inputs)
    )
    kernel = jax.random.normal(jax.random.key(1), shape)
    pad = case.kernel // 2
    conv = functools.partial(
        convolve,
        window_strides=(case.stride,) * 2,
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=case.groups,
    )
    dy = jnp.ones_like(conv(x, kernel))

    def output(x: chex.Array, kernel: chex.Array, _: chex.Array) -> chex.Array:
        return conv(x, kernel)

    def input_gradient(x: chex.Array, kernel: chex.Array, dy: chex.Array) -> Any:
        return jax.vjp(lambda x: conv(x, kernel), x)[1](dy)[0]

    def weight_gradient(x: chex.Array, kernel: chex.Array, dy: chex.Array) -> Any:
        return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](dy)[0]

    timed: dict[str, tuple[Run, int]] = {}
    for name, function in {
        "output": output,
        "input gradient": input_gradient,
        "weight gradient": weight_gradient,
    }.items():

        def loop(
            x: chex.Array, kernel: chex.Array, dy: chex.Array, f: Any = function
        ) -> Any:
            def body(last: chex.Array, _: None) -> tuple[chex.Array, None]:
                c = 1e-30 * last[0, 0, 0, 0]
                return f(x + c, kernel + c, dy + c), None

            start = jnp.zeros_like(jax.eval_shape(f, x, kernel, dy))
            return lax.scan(body, start, None, length=LOOP_STEPS)[0]

        for where, f, times in (("", function, 1), (", in a loop", loop, LOOP_STEPS)):
            compiled = jax.jit(f).lower(x, kernel, dy).compile()
            timed[name + where] = functools.partial(compiled, x, kernel, dy), times
    return timed


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the least seconds of ours and of the stock convolution, by function."""
    ours = functions(case, conv_general_dilated)
    stock = functions(case, lax.conv_general_dilated)
    least = {}
    for name in ours:
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for i, (run, times) in enumerate((ours[name], stock[name])):
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[i].append((time.perf_counter() - start) / times)
            if max(seconds[0][-1], seconds[1][-1]) > SLOW_SECONDS:
                break  # once is enough to see that
        least[name] = (min(seconds[0]), min(seconds[1]))
    return least


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="", help="part of the name of a layer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    chosen = {name: case for name, case in CASES.items() if options.case in name}
    if not chosen:
        parser.error(f"--case must be part of one of {[*CASES]}, got {options.case!r}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    print("| layer | what | stock ms | ours ms | stock / ours |\n|---|---|---|---|---|")
    for name, case in chosen.items():
        for what, (ours, stock) in measure(case, options.rounds).items():
            print(
                f"| {name} | {what} | {1e3 * stock:.1f} | {1e3 * ours:.1f} "
                f"| {stock / ours:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
