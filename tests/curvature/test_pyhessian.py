"""The same numbers as PyHessian, on the same weights and batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hero_jax import curvature, models
from tests.curvature.pyhessian_reference import BATCH_SIZE, REFERENCE, draw

IN_A_HURRY = False  # hundreds of products in a loop
pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(w, x, labels):
    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return models.conv_general_dilated(  # JAX's is 30 times slower in a loop
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    x = jax.nn.relu(conv(x, w["conv1"]) + w["bias1"])
    x = jax.nn.relu(conv(x, w["conv2"]) + w["bias2"])
    logits = x.mean((1, 2)) @ w["dense"] + w["bias3"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def problem():
    return jax.tree.map(jnp.asarray, draw())


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("batch", None),
        pytest.param("loader", BATCH_SIZE, marks=pytest.mark.slow),
    ],
)
def test_eigenvalues(name, batch_size):
    top = curvature.top_eigenvalues(
        loss_fn, *problem(), k=2, which="magnitude", steps=40, batch_size=batch_size
    )
    # PyHessian's unit vectors are x / (||x|| + 1e-6), a millionth too short, and
    # its power iteration stops at a relative change of 1e-12.
    reference = np.array(json.loads(REFERENCE.read_text())[name]["eigenvalues"])
    np.testing.assert_allclose(top.values, reference * (1.0 + 1e-6) ** 2, rtol=1e-8)


@pytest.mark.slow
def test_trace():
    reference = json.loads(REFERENCE.read_text())
    trace = curvature.trace(loss_fn, *problem(), num_samples=300, deflation=60).whole
    error = np.hypot(trace.stderr, reference["trace_stderr"])
    assert abs(trace.value - reference["trace"]) < 4 * error
    assert error < 0.02 * reference["trace"]
