"""Accuracy against bits, by a loop over the precisions and by hand."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import quant

BITS = (32, 8, 4, 3, 2, 16)


def problem(size=103):
    """A random two-layer network with normalization, and labels it half agrees with."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "hidden": jax.random.normal(keys[0], (16, 32)),
        "bias": jnp.linspace(-1.0, 1.0, 32),
        "out": jax.random.normal(keys[1], (32, 10)),
    }
    images = jax.random.normal(keys[2], (size, 16))
    stats = stats_fn(params, images)
    labels = logits_fn(params, stats, images).argmax(-1)
    noise = jax.random.bernoulli(keys[3], 0.2, (size,))
    return params, stats, images, jnp.where(noise, (labels + 1) % 10, labels)


def stats_fn(params, images):
    hidden = images @ params["hidden"] + params["bias"]
    return {"mean": hidden.mean(0), "var": hidden.var(0)}


def logits_fn(params, batch_stats, images):
    hidden = images @ params["hidden"] + params["bias"]
    hidden = (hidden - batch_stats["mean"]) / jnp.sqrt(batch_stats["var"] + 1e-5)
    return jax.nn.relu(hidden) @ params["out"]


def one_by_one(params, stats, images, labels, calibration=None, **options):
    accuracies = []
    for bits in BITS:
        rounded = params
        if bits != 32:
            rounded = quant.dequantize(quant.quantize(params, bits, **options))
        used = stats
        if calibration is not None:
            each = [stats_fn(rounded, batch) for batch in calibration]
            used = {k: np.mean([s[k] for s in each], axis=0) for k in stats}
        predicted = np.asarray(logits_fn(rounded, used, images)).argmax(-1)
        accuracies.append(np.mean(predicted == np.asarray(labels)))
    return accuracies


@pytest.mark.parametrize(
    ("options", "batch_size"),
    [
        ({}, 10),
        *(pytest.param({}, x, marks=pytest.mark.slow) for x in (None, 1, 103, 1000)),
        ({"axis": -1, "scheme": "symmetric"}, 10),
    ],
    ids=str,
)
def test_equals_a_loop(options, batch_size):
    params, stats, images, labels = problem()
    actual = quant.accuracy_against_bits(
        logits_fn,
        params,
        images,
        labels,
        BITS,
        batch_stats=stats,
        batch_size=batch_size,
        **options,
    )
    expected = one_by_one(params, stats, images, labels, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert len(set(map(float, actual))) > 3  # the precisions differ


def test_statistics_are_estimated_anew_for_every_precision():
    params, stats, images, labels = problem()
    calibration = images[:100].reshape(5, 20, 16)
    actual = quant.accuracy_against_bits(
        logits_fn,
        params,
        images,
        labels,
        BITS,
        batch_stats=jax.tree.map(jnp.zeros_like, stats),
        stats_fn=stats_fn,
        calibration_images=calibration,
    )
    expected = one_by_one(params, stats, images, labels, calibration)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert np.any(np.asarray(actual) != one_by_one(params, stats, images, labels))


def test_images_that_fill_the_last_batch_do_not_count():
    first = lambda params, _, images: jnp.eye(3)[jnp.zeros(len(images), int)]
    labels = jnp.array([0, 0, 1, 2, 0])
    accuracy = quant.accuracy_against_bits(
        first, {"w": jnp.ones((2, 2))}, jnp.ones((5, 1)), labels, (32, 4), batch_size=4
    )
    np.testing.assert_allclose(accuracy, 0.6, rtol=1e-6)


def test_mask_and_calibration_reach_the_quantizer():
    params, stats, images, labels = problem()
    options = {"mask": {"hidden": True, "bias": False, "out": False}}
    for more in (options, {"mask": lambda p: jax.tree.map(lambda _: True, p)}):
        actual = quant.accuracy_against_bits(
            logits_fn, params, images, labels, BITS, batch_stats=stats, **more
        )
        expected = one_by_one(params, stats, images, labels, **more)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_one_program_for_all_precisions_and_other_weights():
    params, stats, images, labels = problem()
    traces = []

    def counted(*args):
        traces.append(None)
        return logits_fn(*args)

    for scale in (1.0, 2.0):
        for bits in (BITS, BITS[::-1]):
            quant.accuracy_against_bits(
                counted,
                jax.tree.map(lambda x, s=scale: s * x, params),
                images,
                labels,
                bits,
                batch_stats=stats,
                batch_size=10,
            )
    assert len(traces) <= 2  # a loop's body may be traced twice, but only once compiled


def test_weights_that_are_not_finite_are_named():
    params, stats, images, labels = problem()
    params["out"] = params["out"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"must be finite .* \['out'\] has NaN"):
        quant.accuracy_against_bits(
            logits_fn, params, images, labels, batch_stats=stats
        )


def test_lists_and_arrays_of_options_are_taken():
    params, stats, images, labels = problem()
    accuracies = [
        quant.accuracy_against_bits(
            logits_fn, params, images, labels, bits, batch_stats=stats, axis=axis
        )
        for bits, axis in [((8, 3), -1), (jnp.array([8, 3]), [-1])]
    ]
    np.testing.assert_array_equal(*accuracies)


def test_works_inside_jit():
    params, stats, images, labels = problem()
    accuracy = lambda p: quant.accuracy_against_bits(
        logits_fn, p, images, labels, BITS, batch_stats=stats
    )
    np.testing.assert_allclose(jax.jit(accuracy)(params), accuracy(params), rtol=1e-6)


def test_mixed_precision_equals_quantizing_so():
    """Mappings and numbers in one call, floats among them."""
    params, stats, images, labels = problem()
    mixed = {"hidden": 2, "out": 3}
    accuracies = quant.accuracy_against_bits(
        logits_fn,
        params,
        images,
        labels,
        (mixed, 4, {"h*": 32, "*": 2}),
        batch_stats=stats,
    )
    rounded = [
        quant.dequantize(quant.quantize(params, mixed)),
        quant.dequantize(quant.quantize(params, 4)),
        {**params, "out": quant.dequantize(quant.quantize(params["out"], 2))},
    ]
    expected = [
        float(np.mean(logits_fn(p, stats, images).argmax(-1) == labels))
        for p in rounded
    ]
    assert len({*expected}) == 3
    np.testing.assert_allclose(accuracies, expected)


def test_logits_that_are_not_finite_are_wrong():
    nothing = lambda params, _, images: jnp.full((len(images), 3), jnp.nan)
    accuracy = quant.accuracy_against_bits(
        nothing, {"w": jnp.ones((2, 2))}, jnp.ones((4, 1)), jnp.zeros(4, int), (32, 2)
    )
    np.testing.assert_array_equal(accuracy, 0.0)


def test_classes_left_out_do_not_make_the_others_wrong():
    """Masked logits; wrong are those whose largest is not finite."""
    inf = jnp.inf
    rows = jnp.array(
        [
            [1.0, 2.0, -inf],
            [-inf, 2.0, 3.0],
            [-inf, -inf, -inf],
            [0.0, inf, 0.0],
            [0.0, jnp.nan, 0.0],
            [0.0, -inf, jnp.nan],
        ]
    )
    labels = jnp.array([1, 2, 0, 1, 1, 2])
    accuracy = quant.accuracy_against_bits(
        lambda params, _, x: x, {"w": jnp.ones((2, 2))}, rows, labels, (32, 4)
    )
    np.testing.assert_allclose(accuracy, 2 / 6, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_share_is_float32_in_double_precision_too():
    params, stats, images, labels = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, problem()
    )
    accuracies = quant.accuracy_against_bits(
        logits_fn, params, images, labels, BITS, batch_stats=stats
    )
    assert accuracies.dtype == jnp.float32


class Model:
    """Logits of a data set."""

    def __init__(self, data, traces):
        self.data, self.traces = data, traces

    def total(self):
        self.traces.append(None)
        return self.data.sum()

    def logits(self, params, _, images):
        return images @ params["w"] + self.total()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closure", "method", "stats_fn"])
def test_programs_live_as_long_as_the_function_and_no_longer(kind):
    params, images, labels = (
        {"w": jnp.ones((4, 3))},
        jnp.ones((5, 4)),
        jnp.zeros(5, int),
    )
    traces = []

    def plain(params, stats, images):
        return images @ params["w"] + stats

    def run(data):
        model = Model(data, traces)
        closure = lambda *args: model.logits(*args)
        stats_fn = lambda *_: model.total()
        for _ in range(3):
            function, options = {
                "closure": (closure, {}),
                "method": (model.logits, {}),  # every time another object
                "stats_fn": (
                    plain,
                    {"stats_fn": stats_fn, "calibration_images": images[None]},
                ),
            }[kind]
            quant.accuracy_against_bits(
                function, params, images, labels, (32, 4), **options
            )
        return weakref.ref(data), weakref.ref(model)

    references = [ref for k in range(3) for ref in run(k + jnp.arange(6.0))]
    gc.collect()
    assert [ref() for ref in references] == [None] * 6
    assert len(traces) <= 2 * 3  # a loop's body may be traced twice: a program for each


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bits": (4, 9)},
            ValueError,
            r"bits must be an integer from 2 to 8, or 16, go",
        ),
        ({"bits": ({"hidden": 4},)}, ValueError, r"none of .* matches 'out'"),
        ({"bits": ({"*": 9},)}, ValueError, r"bits must be .* got 9"),
        (
            {"labels": np.zeros(3, int)},
            ValueError,
            r"labels must have shape \(103,\) f",
        ),
        (
            {"batch_size": 0},
            ValueError,
            r"batch_size must be an integer >= 1, got 0",
        ),
        (
            {"batch_size": 10.0},
            TypeError,
            r"batch_size must be an integer >= 1, got 10.0",
        ),
        ({"key": 1}, TypeError, r"unknown options \['key'\]; known are"),
        ({"axis": "x"}, ValueError, r"axis must be one of \['output'\]"),
        ({"logits_fn": lambda p, s, x: (x,)}, ValueError, r"logits of shape .*tuple"),
        (
            {"logits_fn": lambda p, s, x: x[:, 0]},
            ValueError,
            r"logits of shape \(103, ",
        ),
        ({"stats_fn": stats_fn}, ValueError, r"need each other"),
        ({"calibration_images": 1}, ValueError, r"need each other"),
        ({"scheme": "x"}, ValueError, r"scheme must be one of"),
        (
            {"mask": {"x": True}},
            ValueError,
            r"mask must have the tree structure of par",
        ),
    ],
)
def test_misuse_is_named(change, error, message):
    params, stats, images, labels = problem()
    arguments = {
        "logits_fn": logits_fn,
        "params": params,
        "images": images,
        "labels": labels,
        "batch_stats": stats,
        **change,
    }
    with pytest.raises(error, match=message):
        quant.accuracy_against_bits(**arguments)
