"""Every option of the grids against exhaustive search in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax.quant import fake_quantize_array, quantize_array
from hero_jax.quant._blocks import block_shape_of
from tests.quant import reference

SCHEMES = ("affine", "symmetric")
LAYOUTS = {
    "tensor": {},
    "channel": {"axis": -1},
    "rows": {"axis": 0},
    "groups": {"axis": -1, "group_size": 4},  # of 10: the last has two
    "tiles": {"axis": (0, 1), "group_size": (5, 3)},
}


def draw(seed=0, shape=(12, 10), offset=0.0):
    """Weights with a few outliers on one side."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + offset
    x.flat[:: x.size // 3] += 4.0
    return x.astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    "bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4, 8))]
)
def test_equals_exhaustive_search(bits, calibration, scheme, layout):
    x = draw(seed=bits)
    percent = {"percentile": 95.0} if calibration == "percentile" else {}
    quantized = quantize_array(
        jnp.asarray(x),
        bits,
        scheme=scheme,
        calibration=calibration,
        **percent,
        **LAYOUTS[layout],
    )
    block_shape = block_shape_of(
        x.shape, LAYOUTS[layout].get("axis"), LAYOUTS[layout].get("group_size")
    )
    expected, scales = reference.quantize(
        x, bits, scheme, calibration, block_shape, *percent.values()
    )
    assert quantized.scale.shape == scales.shape
    restored = np.asarray(quantized.dequantize(), np.float64)
    if calibration == "mse":
        # Equal up to choices between clips whose errors differ by rounding.
        for _, cut in reference.blocks_of(x.shape, block_shape):
            error, least = (
                np.mean((y[cut] - x[cut]) ** 2) for y in (restored, expected)
            )
            assert error <= least * (1 + 1e-3) + 1e-12
        return
    np.testing.assert_allclose(quantized.scale, scales, rtol=1e-5)
    # As near as the nearest level; a tie may go either way.
    error, least = (np.abs(y - x) for y in (restored, expected))
    assert np.all(error <= least + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_clips_are_nearly_the_best_of_all_pairs_of_ends(bits, offset):
    """A search over 50 x 50 pairs of ends, which the three line searches stand for."""
    x = draw(shape=(200,), offset=offset)
    ends = np.arange(1, 51) / 50
    pairs = itertools.product(
        x.mean() + ends * (x.min() - x.mean()), x.mean() + ends * (x.max() - x.mean())
    )
    best = min(reference.mean_square_error(x, *pair, bits, "affine") for pair in pairs)
    clipped = fake_quantize_array(jnp.asarray(x), bits, calibration="mse")
    error = np.mean((np.asarray(clipped) - x) ** 2)
    whole = fake_quantize_array(jnp.asarray(x), bits)
    assert error <= 1.1 * best
    assert error <= 0.9 * np.mean((np.asarray(whole) - x) ** 2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_clips_are_never_worse_than_the_whole_range_at_any_magnitude(scale, scheme):
    x = draw() / np.float32(8.0) * np.float32(scale)
    errors = {}
    for calibration in ("minmax", "mse"):
        y = fake_quantize_array(
            jnp.asarray(x), 3, scheme=scheme, calibration=calibration
        )
        assert np.isfinite(y).all()
        errors[calibration] = np.mean((np.asarray(y, np.float64) - x) ** 2)
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-6)
    if scale > 1e-38:
        assert errors["mse"] < 0.9 * errors["minmax"]


def test_percentile_one_hundred_is_the_whole_range():
    x = jnp.asarray(draw())
    for scheme in SCHEMES:
        whole = quantize_array(x, 4, scheme=scheme)
        same = quantize_array(
            x, 4, scheme=scheme, calibration="percentile", percentile=100
        )
        np.testing.assert_array_equal(whole.values, same.values)
        np.testing.assert_array_equal(whole.scale, same.scale)


def test_percentile_leaves_the_outliers_out():
    x = np.linspace(-1.0, 1.0, 10_001).astype(np.float32)
    x[::1000] = 1e3
    quantized = quantize_array(jnp.asarray(x), 8, calibration="percentile")
    # 11 of 10,001 are just more than the default's 0.1 %.
    assert quantized.scale.item() > 1.0
    quantized = quantize_array(
        jnp.asarray(x), 8, calibration="percentile", percentile=99.8
    )
    assert quantized.scale.item() < 2.0 / 250


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(bits, scheme):
    x = jnp.asarray(draw(shape=(40,)))
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(
        lambda key: quantize_array(x, bits, scheme=scheme, key=key).dequantize()
    )(keys)
    scale = quantize_array(x, bits, scheme=scheme).scale.item()
    # Between the outermost levels, which lie up to half a bin inside the range.
    inside = np.abs(x) < np.abs(x).max() - scale
    inside &= (x > x.min() + scale) & (x < x.max() - scale)
    bin_and_rounding = scale * (1 + 1e-3) + 1e-6
    assert np.all(np.abs(rounded - x)[:, inside] < bin_and_rounding)
    assert np.all(np.ptp(rounded, axis=0)[inside] < bin_and_rounding)
    # Each mean has a standard error of at most half a bin over sqrt(4000).
    bias = np.abs(rounded.mean(0) - x)[inside] / scale
    # x / scale has a relative rounding error, which 16 bits make visible.
    assert np.all(bias < 5 * 0.5 / np.sqrt(4000) + 2.0**bits * 2e-7)


def test_stochastic_rounding_depends_on_the_key_alone():
    x = jnp.asarray(draw())
    one, same, other = (
        quantize_array(x, 4, key=jax.random.key(seed)).values for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.parametrize("offset", [-6.0, 0.0, 0.3, 6.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_with_zero_is_that_of_other_tools(bits, offset):
    """The formulas of PyTorch's `MinMaxObserver` and `quantize_per_tensor`, quint."""
    x = draw(offset=offset, seed=bits)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    most = 2**bits - 1
    scale = (high - low) / most
    zero_point = np.clip(0 - np.round(low / scale), 0, most)
    values = np.clip(np.round(x.astype(np.float64) / scale) + zero_point, 0, most)
    q = quantize_array(jnp.asarray(x), bits, scheme="affine_with_zero")
    np.testing.assert_allclose(q.scale.item(), scale, rtol=1e-6)
    assert q.zero_point.item() == zero_point
    np.testing.assert_array_equal(q.values, values)
    np.testing.assert_allclose(
        q.dequantize(), (values - zero_point) * scale, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
def test_zero_is_a_level_of_every_block_if_asked_for(calibration):
    x = draw(offset=6.0)
    x[:, 0] -= 6.0
    options = {"calibration": calibration, "axis": -1}
    finer = quantize_array(jnp.asarray(x), 4, **options)
    q = quantize_array(jnp.asarray(x), 4, scheme="affine_with_zero", **options)
    assert finer.zero_point.min() < 0
    assert q.zero_point.min() >= 0
    assert q.zero_point.max() <= 15
    error = [np.square(np.asarray(y.dequantize()) - x).mean(0) for y in (finer, q)]
    assert error[0][0] == error[1][0]  # of both signs: the same
    assert np.all(error[0][1:] < error[1][1:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_halves_go_to_even(scheme):
    # Bins of width one: 15 of them from 0 to 15, or 7 on either side.
    x = jnp.array([0.0, 0.5, 1.5, 2.5, 3.5, 15.0 if scheme == "affine" else 7.0])
    quantized = quantize_array(x, 4, scheme=scheme)
    assert quantized.scale.item() == 1.0
    np.testing.assert_array_equal(quantized.values[:5], [0, 0, 2, 2, 4])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_a_symmetric_grid_is_odd_and_keeps_zero_and_the_ends(bits):
    x = jnp.linspace(-1.0, 1.0, 2 ** (bits + 2) + 1)
    quantized = quantize_array(x, bits, scheme="symmetric")
    assert quantized.zero_point is None
    most = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(np.unique(quantized.values), range(-most, most + 1))
    restored = quantized.dequantize()
    assert restored[x.size // 2] == 0.0
    np.testing.assert_array_equal(restored, -restored[::-1])
    np.testing.assert_allclose(restored[:: x.size - 1], x[:: x.size - 1], rtol=1e-6)
    assert np.all(np.abs(quantized.dequantize() - x) <= 0.5001 * quantized.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_nan_and_the_others_are_not(
    bad, calibration, scheme
):
    x = draw()
    x[3, 2] = bad
    options = {"scheme": scheme, "calibration": calibration, "axis": -1}
    y = np.asarray(fake_quantize_array(jnp.asarray(x), 4, **options))
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(np.delete(y, 2, 1)).all()
