"""Theorem 3 against the paper's form in 60 digits and against minimisation."""

from decimal import Decimal, getcontext
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_jax import bounds
from tests.problems import quadratic

getcontext().prec = 60
positive = st.floats(1e-6, 1e6)


def literal(slope, curvature, rise):
    """Eq. 6 as printed; with `curvature = n v`, Eq. 7."""
    g, v, c = (Decimal(float(np.float32(x))) for x in (slope, curvature, rise))
    return float(g / v * ((1 + 2 * v * c / g**2).sqrt() - 1))


@settings(deadline=None)
@given(slope=positive, curvature=positive, rise=positive)
def test_l2_bound_equals_the_paper(slope, curvature, rise):
    actual = bounds.l2_bound(slope, curvature, rise)
    # Evaluated literally in float32, Eq. 6 loses all digits for small 2vc / g^2.
    np.testing.assert_allclose(actual, literal(slope, curvature, rise), rtol=2e-6)


@settings(deadline=None)
@given(slope=positive, v=positive, rise=positive, n=st.integers(1, 10**6))
def test_linf_bound_equals_the_paper(slope, v, rise, n):
    actual = bounds.linf_bound(slope, v, rise, n)
    curvature = float(Fraction(float(np.float32(v))) * n)
    g, c = Decimal(float(np.float32(slope))), Decimal(float(np.float32(rise)))
    nv = Decimal(curvature)
    expected = float(g / nv * ((1 + 2 * nv * c / g**2).sqrt() - 1))
    np.testing.assert_allclose(actual, expected, rtol=3e-6)


def test_limits():
    cases = [
        (bounds.l2_bound(4.0, 0.0, 2.0), 0.5),  # c / ||g||
        (bounds.l2_bound(0.0, 4.0, 2.0), 1.0),  # sqrt(2c / v)
        (bounds.linf_bound(0.0, 4.0, 2.0, 4), 0.5),  # Eq. 8
    ]
    for actual, expected in cases:
        np.testing.assert_allclose(actual, expected, rtol=3e-7)  # a few ulps
    assert float(bounds.l2_bound(0.0, 0.0, 1.0)) == np.inf  # flat: nothing raises it
    assert float(bounds.l2_bound(0.0, 0.0, 0.0)) == 0.0
    assert float(bounds.l2_bound(1e30, 1e30, 1e30)) > 0.0  # g^2 overflows


@pytest.mark.usefixtures("x64")
def test_l2_bound_is_attained_on_a_sphere_and_holds_for_any_hessian():
    rng = np.random.default_rng(0)
    g, c = rng.normal(size=4), 0.7
    norm = np.linalg.norm(g)
    # H = v I: the steepest way up is along g, the root of |g| t + v t^2 / 2 = c.
    (root,) = [t for t in np.roots([1.5, norm, -c]) if t > 0]
    np.testing.assert_allclose(bounds.l2_bound(norm, 3.0, c), root, rtol=1e-12)

    H = quadratic([3.0, 1.0, 0.1, -2.0])
    bound = float(bounds.l2_bound(norm, 3.0, c))
    for seed in range(5):
        smallest = scipy.optimize.minimize(
            lambda d: d @ d,
            np.random.default_rng(seed).normal(size=4),
            constraints={"type": "ineq", "fun": lambda d: g @ d + d @ H @ d / 2 - c},
            method="SLSQP",
        )
        assert np.linalg.norm(smallest.x) >= bound - 1e-6


@pytest.mark.usefixtures("x64")
def test_linf_bound_holds_at_every_corner_of_the_cube():
    """On a cube the largest rise is at a corner if H has a nonnegative diagonal."""
    rng = np.random.default_rng(0)
    g, c, n = rng.normal(size=6), 0.7, 6
    H = quadratic([3.0, 2.0, 1.0, 0.5, 0.1, 0.0])
    bound = float(bounds.linf_bound(np.abs(g).sum(), 3.0, c, n))
    corners = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1).T * bound
    rises = corners @ g + np.einsum("ki,ij,kj->k", corners, H, corners) / 2
    assert rises.max() <= c * (1 + 1e-12)
    # H = v 11' and g along 1 attain the bound, with eigenvalue n v in place of v.
    tight = float(bounds.linf_bound(n, 3.0, c, n))
    np.testing.assert_allclose(n * tight + 3.0 * n * tight**2 / 2, c, rtol=1e-12)


def test_broadcasts_and_jits():
    gs, cs = jnp.array([0.0, 1.0, 2.0]), jnp.array([[0.1], [0.2]])
    table = jax.jit(bounds.l2_bound)(gs, 2.0, cs)
    assert table.shape == (2, 3)
    # A flatter or a less steep surface takes a longer step.
    assert jnp.all(jnp.diff(table, axis=1) < 0)
    assert jnp.all(jnp.diff(table, axis=0) > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0, 1.0), r"grad_norm must be >= 0, got -1\.0"),
        ((1.0, -1.0, 1.0), r"max_eigenvalue must be >= 0"),
        ((1.0, 1.0, float("nan")), r"loss_increase must be >= 0, got nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bounds.l2_bound(*arguments)
    with pytest.raises(ValueError, match=message.replace("grad_norm", "grad_l1_norm")):
        bounds.linf_bound(*arguments, 3)
    with pytest.raises(ValueError, match=r"num_nonzero must be >= 0, got -3"):
        bounds.linf_bound(1.0, 1.0, 1.0, -3)


def test_as_many_weights_as_a_large_language_model_has():
    """Three billion exceed a 32-bit integer."""
    np.testing.assert_allclose(
        bounds.linf_bound(0.0, 2.0, 1.0, 3 * 10**9), (3 * 10**9) ** -0.5, rtol=1e-6
    )
