"""Hessian-vector products against matrices with prescribed eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax._autodiff import gradient_and_hvp
from tests.problems import mlp_batch, mlp_loss, mlp_params, quadratic


@pytest.mark.usefixtures("x64")
def test_product_on_a_quadratic():
    A = quadratic([10.0, 3.0, -1.0, 0.0])
    W, v = jnp.arange(4.0), jnp.array([1.0, -2.0, 0.5, 3.0])
    gradient, hvp, aux = gradient_and_hvp(lambda w: (A @ w, jnp.sum(w)), W)
    np.testing.assert_allclose(gradient, A @ W, rtol=1e-14)
    np.testing.assert_allclose(hvp(v), A @ v, rtol=1e-14)
    assert float(aux) == 6.0


@pytest.mark.usefixtures("x64")
def test_product_crosses_layers():
    """The Hessian is that of the whole tree, not block diagonal."""
    params, batch = mlp_params(), mlp_batch()
    _, hvp, _ = gradient_and_hvp(
        lambda p: (jax.grad(mlp_loss)(p, *batch), None), params
    )
    v = jax.tree.map(jnp.zeros_like, params)
    v["out"]["kernel"] = jnp.ones_like(v["out"]["kernel"])
    dense = jax.jit(jax.hessian(mlp_loss))(params, *batch)
    dense = dense["hidden"][0]["kernel"]["out"]["kernel"]
    product = hvp(v)["hidden"][0]["kernel"]
    assert jnp.linalg.norm(product) > 0.1
    np.testing.assert_allclose(product, dense.sum((2, 3)), rtol=1e-10, atol=1e-12)


def test_the_loss_is_traced_once():
    """Linearization yields gradient and product together: nothing is recomputed."""
    traces = []

    def grad_fn(w):
        traces.append(None)
        return jnp.sin(w), None

    gradient, hvp, _ = gradient_and_hvp(grad_fn, jnp.array(0.5))
    hvp(jnp.array(1.0)), hvp(jnp.array(2.0))
    assert len(traces) == 1
    np.testing.assert_allclose(gradient, np.sin(0.5), rtol=1e-6)
