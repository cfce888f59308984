"""The same numbers as PyHessian, on the same weights and batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from hero_jax import curvature
from tests.curvature.pyhessian_reference import BATCH_SIZE, REFERENCE, draw

pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(w, x, labels):
    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    x = jax.nn.relu(conv(x, w["conv1"]) + w["bias1"])
    x = jax.nn.relu(conv(x, w["conv2"]) + w["bias2"])
    logits = x.mean((1, 2)) @ w["dense"] + w["bias3"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_eigenvalues_and_trace():
    reference = json.loads(REFERENCE.read_text())
    problem = jax.tree.map(jnp.asarray, draw())
    for name, batch_size in (("batch", None), ("loader", BATCH_SIZE)):
        top = curvature.top_eigenvalues(
            loss_fn, *problem, k=2, which="magnitude", steps=40, batch_size=batch_size
        )
        # PyHessian's unit vectors are x / (||x|| + 1e-6), a millionth too short, and
        # its power iteration stops at a relative change of 1e-12.
        expected = np.array(reference[name]["eigenvalues"]) * (1.0 + 1e-6) ** 2
        np.testing.assert_allclose(top.values, expected, rtol=1e-8)
    trace = curvature.trace(loss_fn, *problem, num_samples=300, deflation=60).whole
    error = np.hypot(trace.stderr, reference["trace_stderr"])
    assert abs(trace.value - reference["trace"]) < 4 * error
    assert error < 0.02 * reference["trace"]
