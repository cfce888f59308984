"""Blocks against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_jax.quant import _blocks
from tests.quant import reference


@st.composite
def shapes_and_blocks(draw):
    shape = draw(st.lists(st.integers(1, 7), max_size=3))
    return tuple(shape), tuple(draw(st.integers(1, n)) for n in shape)


@settings(deadline=None, max_examples=15)
@given(shapes_and_blocks())
def test_every_block_is_reduced_and_spread_by_itself(drawn):
    shape, block_shape = drawn
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    maxima = _blocks.reduce_blocks(jnp.max, jnp.asarray(x), block_shape)
    assert maxima.shape == _blocks.num_blocks(shape, block_shape)
    spread = np.broadcast_to(_blocks.spread(maxima, shape, block_shape), shape)
    for index, cut in reference.blocks_of(shape, block_shape):
        assert maxima[index] == x[cut].max()
        assert np.all(spread[cut] == x[cut].max())


def test_several_results_per_block():
    x = jnp.arange(10.0).reshape(2, 5)
    low, high = _blocks.reduce_blocks(lambda x, a: (x.min(a), x.max(a)), x, (1, 2))
    np.testing.assert_array_equal(low, [[0, 2, 4], [5, 7, 9]])
    np.testing.assert_array_equal(high, [[1, 3, 4], [6, 8, 9]])


def test_leading_axes_may_come_and_go():
    assert _blocks.num_blocks((7, 4, 6), (4, 1)) == (7, 1, 6)
    assert _blocks.num_blocks((6,), (4, 1)) == (6,)
    assert _blocks.spread(jnp.ones((7, 2, 3)), (7, 4, 6), (2, 2)).shape == (7, 4, 6)
    assert jax.eval_shape(
        lambda s: _blocks.spread(s, (5, 6), (3, 5, 4)), jnp.ones((1, 2))
    ).shape == (1, 6)


@pytest.mark.parametrize(
    ("axis", "group_size", "expected"),
    [
        (None, None, (3, 3, 8, 16)),
        (-1, None, (3, 3, 8, 1)),
        (3, None, (3, 3, 8, 1)),
        ((-2, -1), None, (3, 3, 1, 1)),
        (-1, 4, (3, 3, 8, 4)),
        ((-1, 2), (1, 4), (3, 3, 4, 1)),
        ([-1, 2], [1, 4], (3, 3, 4, 1)),
        ((0, 1), 2, (2, 2, 8, 16)),
        (-1, 100, (3, 3, 8, 16)),
        (np.int64(-1), np.int32(2), (3, 3, 8, 2)),
        ((), None, (3, 3, 8, 16)),
    ],
)
def test_block_shape_of_a_kernel(axis, group_size, expected):
    assert _blocks.block_shape_of((3, 3, 8, 16), axis, group_size) == expected


@pytest.mark.parametrize(
    ("axis", "group_size", "error", "message"),
    [
        (
            2,
            None,
            ValueError,
            r"axis 2 is out of bounds for array of dimension 2",
        ),
        (-3, None, ValueError, r"axis -3 is out of bounds"),
        ((0, -2), None, ValueError, r"repeated axis"),
        (None, 4, ValueError, r"group_size needs the axis .* group_size=4"),
        (0, 0, ValueError, r"group_size must be at least 1, .* got 0"),
        ((0, 1), (1, 2, 3), ValueError, r"group_size must .*one number or one per a"),
    ],
)
def test_misuse_is_named(axis, group_size, error, message):
    with pytest.raises(error, match=message):
        _blocks.block_shape_of((3, 4), axis, group_size)


def test_an_array_without_axes_has_no_channels():
    assert _blocks.block_shape_of((), None, None) == ()
    with pytest.raises(
        ValueError, match="axis -1 is out of bounds for array of dimension 0"
    ):
        _blocks.block_shape_of((), -1, None)
