"""The benchmark of a step: what it measures, and that methods are what they say."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.fixture(scope="module")
def variants():
    from examples.experiments.speed import step_variants

    return step_variants


@pytest.mark.slow
def test_table_and_record_hold_the_methods_that_are_asked_for(tmp_path):
    options = ("--model=resnet8", "--size=8", "--batch=4", "--rounds=2", "--quiet")
    asked = ("--method=HERO, every 4th step", f"--out={tmp_path / 'out.json'}")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "step_time.py"), *options, *asked],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[5:]]
    assert rows == ["SGD", "HERO, every 4th step"]
    record = json.loads((tmp_path / "out.json").read_text())
    methods = record["networks"]["resnet8"]["methods"]
    assert [*methods] == rows
    for result in methods.values():
        assert len(result["seconds"]) == 2
        median = np.median(result["seconds"])
        np.testing.assert_allclose(result["images_per_second"], 4 / median)
        assert result["flops"] > 0
        assert result["temporary_bytes"] > 0
    # The branch with the penalty counts like one that is taken.
    assert methods[rows[1]]["flops"] > 3 * methods["SGD"]["flops"]
    assert record["environment"]["devices"] == 1


def test_refuses_a_batch_that_devices_cannot_share():
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "step_time.py"),
            *("--model=resnet8", "--batch=3", "--host-devices=2"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--batch must be a multiple of the 2 devices, got 3." in done.stderr


@pytest.mark.slow
def test_every_method_differentiates_the_same_loss(variants):
    """The transformer is smooth and has no BatchNorm."""
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    labels = jnp.arange(8) % 10
    model = variants.Transformer(num_classes=10, features=8, blocks=1)
    variables = model.init(jax.random.key(1), images, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    loss_fn = variants.make_loss(model)

    @functools.cache
    def gradient(name, count=0):
        method = variants.METHODS[name]
        step = method.make(loss_fn, "transformer", 8)
        (loss, _), grads = jax.jit(step)(count, params, stats, images, labels)
        np.testing.assert_allclose(loss, loss_fn(params, stats, images, labels)[0])
        return np.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    def distance(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    first_order = gradient("first-order")
    penalty = gradient("HERO") - first_order
    assert np.linalg.norm(penalty) > 0.01 * np.linalg.norm(first_order)
    for name in ("HERO, checkpoint products", "HERO, checkpoint nothing"):
        assert distance(gradient(name), gradient("HERO")) < 1e-4
    approximate = gradient("HERO, finite difference") - first_order
    assert distance(approximate, penalty) < 0.2  # the step is one for rectifiers
    for name in ("HERO, product over 1/4", "HERO, last layers"):
        assert distance(gradient(name) - first_order, penalty) > 0.1
    every = "HERO, every 4th step"
    assert distance(gradient(every, 1), first_order) < 1e-5
    assert distance(gradient(every, 4) - first_order, 4 * penalty) < 1e-3


@pytest.mark.parametrize(
    "network",
    [
        "resnet20",
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("vgg19_bn", marks=pytest.mark.slow),
    ],
)
def test_last_layers_are_some_of_them(variants, network):
    model = variants.create(network, jnp.float32, None)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    seen = {}

    def hero(_, *, penalty_mask, **__):
        seen.update(penalty_mask(shapes["params"]))

    original, variants.HERO = variants.HERO, hero
    try:
        variants.METHODS["HERO, last layers"].make(None, network, 8)
    finally:
        variants.HERO = original
    weights = [x.ndim >= 2 for x in jax.tree.leaves(shapes["params"])]
    chosen = jax.tree.leaves(seen)
    assert 0 < sum(chosen) < sum(weights) / 2
    assert all(w for c, w in zip(chosen, weights, strict=True) if c)


def test_no_convolution_is_computed_twice(variants):
    """ResNet20 has 19 of 3x3: three each per gradient, six per product, on CPUs.

    Images are not differentiated: that saves one per gradient, four per product.
    """
    images, labels = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2, int)

    def count(name):
        method = variants.METHODS[name]
        model, loss_fn = variants.loss_of("resnet20", jnp.float32, method)
        shapes = jax.eval_shape(
            lambda: model.init(jax.random.key(0), images, train=False)
        )
        step = jax.jit(method.make(loss_fn, "resnet20", 2))
        args = (0, shapes["params"], shapes["batch_stats"], images, labels)
        lowered = step.trace(*args).lower(lowering_platforms=("cpu",))
        return lowered.as_text().count("stablehlo.convolution")

    gradient, product = 3 * 19 - 1, 6 * 19 - 4
    assert count("SGD") == gradient
    assert count("HERO") == 2 * gradient + product
    assert count("HERO, checkpoint products") == 2 * gradient + product
    assert count("HERO, finite difference") == 3 * gradient
