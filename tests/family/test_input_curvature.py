"""CURE against the penalized loss written out and differentiated twice."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hero_jax
from tests.problems import mlp_batch, mlp_loss, mlp_params


def penalized(params, x, y, h, gamma):
    """Moosavi-Dezfooli et al. (2019), example by example, differentiable by params."""

    def of_example(x, y):
        loss = lambda x: mlp_loss(params, x[None], y[None])
        clean = jax.grad(loss)(x)
        signs = jnp.sign(clean)
        z = jax.lax.stop_gradient(signs / jnp.linalg.norm(signs))
        return loss(x), jnp.sum((jax.grad(loss)(x + h * z) - clean) ** 2)

    losses, penalties = jax.vmap(of_example)(x, y)
    return losses.mean() + gamma * penalties.mean()


@pytest.mark.usefixtures("x64")
def test_equals_reverse_over_reverse():
    params, (x, y) = mlp_params(), mlp_batch()
    h, gamma = 0.5, 0.3
    gradient_of = jax.jit(jax.grad(penalized))
    expected = gradient_of(params, x, y, h, gamma)
    plain = gradient_of(params, x, y, h, 0.0)
    value, gradient = jax.jit(
        lambda h, gamma: hero_jax.family.cure_value_and_grad(
            mlp_loss, h=h, gamma=gamma
        )(params, x, y)
    )(h, gamma)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-10)
    np.testing.assert_allclose(value, mlp_loss(params, x, y), rtol=1e-12)
    changes = jax.tree.map(lambda a, b: float(abs(a - b).max()), expected, plain)
    assert min(jax.tree.leaves(changes)) > 1e-6  # the penalty reaches every leaf


@pytest.mark.usefixtures("x64")
def test_gamma_has_the_unit_of_one_over_the_loss():
    params, (x, y) = mlp_params(), mlp_batch()
    scale = 2.0**15
    cure = hero_jax.family.cure_value_and_grad(
        lambda *args: scale * mlp_loss(*args), h=0.5, gamma=0.3 / scale
    )
    scaled = jax.jit(cure)(params, x, y)[1]
    expected = jax.jit(jax.grad(penalized))(params, x, y, 0.5, 0.3)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x / scale, scaled), expected, rtol=1e-10
    )


@pytest.mark.usefixtures("x64")
def test_the_mean_over_devices_is_that_of_all_examples():
    params, (x, y) = mlp_params(), mlp_batch(size=8)
    cure = jax.jit(hero_jax.family.cure_value_and_grad(mlp_loss, h=0.5, gamma=0.3))
    parts = [cure(params, x[k : k + 4], y[k : k + 4]) for k in (0, 4)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    chex.assert_trees_all_close(mean, cure(params, x, y), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_trees_of_inputs_have_one_direction_for_an_example():
    params, (x, y) = mlp_params(), mlp_batch()

    def split_loss(y, x, params):
        return mlp_loss(params, jnp.concatenate([x["a"], x["b"]], 1), y)

    split = hero_jax.family.cure_value_and_grad(
        split_loss, 2, input_argnum=1, h=0.5, gamma=0.3
    )
    found = jax.jit(split)(y, {"a": x[:, :1], "b": x[:, 1:]}, params)
    whole = hero_jax.family.cure_value_and_grad(mlp_loss, h=0.5, gamma=0.3)
    expected = jax.jit(whole)(params, x, y)
    chex.assert_trees_all_close(found, expected, rtol=1e-10)


def test_images_through_a_network_with_auxiliary_output():
    model = nn.Sequential([nn.Conv(4, (3, 3)), jnp.tanh, lambda x: x.mean((1, 2))])
    images = jax.random.normal(jax.random.key(0), (5, 6, 6, 1))
    params = model.init(jax.random.key(1), images)

    def loss(params, images, target):
        logits = model.apply(params, images)
        return jnp.mean((logits - target) ** 2), logits

    cure = hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=0.0, has_aux=True)
    plain = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(plain)(params, images, 1.0)
    # Two programs for one float32 formula.
    found = jax.jit(cure)(params, images, 1.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"h": 0.5, "gamma": 0.0}, {"h": 0.0, "gamma": 0.5}]
)
def test_switched_off_it_is_the_plain_gradient(options):
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    found = hero_jax.family.cure_value_and_grad(mlp_loss, **options)(params, *batch)
    expected = jax.value_and_grad(mlp_loss)(params, *batch)
    # Two programs for one float32 formula.
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = jax.make_jaxpr(jax.value_and_grad(mlp_loss))(params, *batch)
    off = jax.make_jaxpr(hero_jax.family.cure_value_and_grad(mlp_loss, **options))
    assert len(off(params, *batch).eqns) < 1.5 * len(plain.eqns)


@pytest.mark.slow
def test_half_precision_is_moved_in_float32():
    """A step of 0.003 in one of four pixels is lost on a bfloat16 near 1."""
    params, (x, y) = mlp_params(dtype=jnp.bfloat16), mlp_batch(dtype=jnp.bfloat16)
    cure = hero_jax.family.cure_value_and_grad(mlp_loss, h=3e-3, gamma=1e4)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, x, y))
    _, expected = cure(*wide)
    _, found = cure(params, x, y)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    # The result is rounded to 8 bits.
    chex.assert_trees_all_close(found, expected, rtol=2**-8, atol=1e-6)


def test_an_input_without_gradient_is_not_moved():
    """A dead rectifier: the sign is zero, and so is the penalty, not NaN."""
    loss = lambda w, x: jnp.mean(jax.nn.relu(x @ w) ** 2)
    cure = hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=1.0)
    _, gradient = cure(jnp.array([1.0, 1.0]), -jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, np.zeros(2))


def test_errors():
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    w, x = jnp.ones(2), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"gamma must be finite and >= 0"):
        hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=-1.0)
    with pytest.raises(ValueError, match=r"input_argnum must differ from argnums"):
        hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=1.0, input_argnum=0)
    with pytest.raises(TypeError, match=r"input_argnum must be an integer >= 0"):
        hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=1.0, input_argnum="x")
    cure = hero_jax.family.cure_value_and_grad(loss, h=0.1, gamma=1.0)
    with pytest.raises(TypeError, match=r"x must have real floating-point .* int32"):
        cure(w, x.astype(int))
    with pytest.raises(TypeError, match=r"params must have real floating-point"):
        cure(w.astype(int), x)
    with pytest.raises(
        ValueError, match=r"input_argnum or its default .* must have the same number"
    ):
        cure(w, jnp.float32(1.0))
