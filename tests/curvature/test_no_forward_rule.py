"""Losses whose gradient cannot be differentiated forwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import curvature
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")

H = problems.quadratic([8.0, 3.0, 1.0, 0.5, -2.0])
W = np.linspace(-1.0, 1.0, 5)


@jax.custom_vjp
def times_H(w):
    """A layer whose rule calls the layer, as those of libraries do."""
    return jnp.asarray(H) @ w


times_H.defvjp(lambda w: (times_H(w), None), lambda _, t: (jnp.asarray(H) @ t,))


def of_its_own(w):
    return w @ times_H(w) / 2


@jax.custom_vjp
def on_the_host(w):
    """A loss and a gradient that JAX cannot look into."""
    return on_host(lambda w: np.asarray(w @ H @ w / 2), w, ())


def on_host(function, w, shape):
    return jax.pure_callback(
        function, jax.ShapeDtypeStruct(shape, w.dtype), w, vmap_method="sequential"
    )


on_the_host.defvjp(
    lambda w: (on_the_host(w), w),
    lambda w, t: (t * on_host(lambda w: np.asarray(H @ w), w, w.shape),),
)

USES = {
    "hvp": (lambda *a, **o: curvature.hvp(*a, a[1], **o), H @ W),
    "norm": (
        lambda *a, **o: curvature.hessian_norm(*a, direction=jnp.asarray(W), **o),
        np.linalg.norm(H @ W),
    ),
    "top": (lambda *a, **o: curvature.top_eigenvalues(*a, **o).values, [8.0]),
    "layers": (
        lambda *a, **o: [*curvature.layer_eigenvalues(*a, mask=True, **o).values()],
        [8.0],
    ),
    "trace": (
        lambda *a, **o: curvature.trace(*a, deflation=5, **o).whole.value,
        np.trace(H),
    ),
    "density": (
        lambda *a, **o: curvature.spectral_density(*a, **o).nodes[0],
        np.linalg.eigvalsh(H),
    ),
    "change": (
        lambda *a, **o: (
            curvature.loss_change(*a, 2 * a[1], mask=True, **o).whole.predicted
        ),
        1.5 * W @ H @ W,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize(
    ("loss", "hvp", "rtol"),
    [
        (of_its_own, "reverse", 1e-9),
        (of_its_own, "finite_difference", 1e-6),  # rounding over the step, 6e-6
        (on_the_host, "finite_difference", 1e-6),
    ],
)
def test_there_is_another_way(name, loss, hvp, rtol):
    use, expected = USES[name]
    found = use(loss, jnp.asarray(W), hvp=hvp)
    np.testing.assert_allclose(found, expected, rtol=rtol)


@pytest.mark.parametrize(
    ("loss", "hvp", "error", "ways"),
    [
        (of_its_own, "exact", TypeError, ["hvp='reverse'", "hvp='finite_difference'"]),
        (on_the_host, "exact", ValueError, ["hvp='reverse'", "hvp='finite"]),
        (on_the_host, "reverse", ValueError, ["hvp='finite_difference'"]),
    ],
)
def test_the_error_names_it(loss, hvp, error, ways):
    for use, _ in USES.values():
        with pytest.raises(error) as raised:
            use(loss, jnp.asarray(W), hvp=hvp)
        note = "".join(raised.value.__notes__)
        assert note.count("hero_jax: ") == 1
        assert all(way in note for way in ways)


def test_a_loss_without_any_gradient_is_not_told_of_a_way():
    loss = lambda w: jax.pure_callback(
        lambda w: w.sum(), jax.ShapeDtypeStruct((), w.dtype), w
    )
    with pytest.raises(ValueError, match="callbacks do not support JVP") as raised:
        curvature.trace(loss, jnp.asarray(W))
    assert "hero_jax: " not in "".join(getattr(raised.value, "__notes__", []))


@pytest.mark.parametrize("hvp", ["reverse", "finite_difference"])
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_the_same_matrix_and_mean_over_batches(hvp, matrix):
    x = np.random.default_rng(0).normal(size=(7, 5))
    loss = curvature.ComposedLoss(
        lambda w, x: jnp.tanh(x @ w), lambda y, x: jnp.mean(jnp.cosh(y - x[:, 0]))
    )
    v = jnp.asarray(W[::-1])
    options = {"matrix": matrix, "batch_size": 3}
    expected = curvature.hvp(loss, jnp.asarray(W), v, x, **options)
    found = curvature.hvp(loss, jnp.asarray(W), v, x, hvp=hvp, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_a_difference_along_nothing_is_nothing_and_zero_weights_have_a_step():
    w = jnp.zeros(5)
    zero = curvature.hvp(of_its_own, w, w, hvp="finite_difference")
    np.testing.assert_array_equal(zero, 0.0)
    found = curvature.hvp(of_its_own, w, jnp.asarray(W), hvp="finite_difference")
    np.testing.assert_allclose(found, H @ W, rtol=1e-6)
    with pytest.raises(ValueError, match=r"hvp must be one of .*'reverse'.*'approx'"):
        curvature.hvp(of_its_own, w, w, hvp="approx")
