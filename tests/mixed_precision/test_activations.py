"""The loss in its activations, against the same loss written out in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, mixed_precision, quant
from tests.quant import reference

CHOICES = (2, 3, 8)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, param_dtype=x.dtype)(x))
        return nn.Dense(3, param_dtype=x.dtype)(x)


def loss_fn(params, x, labels):
    return criterion(Net().apply({"params": params}, x), labels)


def criterion(logits, labels):
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))


def explicit_loss(offsets, params, x, labels):
    """The loss with offsets, without Flax."""
    first, second = params["Dense_0"], params["Dense_1"]
    x = x + offsets["Dense_0"]
    y = jnp.tanh(x @ first["kernel"] + first["bias"]) + offsets["Dense_1"]
    return criterion(y @ second["kernel"] + second["bias"], labels)


def data(dtype=np.float64, size=5):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {
        "Dense_0": {"kernel": draw(2, 4), "bias": draw(4)},
        "Dense_1": {"kernel": draw(4, 3), "bias": draw(3)},
    }
    return params, draw(size, 2), jnp.arange(size) % 3


def problem_of(loss_fn, args, **options):
    ranges = quant.activation_ranges(loss_fn, *args)
    return mixed_precision.activation_problem(loss_fn, ranges, *args, **options)


def dense_hessian(loss_fn, offsets, args):
    flat, unravel = ravel_pytree(offsets)
    hessian = jax.jit(jax.hessian(lambda d: loss_fn(unravel(d), *args)))
    return np.asarray(hessian(flat))


JITTED = pytest.param(
    jax.jit,
    marks=pytest.mark.skipif(
        not hasattr(jax, "make_user_context"), reason="needs jax.make_user_context"
    ),
    id="jitted",
)


@pytest.mark.parametrize("wrap", [pytest.param(lambda f: f, id="plain"), JITTED])
def test_hessian_is_that_of_the_activations(x64, wrap):
    del x64
    args = data()
    problem = problem_of(wrap(loss_fn), args)
    zeros = {"Dense_0": np.zeros((5, 2)), "Dense_1": np.zeros((5, 4))}
    jax.tree.map(np.testing.assert_array_equal, problem.offsets, zeros)
    actual = dense_hessian(problem.loss_fn, problem.offsets, args)
    expected = dense_hessian(explicit_loss, zeros, args)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    offsets = jax.tree.map(lambda x: x + 0.3, zeros)
    actual = jax.jit(problem.loss_fn)(offsets, *args)
    np.testing.assert_allclose(actual, explicit_loss(offsets, *args), rtol=1e-12)


def test_traces_of_the_layers(x64):
    del x64
    args = data()
    composed = curvature.ComposedLoss(
        lambda params, x, labels: Net().apply({"params": params}, x),
        lambda logits, x, labels: criterion(logits, labels),
    )
    problem = problem_of(composed, args)
    trace = curvature.trace(problem.loss_fn, problem.offsets, *args, num_samples=100)
    blocks = np.split(
        np.diag(dense_hessian(explicit_loss, problem.offsets, args)), [5 * 2]
    )
    for (value, stderr), block in zip(trace.layers.values(), blocks, strict=True):
        # Four standard errors, which are themselves below the value.
        assert stderr < abs(block.sum())
        np.testing.assert_allclose(value, block.sum(), atol=4 * stderr)


def test_examples_and_tokens_are_no_layers():
    """Whatever the layer is called, and weights of that name and shape would be."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="embedding")(x)

    def loss_fn(params, x):
        return jnp.mean(Tokens().apply({"params": params}, x) ** 2)

    x = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
    args = (Tokens().init(jax.random.key(0), x)["params"], x)
    problem = problem_of(loss_fn, args)
    found = curvature.layer_traces(problem.loss_fn, problem.offsets, *args)
    assert [*found] == ["embedding"]


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_errors_are_those_at_the_float_activations(x64, scheme):
    del x64
    args = data()
    params, x, _ = args
    layer = params["Dense_0"]
    inputs = {
        "Dense_0": np.asarray(x),
        "Dense_1": np.tanh(np.asarray(x @ layer["kernel"] + layer["bias"])),
    }
    problem = problem_of(loss_fn, args, choices=CHOICES[::-1], scheme=scheme)
    assert problem.errors.choices == CHOICES[::-1]
    for path, x in inputs.items():
        largest = np.abs(x).max()
        ends = (-largest, largest) if scheme == "symmetric" else (x.min(), x.max())
        for bits, d in zip(CHOICES[::-1], problem.errors.layers[path], strict=True):
            grid = reference.grid_over(*ends, largest, bits, scheme, np.float64)
            expected = reference.nearest(x, *grid, bits, scheme) - x
            np.testing.assert_allclose(d, expected, atol=1e-12)


def test_an_error_as_offset_is_the_layer_rounded():
    args = data(np.float32)
    ranges = quant.activation_ranges(loss_fn, *args)
    problem = mixed_precision.activation_problem(
        loss_fn, ranges, *args, choices=CHOICES
    )
    for path in ranges:
        d = {**problem.offsets, path: problem.errors.layers[path][0]}
        rounded_fn = quant.quantize_activations(loss_fn, {path: ranges[path]}, 2)
        actual, expected = (
            jax.jit(problem.loss_fn)(d, *args),
            jax.jit(rounded_fn)(*args),
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        assert abs(expected - loss_fn(*args)) > 1e-3


def test_half_precision_has_wide_offsets():
    params, x, labels = data(np.float32)
    half = (params, x.astype(jnp.bfloat16), labels)
    problem = problem_of(loss_fn, half)
    assert {d.dtype for d in problem.offsets.values()} == {jnp.dtype(jnp.float32)}
    assert problem.errors.layers["Dense_0"].dtype == jnp.float32
    # An offset of a bin of bfloat16 arrives; the output keeps its dtype.
    offsets = {**problem.offsets, "Dense_1": problem.offsets["Dense_1"] + 1.0}
    loss = jax.jit(problem.loss_fn)
    assert loss(offsets, *half) != loss(problem.offsets, *half)


def test_equal_losses_share_their_programs():
    args = data(np.float32)
    traces = []

    def counted(*args):
        traces.append(None)
        return loss_fn(*args)

    ranges = quant.activation_ranges(counted, *args)
    counts = []
    for _ in range(2):
        problem = mixed_precision.activation_problem(counted, ranges, *args)
        curvature.trace(problem.loss_fn, problem.offsets, *args, num_samples=2)
        counts.append(len(traces))
    assert counts[0] == counts[1]
    assert problem.loss_fn != problem_of(loss_fn, args).loss_fn


def test_loops_over_batches():
    params, x, labels = data(np.float32, size=15)
    batches = (x.reshape(3, 5, 2), labels.reshape(3, 5))
    ranges = quant.activation_ranges(loss_fn, params, x, labels)

    def squared_gradient(batch):
        problem = mixed_precision.activation_problem(
            loss_fn, ranges, params, *batch, choices=(2,)
        )
        gradient = jax.grad(problem.loss_fn)(problem.offsets, params, *batch)
        return jax.tree.map(lambda g: jnp.sum(g**2), gradient)

    actual = jax.lax.map(squared_gradient, batches)
    for k in range(3):
        batch = (batches[0][k], batches[1][k])
        zeros = {"Dense_0": jnp.zeros((5, 2)), "Dense_1": jnp.zeros((5, 4))}
        gradient = jax.jit(jax.grad(explicit_loss))(zeros, params, *batch)
        for path, g in gradient.items():
            np.testing.assert_allclose(actual[path][k], np.sum(g**2), rtol=1e-4)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(2)
        return dense(dense(x))


def test_layers_that_are_called_several_times_are_refused():
    x = jnp.ones((3, 2))
    variables = Twice().init(jax.random.key(0), x)
    twice = lambda variables, x: jnp.sum(Twice().apply(variables, x))
    with pytest.raises(ValueError, match=r"calls 'Dense_0' 2 times"):
        problem_of(twice, (variables, x))
    offset_loss = problem_of(loss_fn, data(np.float32)).loss_fn
    twice_offset = type(offset_loss)(twice)
    with pytest.raises(ValueError, match=r"calls 'Dense_0' 2 times"):
        jax.jit(twice_offset)({"Dense_0": x}, variables, x)


def test_offsets_belong_to_their_examples():
    params, x, labels = data(np.float32)
    problem = problem_of(loss_fn, (params, x, labels))
    message = r"'Dense_0' must .*\(1, 2\), got \(5, 2\). They are those of one batch"
    with pytest.raises(ValueError, match=message):
        jax.jit(problem.loss_fn)(problem.offsets, params, x[:1], labels[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranges": {}}, ValueError, r"ranges must have at least one layer"),
        ({"choices": (2, 9)}, ValueError, r"bits must be .* or 16, got 9"),
        ({"scheme": "x"}, ValueError, r"scheme must be one of"),
        (
            {"ranges": {"Dense_2": quant.ActivationRange(0.0, 1.0, 1)}},
            ValueError,
            r"calls 'Dense_2' 0 times",
        ),
    ],
)
def test_misuse_is_named(change, error, message):
    args = data(np.float32)
    options = {"loss_fn": loss_fn, "choices": CHOICES, "scheme": "affine", **change}
    f, ranges = options.pop("loss_fn"), options.pop("ranges", None)
    if ranges is None:
        ranges = quant.activation_ranges(loss_fn, *args)
    with pytest.raises(error, match=message):
        mixed_precision.activation_problem(f, ranges, *args, **options)
