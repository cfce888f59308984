"""Errors of quantization against quantizing layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import mixed_precision, quant
from tests import problems


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"axis": -1, "group_size": 2}, {"scheme": "symmetric", "calibration": "mse"}],
    ids=str,
)
def test_each_is_what_quantize_does_to_its_layer(options):
    params = problems.mlp_params(dtype=jnp.float32)
    errors = mixed_precision.weight_errors(params, (5, 2), **options)
    assert errors.choices == (5, 2)
    assert [*errors.layers] == ["hidden/0/kernel", "hidden/1/kernel", "out/kernel"]
    for k, bits in enumerate((5, 2)):
        rounded = quant.dequantize(quant.quantize(params, bits, **options))
        for i in range(2):
            np.testing.assert_allclose(
                errors.layers[f"hidden/{i}/kernel"][k],
                rounded["hidden"][i]["kernel"] - params["hidden"][i]["kernel"],
                rtol=1e-6,
                atol=1e-7,  # the same program fused otherwise
            )
    norms = errors.squared_norms()["out/kernel"]
    expected = [np.sum(np.square(d)) for d in errors.layers["out/kernel"]]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_empty_leaves_are_left_out():
    params = {"e": jnp.zeros((0, 3)), "w": jnp.ones((2, 2))}
    assert [*mixed_precision.weight_errors(params).layers] == ["w"]
    assert [*mixed_precision.layer_sizes(params)] == ["w"]


def test_mask_and_half_precision():
    params = {"a": jnp.ones((2, 2)), "b": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16)}
    errors = mixed_precision.weight_errors(params, (2,), mask={"a": False, "b": True})
    assert [*errors.layers] == ["b"]
    assert errors.layers["b"].dtype == jnp.float32
    rounded = quant.fake_quantize(params, 2, mask={"a": False, "b": True})["b"]
    expected = np.asarray(rounded, np.float32) - np.asarray(params["b"], np.float32)
    np.testing.assert_array_equal(errors.layers["b"][0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"choices": 4}, ValueError, r"choices must be a sequence .* got 4"),
        ({"choices": ()}, ValueError, r"choices must be .* at least one"),
        ({"choices": (4, 9)}, ValueError, r"bits must be .* got 9"),
        ({"mask": False}, ValueError, r"mask must choose a leaf .*\['b', 'w'\]"),
        ({"axis": 7}, ValueError, r"axis 7 is out of bounds .* \(at \['w'\]\)"),
        ({"params": {"w": jnp.ones((2, 2), int)}}, TypeError, r"got int32 at \['w'\]"),
        (
            {
                "params": {
                    "w": quant.quantize(jnp.ones((2, 2)), 4),
                    "v": jnp.ones((2, 2)),
                }
            },
            TypeError,
            r"params must have real floating-point .* uint8 at \['w'\]",
        ),
        ({"width": 7}, TypeError, r"unknown options \['width'\]"),
        (
            {"params": {"w": jnp.full((2, 2), jnp.nan)}},
            ValueError,
            r"\['w'\] has NaN or infinity",
        ),
    ],
)
def test_misuse_is_named(change, error, message):
    arguments = {"params": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}} | change
    with pytest.raises(error, match=message):
        mixed_precision.weight_errors(**arguments)


def test_same_values_inside_of_jit():
    params = problems.mlp_params(dtype=jnp.float32)
    inside = jax.jit(lambda p: mixed_precision.weight_errors(p, (3,)).layers)(params)
    for path, d in mixed_precision.weight_errors(params, (3,)).layers.items():
        np.testing.assert_allclose(inside[path], d, atol=1e-6)  # of weights near 1
