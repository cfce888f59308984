"""Ranges and rounding of activations, against a network written out in numpy."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import models, quant
from tests.quant import reference

PATHS = ("Conv_0", "head/Dense_0")


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(inputs=x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), padding="VALID")(x))
        return Head(name="head")(x.reshape(len(x), -1))


def logits_fn(params, images):
    return Net().apply({"params": params}, images)


@functools.cache
def problem():
    """Weights, and ten images of positive entries, the last of them the largest."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
    params = {
        "Conv_0": {"kernel": draw(3, 3, 2, 3), "bias": draw(3) + 9},
        "head": {"Dense_0": {"kernel": draw(27, 4), "bias": draw(4)}},
    }
    images = np.asarray(rng.uniform(1.0, 3.0, (10, 5, 5, 2)), np.float32)
    images[-1] *= 2
    return params, images


def test_programs_live_as_long_as_the_function_and_no_longer():
    params, images = problem()
    runs = []

    def run(offset):
        def apply_fn(params, images):
            runs.append(None)
            return logits_fn(params, images + offset)

        for start in (0, 2):
            quant.activation_ranges(apply_fn, params, images[start : start + 2])
        return weakref.ref(offset), weakref.ref(apply_fn)

    references = [ref for k in range(3) for ref in run(jnp.ones(2) * k)]
    gc.collect()
    assert [ref() for ref in references] == [None] * 6
    assert len(runs) == 3


def hidden(params, images):
    """Input of the dense layer."""
    layer = params["Conv_0"]
    x = np.asarray(images, np.float64)
    y = np.zeros((len(x), 3, 3, 3)) + layer["bias"]
    for i in range(3):
        for j in range(3):
            y += x[:, i : i + 3, j : j + 3] @ layer["kernel"][i, j]
    return np.maximum(y, 0.0).reshape(len(x), -1)


def logits(params, x):
    layer = params["head"]["Dense_0"]
    return x @ layer["kernel"] + layer["bias"]


def rounded_fn_of(apply_fn, *args, **options):
    return jax.jit(quant.quantize_activations(apply_fn, *args, **options))


def nearest(x, low, high, bits, scheme):
    """Nearest levels by exhaustive search."""
    largest = max(abs(low), abs(high))
    if scheme == "symmetric":
        low, high = -largest, largest
    grid = reference.grid_over(low, high, largest, bits, scheme)
    return reference.nearest(np.asarray(x, np.float64), *grid, bits, scheme)


def rounded_logits(params, images, ranges, bits, scheme):
    ends = [tuple(map(float, ranges[path][:2])) for path in PATHS]
    x = nearest(images, *ends[0], bits[0], scheme)
    return logits(params, nearest(hidden(params, x), *ends[1], bits[1], scheme))


@pytest.mark.parametrize("batch_size", [None, 1, 4, 10, 99])
def test_ranges_are_those_of_all_examples(batch_size):
    params, images = problem()
    ranges = quant.activation_ranges(logits_fn, params, images, batch_size=batch_size)
    assert set(ranges) == set(PATHS)
    for path, x in zip(PATHS, (images, hidden(params, images)), strict=True):
        low, high, size = ranges[path]
        assert low.dtype == high.dtype == jnp.float32
        np.testing.assert_allclose((low, high), (x.min(), x.max()), rtol=1e-6)
        assert size == x[0].size
        assert type(size) is int


def test_batches_are_of_the_arguments_that_are_named():
    params, images = problem()
    apply_fn = lambda images, shift, params: logits_fn(params, images + shift["all"])
    shift = {"all": np.arange(10.0, dtype=np.float32)[:, None, None, None]}
    ranges = quant.activation_ranges(
        apply_fn, images, shift, params, batch_size=3, batch_argnums=[0, 1]
    )
    x = images + shift["all"]
    np.testing.assert_allclose(ranges["Conv_0"][:2], (x.min(), x.max()), rtol=1e-6)


def test_percentiles_are_means_over_batches():
    params, images = problem()
    ranges = quant.activation_ranges(
        logits_fn,
        params,
        images,
        batch_size=4,
        calibration="percentile",
        percentile=90,
    )
    for path, x in zip(PATHS, (images, hidden(params, images)), strict=True):
        parts = [np.percentile(x[i : i + 4], (10, 90)) for i in (0, 4, 8)]
        expected = np.average(parts, axis=0, weights=(4, 4, 2))
        np.testing.assert_allclose(ranges[path][:2], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "each", "scheme"),
    [
        (3, (3, 3), "affine"),
        (8, (8, 8), "symmetric"),
        ({"head": 2, "*": 5}, (5, 2), "symmetric"),
        ({"*": 4, "head/*": 2}, (4, 4), "affine"),  # the first match counts
        ({"Conv_*": 3, "*/Dense_0": 4}, (3, 4), "affine"),
    ],
)
def test_inputs_move_to_the_nearest_level_of_the_range(bits, each, scheme):
    params, images = problem()
    # Calibrated without the largest image, which is thus clipped.
    ranges = quant.activation_ranges(logits_fn, params, images[:9])
    ranges = dict(reversed(ranges.items()))  # the order does not matter
    rounded_fn = rounded_fn_of(logits_fn, ranges, bits, scheme=scheme)
    expected = rounded_logits(params, images, ranges, each, scheme)
    np.testing.assert_allclose(rounded_fn(params, images), expected, rtol=1e-4)


def test_layers_without_a_range_stay_floats():
    params, images = problem()
    ranges = quant.activation_ranges(logits_fn, params, images)
    low, high, _ = ranges.pop("head/Dense_0")
    assert list(ranges) == ["Conv_0"]
    x = nearest(images, *map(float, ranges["Conv_0"][:2]), 2, "affine")
    first_fn = quant.quantize_activations(logits_fn, ranges, 2)
    expected = logits(params, hidden(params, x))
    np.testing.assert_allclose(jax.jit(first_fn)(params, images), expected, rtol=1e-4)
    # Once more, with the other layer: both are rounded.
    other = {"head/Dense_0": quant.ActivationRange(low, high, 27)}
    both_fn = rounded_fn_of(first_fn, other, 3)
    expected = rounded_logits(params, images, ranges | other, (2, 3), "affine")
    np.testing.assert_allclose(both_fn(params, images), expected, rtol=1e-4)


def test_one_program_for_all_precisions():
    params, images = problem()
    ranges = quant.activation_ranges(logits_fn, params, images)
    traces = []

    @jax.jit
    @jax.vmap
    def of_width(bits):
        traces.append(None)
        bits = {"head": bits, "*": bits + 1}
        return quant.quantize_activations(logits_fn, ranges, bits)(params, images)

    for widths in ((2, 7), (4, 3)):
        actual = of_width(jnp.array(widths))
        for outputs, width in zip(actual, widths, strict=True):
            bits = {"head": width, "*": width + 1}
            expected = rounded_fn_of(logits_fn, ranges, bits)
            np.testing.assert_allclose(outputs, expected(params, images), rtol=1e-5)
    assert len(traces) == 1


def test_derivative_is_straight_through_within_the_range():
    model = nn.Dense(1, use_bias=False)
    params = {"params": {"kernel": jnp.array([[3.0]])}}
    ranges = {"": quant.ActivationRange(jnp.float32(-1.0), jnp.float32(1.0), 1)}
    rounded_fn = quant.quantize_activations(model.apply, ranges, 2)
    x = jnp.array([[-1.1], [-1.0], [0.3], [1.0], [1.1]])
    gradient = jax.jit(jax.grad(lambda x: rounded_fn(params, x).sum()))(x)
    np.testing.assert_array_equal(gradient.ravel(), [0.0, 3.0, 3.0, 3.0, 0.0])


@pytest.mark.parametrize("ends", [(-0.5, 1.0), (-1.0, 0.5)])
def test_symmetric_ranges_reach_as_far_on_either_side(ends):
    model = nn.Dense(1, use_bias=False)
    params = {"params": {"kernel": jnp.array([[3.0]])}}
    ranges = {"": quant.ActivationRange(*map(jnp.float32, ends), 1)}
    rounded_fn = quant.quantize_activations(model.apply, ranges, 2, scheme="symmetric")
    x = jnp.array([[-1.1], [-0.8], [0.3], [0.8], [1.1]])
    outputs, pull = jax.vjp(jax.jit(lambda x: rounded_fn(params, x)), x)
    np.testing.assert_array_equal(outputs.ravel(), [-3.0, -3.0, 0.0, 3.0, 3.0])
    (gradient,) = pull(jnp.ones_like(outputs))
    np.testing.assert_array_equal(gradient.ravel(), [0.0, 3.0, 3.0, 3.0, 0.0])


def test_weights_are_quantized_in_the_same_function():
    params, images = problem()
    labels = np.arange(10) % 4
    apply_fn = lambda params, _, images: logits_fn(params, images)
    ranges = quant.activation_ranges(apply_fn, params, None, images)
    rounded_fn = quant.quantize_activations(apply_fn, ranges, 2)
    weights = quant.dequantize(quant.quantize(params, 3))
    expected = rounded_logits(
        jax.tree.map(np.asarray, weights), images, ranges, (2, 2), "affine"
    )
    at_once = jax.jit(lambda p, x: rounded_fn(quant.fake_quantize(p, 3), None, x))
    np.testing.assert_allclose(at_once(params, images), expected, rtol=1e-4)
    accuracy = quant.accuracy_against_bits(rounded_fn, params, images, labels, (3,))
    np.testing.assert_allclose(accuracy, np.mean(expected.argmax(-1) == labels))


def test_half_precision_stays_so():
    seen = []

    class Half(nn.Dense):
        def __call__(self, x):
            seen.append(x.dtype)
            return super().__call__(x)

    model = Half(2, dtype=jnp.bfloat16)
    x = jnp.linspace(0.0, 1.0, 6, dtype=jnp.bfloat16).reshape(2, 3)
    variables = model.init(jax.random.key(0), x)
    ranges = quant.activation_ranges(model.apply, variables, x)
    assert ranges[""].low.dtype == jnp.float32
    rounded_fn_of(model.apply, ranges, 4)(variables, x)
    assert {*seen} == {jnp.dtype(jnp.bfloat16)}


def test_layers_called_several_times_have_the_union():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return dense(dense(x) + 7.0)

    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    variables = Twice().init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    apply_fn = Twice().apply
    ranges = quant.activation_ranges(apply_fn, variables, x)
    low, high, size = ranges["Dense_0"]
    low_high = (x.min(), (x @ kernel + 7.0).max())
    np.testing.assert_allclose((low, high), low_high, rtol=1e-5)
    assert size == 6
    first = nearest(x, float(low), float(high), 3, "affine") @ kernel + 7.0
    expected = nearest(first, float(low), float(high), 3, "affine") @ kernel
    rounded_fn = rounded_fn_of(apply_fn, ranges, 3)
    np.testing.assert_allclose(rounded_fn(variables, x), expected, rtol=1e-4)


def test_calls_of_a_parent_class_are_no_further_calls():
    class Child(nn.Dense):
        def __call__(self, x):
            return super().__call__(10.0 * x)

    x = jnp.ones((2, 3))
    variables = Child(2).init(jax.random.key(0), x)
    low, high, size = quant.activation_ranges(Child(2).apply, variables, x)[""]
    assert (float(low), float(high), size) == (1.0, 1.0, 3)


def test_other_classes_can_be_chosen():
    params, images = problem()
    ranges = quant.activation_ranges(logits_fn, params, images, layers=nn.Conv)
    assert list(ranges) == ["Conv_0"]
    ranges = quant.activation_ranges(logits_fn, params, images, layers=(Head, nn.Conv))
    assert list(ranges) == ["Conv_0", "head"]


def test_other_interceptors_stay():
    params, images = problem()
    ranges = quant.activation_ranges(logits_fn, params, images)
    counts = []

    def count(call, args, kwargs, context):
        counts.append(type(context.module).__name__)
        return call(*args, **kwargs)

    def counted(params, images):
        with nn.intercept_methods(count):
            return logits_fn(params, images)

    expected = rounded_fn_of(logits_fn, ranges, 3)(params, images)
    for wrapped in (counted, logits_fn):
        rounded_fn = rounded_fn_of(wrapped, ranges, 3)
        with nn.intercept_methods(count):
            outputs = rounded_fn(params, images)
        np.testing.assert_array_equal(outputs, expected)
    assert sorted(counts) == sorted(3 * ["Net", "Conv", "Head", "Dense"])


@pytest.mark.skipif(
    not hasattr(jax, "make_user_context"), reason="needs jax.make_user_context"
)
def test_functions_that_are_jitted_are_traced_again():
    params, images = problem()
    jitted = jax.jit(logits_fn)
    floats = jitted(params, images)
    ranges = quant.activation_ranges(jitted, params, images)
    expected = [rounded_fn_of(logits_fn, ranges, b)(params, images) for b in (2, 3)]
    coarse, fine = (quant.quantize_activations(jitted, ranges, b) for b in (2, 3))
    for _ in range(2):
        np.testing.assert_allclose(coarse(params, images), expected[0], rtol=1e-5)
        np.testing.assert_allclose(fine(params, images), expected[1], rtol=1e-5)
        np.testing.assert_array_equal(jitted(params, images), floats)
    # Rounded to three bits and then, inside, to two; alone it is as it was.
    outer = quant.quantize_activations(coarse, ranges, 3)
    assert not np.array_equal(outer(params, images), expected[0])
    np.testing.assert_allclose(coarse(params, images), expected[0], rtol=1e-5)


def test_layers_in_loops_are_seen():
    params, images = problem()
    one_by_one = lambda params, images: jax.lax.map(
        lambda x: logits_fn(params, x[None])[0], images
    )
    actual = quant.activation_ranges(one_by_one, params, images)
    expected = quant.activation_ranges(logits_fn, params, images)
    np.testing.assert_allclose(
        actual["head/Dense_0"][:2], expected["head/Dense_0"][:2], rtol=1e-6
    )
    rounded_fns = [rounded_fn_of(f, expected, 3) for f in (one_by_one, logits_fn)]
    np.testing.assert_allclose(*(f(params, images) for f in rounded_fns), rtol=1e-5)


def test_paths_lead_to_the_weights():
    model = models.create("resnet8", num_classes=10)
    images = jnp.zeros((2, 32, 32, 3))
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    apply_fn = functools.partial(model.apply, train=False)
    ranges = quant.activation_ranges(apply_fn, variables, images)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(variables["params"])
        if x.ndim >= 2
    }
    assert {f"{path}/kernel" for path in ranges} == kernels
    assert ranges["BasicBlock_1/Conv_1"].size == 16 * 16 * 32


def unseen(transform):
    """A function in which the layer's input is known only inside."""
    return lambda params, images: transform(lambda x: logits_fn(params, x[None]))(
        images
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"apply_fn": lambda params, images: images},
            ValueError,
            r"of the classes Conv, ConvTranspose, ConvLocal, Dense, DenseGeneral, Ein",
        ),
        (
            {"apply_fn": unseen(jax.vmap)},
            ValueError,
            r"input of 'Conv_0' must be known outside of transformations",
        ),
        ({"layers": (nn.BatchNorm,)}, ValueError, r"classes BatchNorm: it called none"),
        ({"batch_size": 0}, ValueError, r"batch_size must be an integer >= 1, got 0"),
        (
            {"batch_size": 4, "batch_argnums": 2},
            TypeError,
            r"asks for positional argument 2, which was not given: got 2",
        ),
        (
            {"batch_size": 4, "batch_argnums": (0, 1)},
            ValueError,
            r"have the same number",
        ),
        ({"calibration": "mse"}, ValueError, r"calibration must be one of \['minmax"),
        ({"percentile": 99.0}, ValueError, r"percentile needs calibration='percenti"),
        (
            {"calibration": "percentile", "percentile": 40},
            ValueError,
            r"percentile must be above 50",
        ),
    ],
)
def test_misuse_of_ranges_is_named(change, error, message):
    params, images = problem()
    options = dict(change)
    apply_fn = options.pop("apply_fn", logits_fn)
    with pytest.raises(error, match=message):
        quant.activation_ranges(apply_fn, params, images, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [{}, {"calibration": "percentile", "percentile": 90}], ids=str
)
def test_activations_that_are_not_finite_are_named(value, options):
    params, images = problem()
    images = images.copy()
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"must be finite.* for 'Conv_0'"):
        quant.activation_ranges(logits_fn, params, images, batch_size=7, **options)


def test_integers_are_refused():
    embed = nn.Embed(3, 2)
    variables = embed.init(jax.random.key(0), jnp.arange(3))
    with pytest.raises(TypeError, match=r"input of '' must have real .* got int32"):
        quant.activation_ranges(
            embed.apply, variables, jnp.arange(3), layers=(nn.Embed,)
        )


def a_range(low=0.0, high=1.0):
    return {"Conv_0": quant.ActivationRange(np.float32(low), np.float32(high), 1)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranges": {}}, ValueError, r"at least one layer"),
        ({"ranges": a_range(2.0)}, ValueError, r"low to high.* for 'Conv_0'"),
        ({"ranges": a_range(high=np.inf)}, ValueError, r"must be finite"),
        ({"bits": 9}, ValueError, r"bits must be .* or 16, got 9 \(at 'Conv_0'\)"),
        (
            {"bits": jnp.float32(4)},
            TypeError,
            r"got float32 of shape \(\) \(at 'Conv_0'\)",
        ),
        ({"bits": {"head": 4}}, ValueError, r"none of \['head'\] matches 'Conv_0'"),
        ({"scheme": "x"}, ValueError, r"scheme must be one of"),
    ],
)
def test_misuse_of_rounding_is_named(change, error, message):
    arguments = {"apply_fn": logits_fn, "ranges": a_range(), "bits": 4, **change}
    with pytest.raises(error, match=message):
        quant.quantize_activations(**arguments)


def test_layers_that_are_never_called_are_named():
    params, images = problem()
    ranges = {**a_range(), "Conv_1": a_range()["Conv_0"]}
    rounded_fn = rounded_fn_of(logits_fn, ranges, 4)
    with pytest.raises(ValueError, match=r"it never called 'Conv_1'"):
        rounded_fn(params, images)
