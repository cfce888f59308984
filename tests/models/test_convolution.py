"""The formulations for CPUs against the stock convolution, in double precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hero_jax.models import _convolution

DENSE = [
    # height, width, inputs, outputs, kernel, strides, padding
    (8, 8, 3, 5, (3, 3), (1, 1), "SAME"),
    (8, 8, 3, 5, (3, 3), (2, 2), "SAME"),
    (9, 7, 3, 5, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (8, 6, 3, 5, (3, 3), (2, 1), ((1, 1), (0, 2))),
    (7, 7, 2, 4, (3, 2), (3, 2), "VALID"),
    (16, 16, 3, 4, (7, 7), (2, 2), ((3, 3), (3, 3))),
    (8, 8, 3, 5, (1, 1), (1, 1), "SAME"),
    (7, 8, 3, 5, (1, 1), (2, 2), "VALID"),
    (5, 5, 1, 1, (3, 3), (1, 1), "SAME"),
    (6, 6, 2, 3, (1, 1), (1, 1), ((1, 0), (0, 1))),
]
SMALLER_THAN_THE_KERNEL = [
    (2, 2, 3, 5, (3, 3), (1, 1), "SAME"),
    (2, 5, 3, 5, (3, 3), (1, 1), "SAME"),
    (2, 2, 3, 5, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (1, 1, 3, 5, (3, 3), (1, 1), "SAME"),
    (4, 4, 3, 5, (3, 3), (1, 1), "VALID"),  # the outputs are smaller
]
DEPTHWISE = [
    (8, 8, 6, 6, (3, 3), (1, 1), "SAME"),
    (8, 8, 6, 6, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (9, 7, 4, 4, (3, 3), (2, 1), "SAME"),
    (7, 7, 4, 4, (5, 3), (1, 1), "VALID"),
]
OTHER = [
    (8, 8, 6, 6, (3, 3), (1, 1), "SAME", {"feature_group_count": 2}),
    (8, 8, 6, 12, (3, 3), (1, 1), "SAME", {"feature_group_count": 6}),
    (8, 8, 3, 5, (3, 3), (1, 1), "SAME", {"rhs_dilation": (2, 2)}),
    (8, 8, 3, 5, (3, 3), (1, 1), ((1, 1), (1, 1)), {"lhs_dilation": (2, 1)}),
    (8, 8, 3, 5, (3, 3), (1, 1), "SAME", {"precision": lax.Precision.HIGHEST}),
]


def both(case):
    """Return inputs, kernel, our function and the stock one."""
    height, width, inputs, outputs, size, strides, padding, *more = case
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **(more or [{}])[0]}
    if case in DEPTHWISE:
        options["feature_group_count"] = inputs
    rng = np.random.default_rng(0)
    groups = options.get("feature_group_count", 1)
    x = jnp.asarray(rng.normal(size=(2, height, width, inputs)))
    kernel = jnp.asarray(rng.normal(size=(*size, inputs // groups, outputs)))
    ours, stock = (
        functools.partial(function, window_strides=strides, padding=padding, **options)
        for function in (_convolution.conv_general_dilated, lax.conv_general_dilated)
    )
    return x, kernel, ours, stock


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case", DENSE + SMALLER_THAN_THE_KERNEL + DEPTHWISE + OTHER, ids=str
)
def test_values_gradients_and_hessian_vector_products(case):
    x, kernel, ours, stock = both(case)
    rng = np.random.default_rng(1)
    dx, dkernel = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, kernel))

    def derivatives(conv, x, kernel, dx, dkernel):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(conv(x, kernel)) ** 2)

        gradient = jax.grad(loss, (0, 1))
        product = jax.jvp(gradient, (x, kernel), (dx, dkernel))[1]
        _, linear = jax.linearize(gradient, x, kernel)
        return conv(x, kernel), gradient(x, kernel), product, linear(dx, dkernel)

    derivatives = jax.jit(derivatives, static_argnums=0)
    arguments = (x, kernel, dx, dkernel)
    expected = derivatives(stock, *arguments)
    formulations = [ours, loop_nest(case)] if case in DEPTHWISE else [ours]
    for formulation in formulations:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            derivatives(formulation, *arguments),
            expected,
        )


def loop_nest(case):
    """What depthwise layers are in all dtypes but the one of this test."""
    height, width, _, _, size, strides, pads = case
    if isinstance(pads, str):
        pads = lax.padtype_to_pads((height, width), size, strides, pads)
    return lambda x, kernel: _convolution.depthwise(x, kernel, strides, tuple(pads))


@pytest.mark.parametrize("case", [DENSE[0], DENSE[2], DEPTHWISE[0]], ids=str)
def test_works_inside_scan_and_vmap(case):
    x, kernel, ours, stock = both(case)
    kernels = jnp.stack([kernel, 2.0 * kernel, -kernel])

    def gradient(conv, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.sin(conv(x, kernel))))(kernel)

    expected = jnp.stack([gradient(stock, kernel) for kernel in kernels])
    mapped = jax.vmap(functools.partial(gradient, ours))(kernels)
    _, scanned = lax.scan(lambda _, k: (None, gradient(ours, k)), None, kernels)
    np.testing.assert_allclose(mapped, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scanned, expected, rtol=1e-3, atol=1e-4)


def test_no_slow_convolution_is_left():
    """Of 3 x 3, 1 x 1, strided and depthwise layers: what XLA would be given."""
    small = SMALLER_THAN_THE_KERNEL[:1]
    for case in DENSE[:3] + DENSE[6:8] + DEPTHWISE[:2] + small:
        x, kernel, ours, _ = both(case)
        text = str(
            jax.make_jaxpr(
                jax.grad(lambda x, k, f=ours: jnp.sum(f(x, k) ** 2), (0, 1))
            )(x, kernel)
        )
        convolutions = text.count("conv_general_dilated[")
        if case in DEPTHWISE:  # with four spatial axes, for which there is no library
            assert convolutions == text.count("feature_group_count=6") == 2
            assert text.count("lhs_spec=(0, 5, 1, 2, 3, 4)") == 2
        else:
            products = (case[4] == (1, 1)) + (max(case[4]) == 1 or max(case[5]) > 1)
            products += 2 * (case in small)
            assert convolutions == 3 - products
            assert "lhs_dilation=(2" not in text  # a gradient spread out with zeros


def test_serves_flax_layers():
    layer = functools.partial(nn.Conv, 5, (3, 3), strides=2, use_bias=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    stock = layer()
    ours = layer(conv_general_dilated=_convolution.conv_general_dilated)
    variables = stock.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        ours.apply(variables, x), stock.apply(variables, x), rtol=1e-4, atol=1e-5
    )
    half = layer(
        dtype=jnp.bfloat16, conv_general_dilated=_convolution.conv_general_dilated
    )
    assert half.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="JAX's own gradient of a convolution fails"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [DENSE[0], DENSE[6], SMALLER_THAN_THE_KERNEL[0]])
def test_batches_sharded_over_explicit_axes(case):
    """The types of such arrays say how they are sharded; products must keep to it."""
    x, kernel, ours, _ = both(case)
    gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(ours(x, kernel))), (0, 1))
    expected = gradient(x, kernel)
    grid = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(grid):
        sharded = jax.device_put(x, NamedSharding(grid, P("data")))
        actual = jax.jit(gradient)(
            sharded, jax.device_put(kernel, NamedSharding(grid, P()))
        )
    for one, two in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)
