"""Quantization of parameter trees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import quant
from hero_jax.quant import QuantizedArray


def params():
    key = jax.random.key(0)
    return {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 4, 8))},
        "norm": {"scale": jnp.linspace(0.5, 2.0, 8), "bias": jnp.ones(8)},
        "head": [jax.random.normal(key, (8, 2), jnp.bfloat16), jnp.float32(0.3)],
        "unused": None,
    }


def test_weights_are_quantized_and_the_rest_is_untouched():
    tree = params()
    quantized = quant.quantize(tree, 4)
    assert isinstance(quantized["conv"]["kernel"], QuantizedArray)
    assert isinstance(quantized["head"][0], QuantizedArray)
    chex.assert_trees_all_equal(quantized["norm"], tree["norm"])
    assert quantized["head"][1] is tree["head"][1]
    assert quantized["unused"] is None

    restored = quant.dequantize(quantized)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree)
    expected = quant.quantize_array(tree["conv"]["kernel"], 4).dequantize()
    np.testing.assert_array_equal(restored["conv"]["kernel"], expected)
    assert np.any(np.asarray(expected != tree["conv"]["kernel"]))


def test_every_leaf_has_a_grid_of_its_own():
    tree = {"small": 1e-3 * jnp.eye(3), "large": 1e3 * jnp.eye(3)}
    restored = quant.dequantize(quant.quantize(tree, 2))
    chex.assert_trees_all_close(restored, tree, rtol=1e-6)


def test_mask_chooses_the_leaves():
    tree = params()
    everything = quant.quantize(tree, 8, mask=True)
    assert isinstance(everything["norm"]["bias"], QuantizedArray)
    assert isinstance(everything["head"][1], QuantizedArray)
    mask = {"conv": False, "norm": {"scale": True, "bias": False}, "head": False}
    some = quant.quantize(tree, 8, mask={**mask, "unused": None})
    kinds = [
        isinstance(x, QuantizedArray)
        for x in jax.tree.leaves(some, is_leaf=lambda x: isinstance(x, QuantizedArray))
    ]
    assert kinds == [False, False, False, False, True]  # norm / scale comes last


def test_leaves_that_are_no_weights_pass_untouched():
    rng = jax.random.key(0)
    tree = {"w": jnp.ones((2, 2)), "count": jnp.ones((2, 2), int), "rng": rng, "n": 3}
    for mask in (None, {"w": True, "count": False, "rng": False, "n": False}):
        quantized = quant.quantize(tree, 4, mask=mask)
        assert isinstance(quantized["w"], QuantizedArray)
        assert quantized["count"] is tree["count"]
        assert quantized["rng"] is rng
        assert quantized["n"] == 3
    assert quant.fake_quantize(tree, 4)["count"] is tree["count"]


def test_the_rest_can_be_quantized_later_and_otherwise():
    tree = params()
    first = {"conv": True, "norm": False, "head": False, "unused": None}
    half = quant.quantize(tree, 8, mask=first)
    both = quant.quantize(half, 3, scheme="symmetric")
    assert both["conv"]["kernel"] is half["conv"]["kernel"]
    assert both["head"][0].bits == 3
    chex.assert_trees_all_equal_shapes_and_dtypes(quant.dequantize(both), tree)
    with pytest.raises(
        TypeError, match=r"must not be quantized.* \(at \['conv'\]\['ke"
    ):
        quant.quantize(half, 3, mask=True)


def test_works_inside_jit_with_integers_in_memory():
    tree = params()
    quantized = quant.quantize(tree, 4)
    bytes_of = lambda t: sum(x.nbytes for x in jax.tree.leaves(t))
    assert bytes_of(quantized) < 0.35 * bytes_of(tree)
    jitted = jax.jit(lambda t: quant.dequantize(quant.quantize(t, 4)))(tree)
    chex.assert_trees_all_close(jitted, quant.dequantize(quantized), rtol=1e-6)
    chex.assert_trees_all_close(
        jax.jit(quant.dequantize)(quantized), quant.dequantize(quantized), rtol=1e-6
    )


def test_rounding_equals_the_round_trip():
    tree = params()
    for options in ({}, {"scheme": "symmetric", "calibration": "mse"}):
        chex.assert_trees_all_equal(
            quant.fake_quantize(tree, 3, **options),
            quant.dequantize(quant.quantize(tree, 3, **options)),
        )


def test_a_sweep_over_precisions_is_one_program():
    tree = params()
    traces = []

    @jax.jit
    def sweep(widths):
        traces.append(None)
        return jax.vmap(lambda bits: quant.fake_quantize(tree, bits))(widths)

    for widths in ((8, 4), (3, 2)):
        swept = sweep(jnp.array(widths))
        for i, bits in enumerate(widths):
            expected = quant.fake_quantize(tree, bits)
            one = jax.tree.map(lambda x, i=i: x[i], swept)
            chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_one_key_rounds_every_leaf_differently_and_repeatably():
    tree = {"a": jnp.tile(jnp.linspace(-1.0, 1.0, 64), (8, 1))}
    tree["b"] = tree["a"]
    one, same, other = (
        quant.fake_quantize(tree, 3, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(one, same)
    assert np.any(one["a"] != one["b"])
    assert np.any(one["a"] != other["a"])
    chex.assert_trees_all_equal(
        quant.dequantize(quant.quantize(tree, 3, key=jax.random.key(0))), one
    )


def test_options_reach_every_leaf_and_errors_name_it():
    tree = params()
    quantized = quant.quantize(tree, 4, axis=-1)
    assert quantized["conv"]["kernel"].scale.shape == (1, 1, 1, 8)
    assert quantized["head"][0].scale.shape == (1, 2)
    with pytest.raises(ValueError, match=r"axis 2 is out .*\['head'\]\[0\]"):
        quant.quantize(tree, 4, axis=2)
    with pytest.raises(TypeError, match=r"unknown options \['group'\]"):
        quant.quantize(tree, 4, group=2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(
    "calibration",
    [
        "minmax",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("percentile", "mse")),
    ],
)
def test_no_dtype_is_promoted_behind_the_users_back(scheme, calibration):
    options = {"scheme": scheme, "calibration": calibration, "axis": -1}
    with jax.numpy_dtype_promotion("strict"):
        for key in (None, jax.random.key(0)):
            quantized = quant.quantize(params(), 4, key=key, **options)
            restored = quant.dequantize(quant.pack(quantized))
            rounded = quant.fake_quantize(params(), 4, key=key, **options)
            chex.assert_trees_all_equal(restored, rounded)
            quant.quantization_error(params(), quantized)


def test_straight_through_estimator_of_the_docstring():
    x = jnp.linspace(-1.0, 2.0, 7)

    def through(x):
        rounded = quant.fake_quantize_array(x, 2)
        return jnp.sum((x + jax.lax.stop_gradient(rounded - x)) ** 2)

    expected = 2.0 * quant.fake_quantize_array(x, 2)
    np.testing.assert_allclose(jax.grad(through)(x), expected, rtol=1e-6)


def test_packed_trees_come_back():
    quantized = quant.quantize(params(), 5, axis=-1)
    packed = quant.pack(quantized)
    assert isinstance(packed["conv"]["kernel"], quant.PackedArray)
    assert packed["norm"]["bias"] is quantized["norm"]["bias"]
    chex.assert_trees_all_equal(quant.unpack(packed), quantized)
    chex.assert_trees_all_equal(quant.dequantize(packed), quant.dequantize(quantized))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_floats_are_resident_before_a_call(bits):
    """Weights are integers among the arguments; floats are temporary at most."""
    tree = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    x = jnp.ones((1, 256))
    predict = jax.jit(lambda tree, x: x @ quant.dequantize(tree)["w"])
    quantized = quant.quantize(tree, bits)
    for stored, bits_per_weight in (
        (tree, 32),
        (quantized, 8),
        (quant.pack(quantized), bits),
    ):
        analysis = predict.lower(stored, x).compile().memory_analysis()
        resident = analysis.argument_size_in_bytes - x.nbytes
        assert sum(a.nbytes for a in jax.tree.leaves(stored)) == resident
        assert resident - 256 * 256 * bits_per_weight // 8 in range(17)


@pytest.mark.slow
def test_equal_leaves_compile_once():
    """However many there are, in whatever tree; counted by JAX, of every program."""
    events = []

    def tree(n):
        draw = lambda shape, seed: jax.random.normal(jax.random.key(seed), shape)
        square = {f"layer{i}": draw((7, 7), i) for i in range(n)}
        return {**square, "wide": draw((7, 9), 0), "bias": jnp.zeros(9)}

    def all_ways(tree):
        for options in ({}, {"axis": -1, "calibration": "mse"}):
            quantized = quant.quantize(tree, 4, **options)
            quant.dequantize(quantized)
            quant.dequantize(quant.pack(quantized))
            quant.fake_quantize(tree, 4, **options)

    small, large = tree(1), tree(50)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name)
    )
    try:
        all_ways(small)
        assert any("backend_compile" in name for name in events)
        events.clear()
        all_ways(large)
        assert not any("backend_compile" in name for name in events)
    finally:
        jax.monitoring.clear_event_listeners()


def test_shared_variables_are_not_untied():
    pytest.importorskip("flax", minversion="0.12", reason="modules are trees since")
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(3)))
    quant.quantize(model, 4)
    model.layers[2].kernel = model.layers[0].kernel
    for call in (quant.quantize, quant.fake_quantize):
        with pytest.raises(ValueError, match=r"one Flax NNX variable in two places.*0"):
            call(model, 4)
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, quant.dequantize(quant.quantize(state, 4)))
    assert merged.layers[2].kernel is merged.layers[0].kernel


def test_the_state_of_an_optimizer_is_refused():
    optax = pytest.importorskip("optax")
    weights = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    moments = optax.adam(0.1).init(weights)
    state = {"params": weights, "opt_state": moments}
    # An nnx.Optimizer has the name, and none of the classes.
    like_nnx = {"opt_state": {"0": {"mu": weights}}}
    for tree, at in (
        (state, r"\['opt_state'\]\[0\]\.mu\['w'\]"),
        ({"model": weights, "optimizer": moments}, r"\['optimizer'\]"),
        (moments, r"\[0\]\.mu"),
        (like_nnx, r"\['opt_state'\]"),
    ):
        with pytest.raises(ValueError, match=rf"weights alone.* at {at}.*state\.para"):
            quant.quantize(tree, 4)
    mask = jax.tree.map(lambda _: False, state)
    chosen = {**mask, "params": {"w": True, "b": False}}
    only = quant.quantize(state, 4, mask=chosen)
    chex.assert_trees_all_equal(only["opt_state"], state["opt_state"])
    plain = {**state, "opt_state": optax.sgd(0.1).init(weights)}  # nothing to quantize
    assert quant.is_quantized(quant.quantize(plain, 4)["params"]["w"])


@pytest.mark.parametrize(
    "use",
    [
        lambda q, x: np.asarray(q),
        pytest.param(
            lambda q, x: jnp.asarray(q),
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 8), reason="JAX says that it is no array"
            ),
        ),
        lambda q, x: q[...],
        lambda q, x: x @ q,
        lambda q, x: q @ x,
        lambda q, x: 2.0 * q,
        lambda q, x: x + q,
    ],
)
@pytest.mark.parametrize("pack", [lambda q: q, quant.pack], ids=["bytes", "packed"])
def test_quantized_arrays_say_how_they_become_arrays(use, pack):
    q = pack(quant.quantize_array(jnp.eye(3), 4))
    with pytest.raises(TypeError, match=r"Array becomes an array by .*dequantize\("):
        use(q, jnp.eye(3))


def test_empty_tree():
    assert quant.fake_quantize({}, 4) == {}
    assert quant.quantization_error({}, {}) == {}
    assert quant.size_in_bytes({}) == 0
    assert quant.dequantize(quant.quantize({}, 4)) == {}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_entries_that_are_not_finite_are_named(bad):
    tree = {"ok": jnp.ones((2, 2)), "bad": jnp.array([[1.0, bad]])}
    with pytest.raises(ValueError, match=r"finite to be quantized: \['bad'\] has NaN"):
        quant.quantize(tree, 4)
    # What is not quantized may be anything.
    quant.quantize(tree, 4, mask={"ok": True, "bad": False})


def test_other_misuse_is_named():
    with pytest.raises(
        ValueError, match=r"bits must be an integer from 2 to 8, or 16, got 1"
    ):
        quant.quantize({}, 1)
    with pytest.raises(TypeError, match=r"bits must be an integer"):
        quant.quantize(params(), "4")
    with pytest.raises(TypeError, match=r"real floating-point arrays .*int32.*\['w'\]"):
        quant.quantize({"w": jnp.ones((2, 2), jnp.int32)}, 4, mask=True)
    with pytest.raises(ValueError, match=r"mask must have the tree structure of para"):
        quant.quantize(params(), 4, mask={"other": True})
