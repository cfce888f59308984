"""One quantized array against Theorem 2's promise and a grid written out in numpy."""

import dataclasses
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hero_jax.quant import (
    QuantizedArray,
    _blocks,
    _grid,
    fake_quantize_array,
    quantize_array,
)
from tests.quant import reference

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)

every_width = pytest.mark.parametrize("bits", WIDTHS)
every_scheme = pytest.mark.parametrize("scheme", ["affine", "symmetric"])
SHAPES = ((), (0,), (1,), (6,), (3, 0), (5, 4), (1, 6), (2, 3, 5))
"""A few, as every other one would be compiled anew."""

arrays = hnp.arrays(
    np.float32,
    st.sampled_from(SHAPES),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


def nearest_level(x, scale, zero_point, bits):
    """The nearest level by exhaustive search in double precision."""
    levels = scale.item() * (np.arange(2**bits) - zero_point.item())
    return levels[np.abs(x.ravel()[:, None] - levels).argmin(1)].reshape(x.shape)


def ulp(x):
    """Spacing of float32 numbers at the largest entry."""
    return np.spacing(np.float32(np.abs(x).max(initial=0.0)))


@settings(deadline=None, max_examples=40)
@given(arrays, st.sampled_from(WIDTHS))
def test_every_entry_moves_by_at_most_half_a_bin(x, bits):
    quantized = quantize_array(jnp.asarray(x), bits)
    assert quantized.values.dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)
    assert quantized.shape == x.shape
    assert int(quantized.values.max(initial=0)) < 2**bits
    restored = np.asarray(quantized.dequantize(), np.float64)
    # Half a bin, the rounding of x / scale and of the product, relative to x.
    scale = float(quantized.scale.max(initial=0.0))
    tolerance = 0.5 * scale * (1 + 1e-5) + 2 * ulp(x)
    assert np.all(np.abs(restored - x) <= tolerance)
    if x.size and x.min() < x.max():
        # The bins are no wider than the range cut into 2^bits - 1 of them, or than
        # the spacing of the floats, or than the least of them.
        width = (float(x.max()) - float(x.min())) / (2**bits - 1)
        tiny = float(np.finfo(x.dtype).tiny)
        assert scale <= max(width * (1 + 1e-6), 2 * ulp(x), tiny)


@st.composite
def arrays_and_options(draw):
    """Any array with any granularity and scheme."""
    x = draw(arrays)
    axes = draw(st.lists(st.integers(0, x.ndim - 1), unique=True)) if x.ndim else []
    options = {"scheme": draw(st.sampled_from(["affine", "symmetric"]))}
    if axes:
        options["axis"] = tuple(axes)
        options["group_size"] = tuple(draw(st.integers(1, 5)) for _ in axes)
    return x, options


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(arrays_and_options(), st.sampled_from(WIDTHS))
def test_half_a_bin_holds_in_every_block(drawn, bits):
    x, options = drawn
    quantized = quantize_array(jnp.asarray(x), bits, **options)
    dataclasses.replace(quantized)  # the checks of construction
    spread = _blocks.spread(quantized.scale, x.shape, quantized.block_shape)
    error = np.abs(np.asarray(quantized.dequantize(), np.float64) - x)
    # The rounding of x / scale, of the product, and of the scale times the integer.
    rounding = 4 * 2.0**-23 * np.abs(x)
    assert np.all(error <= 0.5 * spread * (1 + 1e-5) + rounding)
    levels = 2**bits - (options["scheme"] == "symmetric")
    for _, cut in reference.blocks_of(x.shape, quantized.block_shape):
        assert len(np.unique(quantized.values[cut])) <= levels
        if options["scheme"] == "affine" and x[cut].size:
            assert int(quantized.values[cut].min()) == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(arrays_and_options(), st.sampled_from(WIDTHS))
def test_bins_of_blocks_are_no_wider_than_those_of_the_whole(drawn, bits):
    x, options = drawn
    fine = quantize_array(jnp.asarray(x), bits, **options)
    whole = quantize_array(jnp.asarray(x), bits, scheme=options["scheme"])
    if not x.size:
        return
    # Where a block is all zero, its bins have the width one.
    zero = np.broadcast_to(
        _blocks.reduce_blocks(
            lambda x, axes: jnp.abs(x).max(axes), jnp.asarray(x), fine.block_shape
        )
        == 0.0,
        fine.scale.shape,
    )
    assert np.all(np.asarray(fine.scale)[~zero] <= whole.scale.item() * (1 + 1e-6))


@every_width
@every_scheme
def test_channels_lose_less_than_the_tensor(bits, scheme):
    """Bounds of half a bin, hence also the errors of channels of unlike scales."""
    x = jax.random.normal(jax.random.key(0), (200, 8)) * 2.0 ** jnp.arange(8)
    error = {
        axis: jnp.abs(
            quantize_array(x, bits, scheme=scheme, axis=axis).dequantize() - x
        )
        for axis in (None, -1)
    }
    assert error[-1].max() <= error[None].max() * (1 + 1e-4)
    assert jnp.mean(error[-1] ** 2) < 0.95 * jnp.mean(error[None] ** 2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("offset", [0.0, 0.7, -3.0, 100.0])
def test_equals_the_nearest_level_by_exhaustive_search(bits, offset):
    x = np.random.default_rng(bits).permutation(np.linspace(-1.0, 1.5, 2000)) + offset
    x = x.astype(np.float32).reshape(40, 50)
    quantized = quantize_array(jnp.asarray(x), bits)
    expected = nearest_level(x, quantized.scale, quantized.zero_point, bits)
    error = np.abs(np.asarray(quantized.dequantize()) - x)
    # Equally near at most: a tie may be rounded either way.
    assert np.all(error <= np.abs(expected - x) + 4 * ulp(x))
    assert len(np.unique(quantized.values)) == 2**bits  # no level is lost


@every_width
def test_scale_and_zero_point_are_those_of_the_range(bits):
    x = jnp.array([-1.0, 0.25, 2.0])
    quantized = quantize_array(x, bits)
    np.testing.assert_allclose(quantized.scale, 3.0 / (2**bits - 1), rtol=1e-6)
    assert quantized.zero_point.item() == round((2**bits - 1) / 3)
    assert int(quantized.values[0]) == 0
    assert int(quantized.values[2]) == 2**bits - 1


@every_width
def test_zero_is_on_the_grid(bits):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    x[::3] = 0.0
    restored = quantize_array(jnp.asarray(x), bits).dequantize()
    np.testing.assert_array_equal(restored[::3], 0.0)


@settings(deadline=None, max_examples=40)
@given(arrays_and_options(), st.sampled_from(WIDTHS))
def test_a_second_quantization_changes_nothing(drawn, bits):
    x, options = drawn
    quantized, mirrored = (quantize_array(s * x, bits, **options) for s in (1, -1))
    if options["scheme"] == "affine":
        # A zero point halfway between two levels is rounded to the even one, and the
        # level at one end is then not reached.
        assume(not np.any(quantized.zero_point + mirrored.zero_point - (2**bits - 1)))
    once = quantized.dequantize()
    twice = quantize_array(once, bits, **options).dequantize()
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=float(2 * ulp(x)))


@every_scheme
@every_width
def test_levels_stay_where_they_are_on_the_same_grid(bits, scheme):
    x = jax.random.normal(jax.random.key(0), (1000,))
    once = quantize_array(x, bits, scheme=scheme)
    grids = _grid.Grid(once.scale, 0 if once.zero_point is None else once.zero_point)
    limits = _grid.limits(bits, scheme, jnp.float32)
    np.testing.assert_array_equal(
        grids.integers(once.dequantize(), limits), once.values
    )


@pytest.mark.parametrize("value", [0.0, 3.7, -0.1, 1e-30, -2e30])
@every_width
def test_constant_arrays_are_kept_exactly(value, bits):
    x = jnp.full((2, 3), value, jnp.float32)
    np.testing.assert_array_equal(quantize_array(x, bits).dequantize(), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "shape", "calibration"),
    [
        (scheme, *case)
        for scheme, case in zip(
            itertools.cycle(["affine", "symmetric"]),
            itertools.product(
                [(), (0,), (3, 0), (1,), (1, 1, 1)], ["minmax", "percentile", "mse"]
            ),
            strict=False,
        )
    ],
)
def test_odd_shapes(scheme, shape, calibration):
    x = jnp.full(shape, 1.5)
    options = {"calibration": calibration, "scheme": scheme}
    quantized = quantize_array(x, 4, **options)
    assert quantized.shape == shape
    assert (quantized.ndim, quantized.size) == (x.ndim, x.size)
    np.testing.assert_allclose(quantized.dequantize(), x, rtol=1e-6)
    rounded = fake_quantize_array(x, 4, **options)
    assert rounded.shape == shape
    many = jax.vmap(lambda x: fake_quantize_array(x, 4, **options))(jnp.stack([x, x]))
    assert many.shape == (2, *shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_returns(dtype):
    x = jax.random.normal(jax.random.key(0), (100,), dtype)
    quantized = quantize_array(x, 8)
    restored = quantized.dequantize()
    assert restored.dtype == dtype
    assert quantized.scale.dtype == jnp.float32
    # Half a bin, then the rounding of the restored value to its dtype.
    rounding = float(jnp.finfo(dtype).eps) * np.abs(np.asarray(x, np.float64))
    error = np.abs(np.asarray(restored, np.float64) - np.asarray(x, np.float64))
    assert np.all(error <= 0.5 * quantized.scale.item() * (1 + 1e-5) + rounding)


@pytest.mark.usefixtures("x64")
def test_float64_keeps_its_precision():
    x = 1.0 + 1e-9 * jnp.linspace(0.0, 1.0, 256)  # a constant in float32
    quantized = quantize_array(x, 8)
    assert quantized.dequantize().dtype == jnp.float64
    assert len(np.unique(quantized.values)) == 256
    np.testing.assert_allclose(quantized.dequantize(), x, atol=1e-9 / 255)


def test_is_a_pytree_node_that_passes_through_jit_and_vmap():
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    one_by_one = [quantize_array(row, 4).dequantize() for row in x]
    together = jax.jit(jax.vmap(lambda row: quantize_array(row, 4)))(x)
    assert isinstance(together, QuantizedArray)
    assert together.values.shape == x.shape
    np.testing.assert_array_equal(
        jax.vmap(QuantizedArray.dequantize)(together), together.dequantize()
    )
    restored = together.dequantize()
    np.testing.assert_allclose(restored, jnp.stack(one_by_one), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(
        ValueError, match=rf"bits must be an integer from 2 to 8, or 16, got {bits}"
    ):
        quantize_array(jnp.ones(3), bits)


def test_integers_of_any_kind_are_bits():
    for bits in (4, np.int64(4), np.array(4), jnp.int32(4)):
        assert quantize_array(jnp.ones(3), bits).bits == 4


@pytest.mark.parametrize("bits", [4.0, "4", None, (4,)])
def test_bits_of_another_type_are_named(bits):
    with pytest.raises(
        TypeError, match=r"bits must be an integer from 2 to 8, or 16, got"
    ):
        quantize_array(jnp.ones(3), bits)


@every_scheme
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        *((jnp.float32, bits) for bits in (3, 16)),
        (jnp.float16, 4),
        *(
            pytest.param(dtype, bits, marks=pytest.mark.slow)
            for dtype, bits in [
                *((jnp.float32, bits) for bits in (2, 4, 5, 6, 7, 8)),
                *((jnp.bfloat16, 4), (jnp.bfloat16, 16), (jnp.float16, 16)),
            ]
        ),
    ],
)
def test_fake_quantization_is_the_round_trip_for_traced_bits_too(bits, scheme, dtype):
    x = jax.random.normal(jax.random.key(0), (7, 10), dtype)
    for options in ({}, {"axis": -1}, {"axis": 0, "group_size": 3}):
        options = {"scheme": scheme, **options}
        expected = quantize_array(x, bits, **options).dequantize()
        actual = fake_quantize_array(x, bits, **options)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)
        traced = jax.jit(lambda x, b, o=options: fake_quantize_array(x, b, **o))
        np.testing.assert_array_equal(traced(x, bits), expected)


def test_one_program_serves_all_bits_alone_and_at_once():
    x = jax.random.normal(jax.random.key(0), (7, 10))
    traces = []

    @jax.jit
    def round_to(bits):
        traces.append(None)
        return fake_quantize_array(x, bits, axis=-1, calibration="mse")

    one_by_one = jnp.stack([round_to(bits) for bits in WIDTHS])
    assert len(traces) == 1
    for sweep in (jax.vmap(round_to), lambda bits: jax.lax.map(round_to, bits)):
        np.testing.assert_allclose(
            sweep(jnp.array(WIDTHS)), one_by_one, rtol=1e-6, atol=1e-7
        )


@every_width
def test_the_largest_floats_do_not_overflow(bits):
    largest = np.finfo(np.float32).max
    x = jnp.array([-largest, -0.5 * largest, 0.0, 0.4 * largest, largest])
    for scheme in ("affine", "symmetric"):
        quantized = quantize_array(x, bits, scheme=scheme)
        restored = np.asarray(quantized.dequantize(), np.float64)
        error = np.abs(restored - np.asarray(x, np.float64))
        assert np.all(error <= 0.5 * float(quantized.scale.item()) * (1 + 1e-2))
    half = jnp.array([-65504.0, 60000.0, 65504.0], jnp.float16)
    for scheme in ("affine", "symmetric"):
        restored = quantize_array(half, bits, scheme=scheme).dequantize()
        assert np.isfinite(restored).all()


def test_slices_and_stacks_keep_their_grids():
    x = jax.random.normal(jax.random.key(0), (6, 4, 10))
    layers = quantize_array(x, 4, axis=(0, -1), group_size=(1, 3))
    _, scanned = jax.lax.scan(lambda _, x: (None, x.dequantize()), None, layers)
    np.testing.assert_array_equal(scanned, layers.dequantize())
    np.testing.assert_array_equal(
        jax.vmap(QuantizedArray.dequantize)(layers), layers.dequantize()
    )
    one = jax.tree.map(lambda a: a[2], layers)
    np.testing.assert_array_equal(one.dequantize(), layers.dequantize()[2])


def test_pieces_that_cut_through_blocks_are_refused():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    grouped = quantize_array(x, 4, axis=0, group_size=2)
    piece = jax.tree.map(lambda a: a[:2], grouped)
    joined = jax.tree.map(lambda a: jnp.concatenate([a, a[:3]]), grouped)
    for wrong in (piece, joined):
        with pytest.raises(ValueError, match="scale must have shape"):
            wrong.dequantize()


def test_numpy_does_not_make_an_array_of_objects():
    quantized = quantize_array(jnp.ones(3), 4)
    with pytest.raises(TypeError, match=r"by its method dequantize\(\)"):
        np.asarray(quantized)


def test_the_derivative_is_zero_also_where_the_range_is_set():
    for calibration in ("minmax", "percentile", "mse"):
        for x in (jnp.array([-1.0, 0.2, 3.0]), jnp.zeros(3)):
            g = jax.grad(
                lambda x, c=calibration: fake_quantize_array(x, 4, calibration=c).sum()
            )(x)
            np.testing.assert_array_equal(g, 0.0)


def test_exported_functions_take_quantized_arrays():
    quantized = quantize_array(jax.random.normal(jax.random.key(0), (3, 8)), 4, axis=-1)
    exported = jax.export.export(jax.jit(lambda q: q.dequantize().sum(0)))(quantized)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(quantized), exported.call(quantized))


def good():
    """An array of two channels, affine, of 3 bits."""
    return QuantizedArray(
        values=jnp.array([[0, 7], [3, 1]], jnp.uint8),
        scale=jnp.ones((1, 2)),
        zero_point=jnp.array([[-4, 12]], jnp.int32),
        bits=3,
        dtype=np.dtype(np.float32),
        block_shape=(2, 1),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"values": jnp.array([[0, 8], [0, 0]], jnp.uint8)},
            "values must be from 0 to 7",
        ),
        ({"values": jnp.zeros((2, 2), jnp.int8)}, "values must have .* dtype uint8"),
        ({"values": jnp.zeros((2, 3), jnp.uint8)}, r"scale must have shape \(1, 3\)"),
        (
            {"scale": jnp.ones((1, 1))},
            r"scale must have shape \(1, 2\) and dtype float32",
        ),
        ({"scale": jnp.ones((1, 2), jnp.bfloat16)}, "got .* and bfloat16"),
        ({"scale": jnp.array([[1.0, 0.0]])}, "scale must be positive and finite"),
        ({"scale": jnp.array([[1.0, jnp.nan]])}, "scale must be positive and finite"),
        ({"zero_point": jnp.ones((1, 2))}, "zero_point must have .* dtype int32"),
        ({"zero_point": None}, "values must have .* dtype int8"),
        ({"bits": 2}, "values must be from 0 to 3 with bits=2, affine; got 0 to 7"),
        ({"bits": 16}, "values must have .* dtype uint16"),
        (
            {"dtype": np.dtype(np.int32)},
            "dtype must have one of the dtypes float16, bf",
        ),
        ({"dtype": np.float32}, "dtype must have one of the dtypes"),
        ({"block_shape": (2, 0)}, "block_shape must be a tuple of integers >= 1"),
        ({"block_shape": [2, 1]}, "block_shape must be a tuple of integers >= 1"),
        ({"block_shape": (1, 1)}, r"scale must have shape \(2, 2\)"),
    ],
)
def test_construction_checks_the_invariants(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(good(), **change)


def test_what_jax_rebuilds_is_not_checked():
    """Placeholders stand in for arrays in many a transformation."""
    node = good()
    assert jax.tree.map(lambda _: "x", node).values == "x"
    assert jax.tree.structure(node) == jax.tree.structure(good())
    assert jax.eval_shape(lambda q: q, node).values.shape == (2, 2)
    jax.tree.map(lambda *_: None, node, good())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scheme": "linear"},
            ValueError,
            r"scheme must be one of \['affine', 'affine_with_zero', 'symmet",
        ),
        (
            {"calibration": "max"},
            ValueError,
            r"calibration must be one of \['minmax', '",
        ),
        ({"percentile": 99}, ValueError, "percentile needs calibration='percentile'"),
        (
            {"calibration": "percentile", "percentile": 50},
            ValueError,
            "percentile must be above 50 and at most 100, got 50",
        ),
        ({"axes": 1}, TypeError, "unknown options \\['axes'\\]; known are \\['axis'"),
        ({"axis": 1}, ValueError, "axis 1 is out of bounds for array of dimension 1"),
    ],
)
def test_options_are_named(options, error, message):
    for quantizer in (quantize_array, fake_quantize_array):
        with pytest.raises(error, match=message):
            quantizer(jnp.ones(3), 4, **options)


def test_input_that_is_not_real_is_named():
    for bad in (jnp.arange(3), jnp.ones(3, jnp.complex64), "x"):
        with pytest.raises(TypeError, match="x must have real floating-point arrays"):
            quantize_array(bad, 4)
    with pytest.raises(
        TypeError, match="x must have one of the dtypes float16, bfloat"
    ):
        quantize_array(jnp.ones(3, jnp.float8_e4m3fn), 4)


def test_traced_bits_are_scalar_integers():
    with pytest.raises(
        TypeError, match="Got a traced array; fake_quantize takes traced i"
    ):
        jax.jit(lambda b: fake_quantize_array(jnp.ones(3), b))(4.0)
    with pytest.raises(TypeError, match=r"bits must be .* got int32 of shape \(2,\)"):
        fake_quantize_array(jnp.ones(3), jnp.array([4, 5]))
    with pytest.raises(ValueError, match=r"bits must be an integer .* got 9"):
        fake_quantize_array(jnp.ones(3), jnp.array(9))
    with pytest.raises(TypeError, match=r"known before tracing.*fake_quantize takes"):
        jax.jit(lambda b: quantize_array(jnp.ones(3), b))(4)
