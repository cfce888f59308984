"""Norms, masks and names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hero_jax import _tree, leaves


@pytest.mark.slow
@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
    ),
    st.integers(-15, 18),
)
def test_norm_equals_numpy_in_double_precision(x, exponent):
    x = (x * np.float32(10.0) ** exponent).astype(np.float32)
    expected = np.linalg.norm(x.astype(np.float64).ravel())
    # Entries below 1e-37 are flushed to zero by the processor.
    np.testing.assert_allclose(_tree.norm(jnp.asarray(x)), expected, 3e-6, 1e-36)


def test_norm_shows_what_is_not_finite():
    assert jnp.isnan(_tree.norm(jnp.array([1.0, jnp.nan])))
    assert jnp.isinf(_tree.norm(jnp.array([1.0, jnp.inf])))


def test_global_norm_takes_leaves_together():
    assert float(_tree.global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)})) == 5.0
    assert float(_tree.global_norm({})) == 0.0


def test_mask_may_be_a_prefix_a_function_or_missing():
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones((2, 2))}, "b": jnp.ones(3)}
    resolve = lambda mask: _tree.resolve_mask("mask", mask, params)
    everything = {"a": {"x": True, "y": True}, "b": True}
    assert resolve(None) == resolve(True) == everything
    assert resolve({"a": True, "b": np.False_}) == {**everything, "b": False}
    two_axes = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    assert resolve(two_axes) == {"a": {"x": False, "y": True}, "b": False}
    assert _tree.resolve_mask("mask", None, params, default=two_axes) == resolve(
        two_axes
    )


def test_names_are_paths():
    names = _tree.leaf_names({"a": [jnp.ones(1), {"b": jnp.ones(1)}]})
    assert names == ["['a'][0]", "['a'][1]['b']"]
    assert _tree.leaf_names(jnp.ones(1)) == ["the tree itself"]


def test_structure_errors_name_both_trees():
    with pytest.raises(
        ValueError, match="grads must have the tree structure of params"
    ):
        _tree.check_same_structure("grads", {"a": 1.0}, "params", {"b": 1.0})
    with pytest.raises(ValueError, match=r"expected \(2,\) at \['a'\], got \(3,\)"):
        _tree.check_same_structure(
            "grads", {"a": jnp.ones(3)}, "params", {"a": jnp.ones(2)}
        )


def test_mask_may_be_a_tree_that_can_be_called():
    """Modules of Equinox are trees of weights, and functions as well."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        w: object
        b: object

        def __call__(self, x):
            return x @ self.w + self.b

    params = Module(jnp.ones((2, 2)), jnp.ones(2))
    mask = _tree.resolve_mask("mask", Module(True, False), params)
    assert jax.tree.leaves(mask) == [True, False]
    mask = _tree.resolve_mask("mask", leaves.weights, params)
    assert jax.tree.leaves(mask) == [True, False]
    assert _tree.resolve_mask("mask", leaves.weights, params.w) is True
