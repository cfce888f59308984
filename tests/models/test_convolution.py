"""The formulations for CPUs against the stock convolution, in double precision."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hero_jax import models
from hero_jax.models import _convolution_on_cpu as on_cpu

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
        for function in (models.conv_general_dilated, lax.conv_general_dilated)
    )
    return x, kernel, ours, stock


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        DENSE[2],
        DEPTHWISE[2],
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in DENSE + DEPTHWISE + SMALLER_THAN_THE_KERNEL + OTHER
            if case not in (DENSE[2], DEPTHWISE[2])
        ),
    ],
    ids=str,
)
def test_values_gradients_and_hessian_vector_products(case):
    x, kernel, ours, stock = both(case)
    rng = np.random.default_rng(1)
    dx, dkernel = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, kernel))

    def derivatives(conv, x, kernel, dx, dkernel):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(conv(x, kernel)) ** 2)

        def along(x, kernel):
            return sum(map(jnp.vdot, gradient(x, kernel), (dx, dkernel)))

        gradient = jax.grad(loss, (0, 1))
        product = jax.jvp(gradient, (x, kernel), (dx, dkernel))[1]
        _, linear = jax.linearize(gradient, x, kernel)
        forward = jax.jvp(loss, (x, kernel), (dx, dkernel))[1]
        backward = jax.grad(along, (0, 1))(x, kernel)
        return (
            *(conv(x, kernel), gradient(x, kernel), product, linear(dx, dkernel)),
            *(forward, backward),
        )

    derivatives = jax.jit(derivatives, static_argnums=0)
    arguments = (x, kernel, dx, dkernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        derivatives(ours, *arguments),
        derivatives(stock, *arguments),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_loop_nests_in_double_precision(case):
    """What depthwise layers are in all dtypes but doubles."""
    x, kernel, _, stock = both(case)
    *_, strides, pads = case
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, pads)
    layer = on_cpu.Layer(x.shape, kernel.shape, strides, tuple(pads), case[2], None)
    assert on_cpu.fastest(layer, jnp.float32) is on_cpu.DEPTHWISE
    y, vjp = jax.vjp(stock, x, kernel)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=y.shape))
    dx, dkernel = vjp(dy)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(on_cpu.DEPTHWISE.output(layer, x, kernel), y)
    close(on_cpu.DEPTHWISE.input_gradient(layer, kernel, dy), dx)
    close(on_cpu.DEPTHWISE.kernel_gradient(layer, x, dy), dkernel)


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


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "axes"),
    [
        *((DENSE[2], axes) for axes in [(0, None), (None, 0), (0, 0), (1, 2)]),
        *((DEPTHWISE[1], axes) for axes in [(0, None), (None, 0)]),
    ],
    ids=str,
)
def test_differentiates_what_is_mapped_twice(case, axes):
    """The gradient with respect to what is not mapped is a sum over what is."""
    x, kernel, ours, stock = both(case)

    def stacked(array, axis, factors):
        if axis is None:
            return array
        return jnp.stack([f * array for f in factors], axis)

    x, kernel = (
        stacked(a, axis, (1.0, -0.5)) for a, axis in zip((x, kernel), axes, strict=True)
    )
    kernel = stacked(kernel, 0, (1.0, 0.3, 0.7))

    def derivatives(conv):
        def loss(x, kernel):
            mapped = jax.vmap(jax.vmap(conv, axes), (None, 0))
            return jnp.sum(jnp.sin(mapped(x, kernel)))

        gradient = jax.grad(loss, (0, 1))
        return gradient(x, kernel), jax.jvp(gradient, (x, kernel), (x, kernel))[1]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        jax.jit(lambda: derivatives(ours))(),
        derivatives(stock),  # compiled by jaxlib 0.7.0 as a whole it is wrong
    )


def program(platform, conv, x, kernel):
    """Export a gradient and a Hessian-vector product, as text."""

    def derivatives(x, kernel):
        gradient = jax.grad(lambda x, kernel: jnp.sum(conv(x, kernel) ** 2), (0, 1))
        return jax.jvp(gradient, (x, kernel), (x, kernel))

    exported = jax.export.export(jax.jit(derivatives), platforms=[platform])
    return exported(x, kernel).mlir_module()


def operations(program):
    """Count them by kind, convolutions with all that they are.

    But for rearrangements of the kernel, which are written for each of its uses.
    """
    program = re.sub(r" loc\(.*?\)|%[0-9a-z_#]+", "", program)
    kinds = re.findall(r"stablehlo\.(convolution\(.*|\w+)", program)
    rearrangements = ("reverse", "reshape", "transpose")
    return collections.Counter(kind for kind in kinds if kind not in rearrangements)


@pytest.mark.parametrize("case", [*DENSE[:3], DENSE[7], DEPTHWISE[1]], ids=str)
def test_the_platform_that_is_compiled_for_decides(case):
    """Programs for others are those of the stock convolution."""
    x, kernel, ours, stock = both(case)
    for platform in ("tpu", "cuda", "rocm"):
        actual = operations(program(platform, ours, x, kernel))
        assert actual == operations(program(platform, stock, x, kernel))
    on_cpus = program("cpu", ours, x, kernel)
    assert operations(on_cpus) != actual
    assert "stablehlo.case" not in on_cpus
    assert "call @" not in on_cpus


def test_one_program_for_several_platforms_and_any_batch():
    x, kernel, ours, stock = both(DENSE[0])
    x = x.astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    any_batch = jax.ShapeDtypeStruct(
        (*jax.export.symbolic_shape("n"), *x.shape[1:]), x.dtype
    )
    exported = jax.export.export(jax.jit(ours), platforms=["cpu", "tpu"])
    served = jax.export.deserialize(exported(any_batch, kernel).serialize())
    np.testing.assert_allclose(
        jax.jit(served.call)(x, kernel), stock(x, kernel), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", [DENSE[2], DEPTHWISE[0]], ids=str)
@pytest.mark.parametrize("unknown", ["n, _, _, _", "_, h, w, _"])
def test_exports_gradients_for_any_batch_and_any_images(case, unknown):
    """No choice that depends on their sizes can be made."""
    x, kernel, ours, stock = both((*case[:5], (1, 1), *case[6:]))

    def gradient(conv, x, kernel):
        return jax.grad(lambda kernel: jnp.sum(conv(x, kernel) ** 2))(kernel)

    any_size = jax.ShapeDtypeStruct(
        jax.export.symbolic_shape(unknown, like=x.shape), x.dtype
    )
    function = jax.jit(functools.partial(gradient, ours))
    exported = jax.export.export(function, platforms=["cpu"])(any_size, kernel)
    np.testing.assert_allclose(
        exported.call(x, kernel), gradient(stock, x, kernel), rtol=1e-5, atol=1e-4
    )


def test_keeps_the_precision_that_is_asked_for_around_it():
    """Elsewhere than on CPUs it matters; there it is decided before the lowering."""
    x, kernel, ours, _ = both(DENSE[0])

    def precise(x, kernel):
        with jax.default_matmul_precision("highest"):
            return ours(x, kernel)

    for conv in (precise, ours):
        text = program("tpu", conv, x, kernel)
        convolutions = text.count("stablehlo.convolution")
        assert text.count("HIGHEST") == 2 * convolutions * (conv is precise)


def test_no_slow_convolution_is_left():
    """Of 3 x 3, 1 x 1, strided and depthwise layers: what XLA would be given."""
    small = SMALLER_THAN_THE_KERNEL[:1]
    for case in DENSE[:3] + DENSE[6:8] + DEPTHWISE[:2] + small:
        x, kernel, ours, _ = both(case)
        gradient = jax.jit(jax.grad(lambda x, k, f=ours: jnp.sum(f(x, k) ** 2), (0, 1)))
        text = jax.export.export(gradient, platforms=["cpu"])(x, kernel).mlir_module()
        convolutions = text.count("stablehlo.convolution")
        if case in DEPTHWISE:  # with four spatial axes, for which there is no library
            assert convolutions == text.count("feature_group_count = 6") == 2
            assert text.count("dim_numbers = [b, 0, 1, 2, 3, f]") == 2
        else:
            products = (case[4] == (1, 1)) + (max(case[4]) == 1 or max(case[5]) > 1)
            products += 2 * (case in small)
            assert convolutions == 3 - products
            spread = re.findall(r"lhs_dilate = \[(.*?)\]", text)
            assert all(dilation == "1, 1" for dilation in spread)  # with zeros


def test_serves_flax_layers():
    layer = functools.partial(nn.Conv, 5, (3, 3), strides=2, use_bias=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    stock = layer()
    ours = layer(conv_general_dilated=models.conv_general_dilated)
    variables = stock.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        ours.apply(variables, x), stock.apply(variables, x), rtol=1e-4, atol=1e-5
    )
    half = layer(dtype=jnp.bfloat16, conv_general_dilated=models.conv_general_dilated)
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


@pytest.mark.usefixtures("x64")
def test_sums_over_the_devices_that_share_a_kernel():
    """Inside of shard_map JAX does so for what it knows to be the same everywhere."""
    x, kernel, ours, _ = both(DENSE[0])
    gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(ours(x, k))), (0, 1))
    grid = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
    mapped = jax.jit(jax.shard_map(gradient, mesh=grid, **specs))
    for one, two in zip(mapped(x, kernel), gradient(x, kernel), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def test_runs_without_jit():
    x, kernel, ours, stock = both(DENSE[0])
    with jax.disable_jit():
        actual = ours(x, kernel)
    np.testing.assert_allclose(actual, stock(x, kernel), rtol=1e-5, atol=1e-5)
