"""The quadratic model of a change of the weights, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, quant
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 3])
def test_predicted_and_measured_change_of_every_layer(dense, batch_size):
    moved = quant.fake_quantize(dense.params, bits=3, mask=True)
    change = curvature.loss_change(
        problems.mlp_loss,
        dense.params,
        moved,
        *dense.args,
        mask=True,
        batch_size=batch_size,
    )
    d = np.asarray(ravel_pytree(moved)[0]) - dense.W
    loss = lambda w: float(
        problems.mlp_loss(dense.unravel(jnp.asarray(w)), *dense.args)
    )
    parts = [np.zeros_like(d) for _ in dense.slices]
    for part, i in zip(parts, dense.slices, strict=True):
        part[i] = d[i]
    changes = [change.whole, *change.layers.values()]
    for found, d in zip(changes, [sum(parts), *parts], strict=True):
        np.testing.assert_allclose(
            found.first_order, dense.g @ d, rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            found.second_order, d @ dense.H @ d / 2, rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            found.measured, loss(dense.W + d) - loss(dense.W), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            found.predicted, found.first_order + found.second_order
        )


def test_prediction_becomes_exact_for_small_moves(dense):
    """The error of the quadratic model is of third order."""
    errors = []
    for size in (1e-2, 1e-3):
        moved = jax.tree.map(lambda x, size=size: x * (1.0 + size), dense.params)
        whole = curvature.loss_change(
            problems.mlp_loss, dense.params, moved, *dense.args
        ).whole
        errors.append(abs(whole.predicted - whole.measured))
    assert errors[1] < 2e-3 * errors[0]


def test_bad_arguments():
    w = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="moved must have the tree structure"):
        curvature.loss_change(lambda w: 0.0, w, {"kernel": w})
    with pytest.raises(ValueError, match="mask must choose a leaf"):
        curvature.loss_change(lambda w: 0.0, w, w, mask=False)
