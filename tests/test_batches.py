"""Parts of a batch against slices, and positions against those of `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import _batches


@pytest.mark.parametrize("batch_argnums", [1, -1, -2, (0, 2), [-3, 1]])
def test_positions_are_those_that_jax_differentiates(batch_argnums):
    """A gradient is 1 for an argument that is named, and there is none for others."""
    values = (1.0, 2.0, 4.0)
    argnums = tuple(batch_argnums) if isinstance(batch_argnums, list) else batch_argnums
    named = []
    jax.grad(lambda *args: named.extend(map(is_traced, args)) or sum(args), argnums)(
        *values
    )
    found = _batches.positions(batch_argnums, len(values))
    assert {*found} == {k for k, traced in enumerate(named) if traced}


def is_traced(x):
    return isinstance(x, jax.core.Tracer)


def test_weights_are_no_examples_however_they_are_counted():
    with pytest.raises(ValueError, match=r"weights, .* at argnums=0, got \(0, 1\)"):
        _batches.positions((0, 1), 3, weights=(0,))
    with pytest.raises(ValueError, match=r"weights, .* at argnums=-1, got 2"):
        _batches.positions(2, 3, weights=(-1,))
    with pytest.raises(TypeError, match=r"argument -4, .* got 3 positional"):
        _batches.positions(-4, 3)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 9])
def test_parts_and_what_is_left_are_slices_in_order(convert, size):
    x, y = np.arange(21.0).reshape(7, 3), np.arange(7)
    args = ["weights", {"x": convert(x)}, 0.5, convert(y)]
    parts, rest = _batches.cut(args, (1, 3), size)
    whole = 7 // size
    assert parts[0]["x"].shape == (whole, size, 3)
    for k in range(whole):
        at = slice(k * size, (k + 1) * size)
        np.testing.assert_array_equal(parts[0]["x"][k], x[at])
        np.testing.assert_array_equal(parts[1][k], y[at])
    if 7 % size:
        np.testing.assert_array_equal(rest[0]["x"], x[whole * size :])
        np.testing.assert_array_equal(rest[1], y[whole * size :])
        with_rest = _batches.replaced(args, (1, 3), rest)
        assert (with_rest[0], with_rest[2]) == ("weights", 0.5)
        assert with_rest[1] is rest[0]
    else:
        assert rest is None


def test_an_array_on_the_host_stays_there():
    """A data set goes to the device batch by batch."""
    parts, rest = _batches.cut([np.arange(7)], (0,), 2)
    assert isinstance(parts[0], np.ndarray)
    assert isinstance(rest[0], np.ndarray)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((6, 2)), r"\(1, 2\), .*got the shapes \[\(6, 2\), \(7,\)\]"),
        (np.float32(1.0), r"\(1, 2\), .*got the shapes \[\(\), \(7,\)\]"),
    ],
)
def test_examples_that_do_not_match_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        _batches.number_of_examples([None, {"x": x}, np.zeros(7)], (1, 2))
    with pytest.raises(
        ValueError, match=r"at least one, .*got the shapes \[\(0, 2\)\]"
    ):
        _batches.number_of_examples([np.zeros((0, 2))], (0,))
