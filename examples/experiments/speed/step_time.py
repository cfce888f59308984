"""Time and memory of a training step: SGD, GRAD-L1, HERO, its parts and options.

    python -m examples.experiments.speed.step_time  # 4 minutes on 2 cores
    python -m examples.experiments.speed.step_time --method "HERO, last layers"
    python -m examples.experiments.speed.step_time --model vgg19_bn --out vgg19_bn.json

The steps are the training recipe's, on random images. All are compiled first, and then
take turns: a step that is not timed, and two that are (four where the penalty comes at
every fourth). The table has the median time over the rounds and its ratio to that of
SGD, the least ratio of a round, images/s, operations and temporary memory as XLA counts
them, and the seconds of compilation. Operations are those of the program as written,
before XLA merges what is equal.

`--host-devices 2` shares a batch out among so many parts of a CPU, each of which runs
the convolutions of its images on one core. `--way` says how several devices are used,
and the table then counts the operations across devices, BatchNorm's included:

    jit         the compiler distributes the program; one perturbation for all images
    pmap        the same, with means that the program takes itself
    pmap local  one perturbation for the images of each device (m-sharpness)

Where glibc is 2.35 or later, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment
spares page faults.
"""

import functools
import os
import re
import time
import types
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from examples.experiments.common.command_line import at_least
from examples.experiments.common.turns import Program, repeated, take_turns
from examples.image_classification import devices as devices_of
from examples.image_classification.config import Config
from examples.image_classification.pipeline import Batch
from examples.image_classification.train import make_program
from hero_jax import models

from .harness import machine, report, speed_parser

K = 4
"""Steps from one penalty to the next; the product takes one K-th of the images."""

NETWORKS = {
    "resnet20": (32, 128, "^(BasicBlock_[678]|classifier)/"),
    "mobilenet_v2": (32, 32, "^(InvertedResidual_1[3-6]|Conv_1|classifier)/"),
    "vgg19_bn": (32, 64, "^(Conv_1[2-5]|classifier)/"),
    "resnet18": (64, 64, "^(BasicBlock_[67]|classifier)/"),
    "transformer": (32, 64, "^(MultiHead.*_3|Dense_[78]|classifier)/"),
    "resnet8": (32, 128, "^(BasicBlock_2|classifier)/"),
}
"""Height and width of the images, images per step, and which layers are the last."""

METHODS: dict[str, dict[str, Any]] = {
    "SGD": {"method": "sgd"},
    "first-order": {"method": "first_order"},
    "GRAD-L1": {"method": "grad_l1"},
    "HERO": {},
    "HERO, finite difference": {"hvp": "finite_difference"},
    "HERO, product over 1/4": {"hvp_examples": "1/K"},
    "HERO, difference over 1/4": {"hvp_examples": "1/K", "hvp": "finite_difference"},
    "HERO, every 4th step": {"penalty_every": K},
    "HERO, difference every 4th step": {"penalty_every": K, "hvp": "finite_difference"},
    "HERO, last layers": {"penalty_layers": "last"},
    "SGD, XLA's convolutions": {"method": "sgd", "stock": True},
    "HERO, XLA's convolutions": {"stock": True},
}
"""What each changes of the recipe's config, and of the network."""

COLLECTIVE = re.compile(
    r" (?:all-(?:reduce|gather|to-all)|reduce-scatter|collective-permute)(?:-start)?\("
)


class Transformer(nn.Module):
    """A small vision transformer: patches of 4x4, four blocks, no BatchNorm."""

    dtype: Any

    @nn.compact
    def __call__(self, images: chex.Array, train: bool) -> chex.Array:
        """Map images `[B, H, W, C]` to logits `[B, 10]`, float32."""
        del train
        self.variable("batch_stats", "none", lambda: jnp.zeros(()))
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        b, h, w, c = images.shape
        x = images.reshape(b, h // 4, 4, w // 4, 4, c).swapaxes(2, 3)
        x = dense(128)(x.reshape(b, -1, 16 * c))
        init = nn.initializers.normal(0.02)
        x = x + self.param("position", init, x.shape[1:]).astype(self.dtype)
        for _ in range(4):
            x = x + nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(norm()(x))
            x = x + dense(128)(nn.gelu(dense(512)(norm()(x))))
        logits = nn.Dense(10, name="classifier")(norm()(x).mean(1))
        return jnp.asarray(logits, jnp.float32)


def make_network(name: str, stock: bool, **options: Any) -> Any:
    """Return a network of ten classes; a stock one has XLA's own convolutions."""
    if name == "transformer":
        return Transformer(options["dtype"])
    convolution = lax.conv_general_dilated if stock else None
    return models.create(
        name, num_classes=10, conv_general_dilated=convolution, **options
    )


def prepare(
    network: str, method: str, size: int, batch: int, way: str = "jit", **options: Any
) -> tuple[Any, Any]:
    """Return the recipe's program, not compiled yet, and random images and labels.

    Raises:
      ValueError: the options of the config do not go together.
    """
    devices = devices_of.choose("jit" if way == "jit" else "pmap", jax.device_count())
    values = {"1/K": max(batch // K, 1), "last": NETWORKS[network][-1]}
    options |= {k: values.get(v, v) for k, v in METHODS[method].items()}
    stock = options.pop("stock", False)
    m = batch // devices.count if way == "pmap local" else None
    options |= {"batch_size": batch, "examples_per_perturbation": m}
    options |= {"perturbation": "layerwise", "reduction": "sum"}
    config = Config(h=1.0, gamma=0.1, **options)
    axis = devices.axis_name if config.normalizes_together else None
    dtype = np.dtype(config.dtype)
    model = make_network(network, stock, dtype=dtype, axis_name=axis)
    pipeline: Any = types.SimpleNamespace(  # as much of one as a step asks for
        devices=devices,
        image_shape=(size, size, 3),
        num_classes=10,
        steps=1,
        batch=lambda item, _: Batch(item[0], item[1], item[1]),
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    item = devices.assemble((images, rng.integers(0, 10, batch, np.int32)))
    return make_program(config, model, pipeline), item


def measure(
    network: str, methods: Sequence[str], rounds: int, **options: Any
) -> dict[str, dict[str, Any]]:
    """Measure the steps of one network; the options are those of `prepare`.

    Returns:
      Per method: seconds per step of each round, images per second, flops, bytes of
      temporary memory on one device, operations across devices, seconds of compilation.
    """
    programs: dict[str, Program] = {}
    results: dict[str, dict[str, Any]] = {}
    prepared = {name: prepare(network, name, **options) for name in methods}
    for name in (bar := tqdm(prepared, desc="compiling", disable=None, leave=False)):
        bar.set_postfix_str(name)
        program, item = prepared[name]
        state = program.init()
        lowered = program.step.lower(state, item)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        programs[name] = repeated(compiled, state, item)
        many = jax.device_count() > 1  # a mean over a single device is none
        results[name] = {
            "compile_seconds": round(seconds, 1),
            "flops": (lowered.cost_analysis() or {}).get("flops"),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "collectives": many and len(COLLECTIVE.findall(compiled.as_text())),
        }
    calls = {name: METHODS[name].get("penalty_every", 2) for name in methods}
    for name, times in take_turns(programs, rounds, calls).items():
        pace = options["batch"] / float(np.median(times))
        results[name] |= {"seconds": times, "images_per_second": pace}
    return results


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of a network."""
    titles = ["method", "median ms", "ratio", "least ratio", "images/s", "Gflop"]
    rows = [[*titles, "temporary MiB", "compile s", "collectives"]]
    baseline = np.array(results["SGD"]["seconds"])
    for name, result in results.items():
        seconds = np.array(result["seconds"])
        flops = result["flops"]
        cells = [
            f"{1e3 * np.median(seconds):.0f}",
            f"{np.median(seconds) / np.median(baseline):.2f}",
            f"{np.min(seconds / baseline):.2f}",
            f"{result['images_per_second']:.0f}",
            "" if flops is None else f"{flops / 1e9:.1f}",
            f"{result['temporary_bytes'] / 2**20:.0f}",
            f"{result['compile_seconds']:.1f}",
            f"{result['collectives']:d}",
        ]
        rows.append([name, *cells])
    return rows if jax.device_count() > 1 else [row[:-1] for row in rows]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    parser = speed_parser(__doc__, rounds=5)
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="resnet20")
    add("--size", type=at_least(1), help="height and width of the images")
    add("--batch", type=at_least(1), help="images per step, of all devices together")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    some = f"beside SGD, may be repeated; all if not given: {'; '.join(METHODS)}"
    add("--method", choices=METHODS, action="append", metavar="NAME", help=some)
    add("--host-devices", type=at_least(1), help="parts of the CPU")
    add("--way", choices=["jit", "pmap", "pmap local"], default="jit")
    options = parser.parse_args(arguments)
    devices_of.divide_host(options.host_devices)
    size, batch, _ = NETWORKS[options.model]
    size, batch = options.size or size, options.batch or batch
    if batch % jax.device_count():
        parser.error(
            f"--batch must be a multiple of the {jax.device_count()} devices, "
            f"got {batch}."
        )
    on_cpu, exact = jax.default_backend() == "cpu", options.dtype != "float32"
    differ = [
        name
        for name, x in METHODS.items()
        if (on_cpu or "stock" not in x) and not (exact and "hvp" in x)
    ]
    methods = ["SGD", *(x for x in options.method or differ if x != "SGD")]
    settings = {"size": size, "batch": batch}
    more = {"dtype": options.dtype, "way": options.way}
    try:
        results = measure(options.model, methods, options.rounds, **settings, **more)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.model}, {settings | more}, {machine()}\n")
    return report(
        table(results),
        options.out,
        glibc_tunables=os.environ.get("GLIBC_TUNABLES", ""),
        **more,
        networks={options.model: settings | {"methods": results}},
    )


if __name__ == "__main__":
    main()
