"""Directions that move what gets quantized, and the penalty without a unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from hero_jax import perturbation, quant
from tests.problems import mlp_batch, mlp_loss, mlp_params, slices

KERNELS = [False, True, False, True, True, False]
"""Leaf order: hidden 0 bias, kernel; hidden 1 bias, kernel; out kernel, temperature."""


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def chosen(params):
    """Positions of the kernels in the flattened tree."""
    return [i for i, keep in zip(slices(params), KERNELS, strict=True) if keep]


def written_out(name, W, g, kernels):
    """Return z by its definition, in numpy."""
    z = np.zeros_like(W)
    for i in kernels:
        if name == "rounding":
            z[i] = 0.5 * (W[i].max() - W[i].min()) / 7 * np.sign(g[i])
            continue
        u = W[i] ** 2 * g[i]
        z[i] = np.linalg.norm(W[i]) * u / np.linalg.norm(u)
    return z


DIRECTIONS = {
    "relative": perturbation.relative,
    "rounding": perturbation.rounding(bits=3),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["norm", "sum"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_equals_dense_hessian(name, reduction):
    """Kernels alone move; of the penalty of norms, each is weighed by its own step."""
    params, batch = mlp_params(), mlp_batch()
    loss = lambda w: mlp_loss(ravel_pytree(params)[1](w), *batch)
    h, gamma, kernels = 0.1, 0.7, chosen(params)
    W = flat(params)
    g = np.asarray(jax.grad(loss)(W))
    step = h * written_out(name, W, g, kernels)
    U = jnp.asarray(W + step)
    d = np.asarray(jax.grad(loss)(U)) - g
    v, penalty = np.zeros_like(W), 0.0
    for i in kernels:
        if reduction == "sum":
            penalty += d[i] @ d[i]
            v[i] = 2 * d[i]
        else:
            penalty += np.linalg.norm(step[i]) * np.linalg.norm(d[i])
            v[i] = np.linalg.norm(step[i]) * d[i] / np.linalg.norm(d[i])
    product = gamma * np.asarray(jax.hessian(loss)(U)) @ v
    _, gradient, metrics = hero_jax.hero_value_and_grad(
        mlp_loss,
        h=h,
        gamma=gamma,
        perturbation=DIRECTIONS[name],
        reduction=reduction,
        return_metrics=True,
    )(params, *batch)
    np.testing.assert_allclose(flat(gradient), g + d + product, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(metrics.penalty, penalty, rtol=1e-10)
    np.testing.assert_allclose(
        metrics.penalty_grad_norm, np.linalg.norm(product), rtol=1e-10
    )


@pytest.mark.usefixtures("x64")
def test_the_penalty_of_norms_bounds_the_second_order_term():
    """On a quadratic, L(U) - L(W) - <g, hz> is at most half of the penalty."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 6))
    H = jnp.asarray(half @ half.T)
    loss = lambda params: 0.5 * params["w"].ravel() @ H @ params["w"].ravel()
    params = {"w": jnp.asarray(rng.normal(size=(2, 3)))}
    value, g = jax.value_and_grad(loss)(params)
    *_, metrics = hero_jax.hero_value_and_grad(
        loss,
        h=0.3,
        gamma=0.5,
        perturbation="relative",
        reduction="norm",
        return_metrics=True,
    )(params)
    step = 0.3 * perturbation.relative(params, g)["w"]
    second_order = metrics.perturbed_loss - value - jnp.sum(g["w"] * step)
    assert 0 < second_order <= 0.5 * metrics.penalty


def test_gamma_of_the_penalty_of_norms_has_no_unit():
    """For 1,000 times the loss the gradient is 1,000 times as long."""
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)

    def gradient(S):
        return hero_jax.hero_value_and_grad(
            lambda params: S * mlp_loss(params, *batch),
            h=0.1,
            gamma=0.5,
            perturbation="relative",
            reduction="norm",
        )(params)[1]

    np.testing.assert_allclose(
        flat(gradient(1000.0)), 1000.0 * flat(gradient(1.0)), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, "output"])
def test_rounding_is_half_of_the_quantizers_bin(bits, axis):
    """No weight is rounded further, and some are rounded nearly as far."""
    rng = np.random.default_rng(bits)
    W = {"kernel": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)}
    g = {"kernel": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)}
    z = perturbation.rounding(bits, axis)(W, g)["kernel"]
    rounded = quant.dequantize(quant.quantize(W, bits, axis=axis))["kernel"]
    share = np.abs(rounded - W["kernel"]) / np.abs(z)
    assert 0.9 < share.max() < 1 + 1e-3
    np.testing.assert_array_equal(np.sign(z), np.sign(g["kernel"]))
    assert len(np.unique(np.abs(z))) == (1 if axis is None else 8)


def test_rounding_moves_what_is_quantized_alone():
    W = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "dead": jnp.zeros((4, 3))}
    z = perturbation.rounding(4)(W, W)
    assert not z["bias"].any()
    assert not z["dead"].any()
    assert not np.any(perturbation.relative(W, W)["dead"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["relative", "rounding"])
def test_each_layer_of_a_stack_moves_by_itself(name):
    direction = DIRECTIONS[name]
    draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(2, 4, 3)))
    one = lambda x, k: {"kernel": x[k], "bias": jnp.zeros(3)}
    stack = lambda x: {"kernel": x, "bias": jnp.zeros((2, 3))}
    W = draw(0) * jnp.asarray([1.0, 10.0])[:, None, None]
    z = direction(stack(W), stack(draw(1)))["kernel"]
    for k in range(2):
        alone = direction(one(W, k), one(draw(1), k))["kernel"]
        np.testing.assert_allclose(z[k], alone, rtol=1e-12)


def test_a_mask_lets_other_leaves_move():
    W = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    share = lambda mask: perturbation.share_moved(
        W, W, h=0.1, perturbation="relative", perturb_mask=mask
    )
    np.testing.assert_allclose([*share(None).values()], [0.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose([*share(True).values()], [0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["layerwise", "adaptive", "normalized", "relative"])
def test_the_step_for_a_share_moves_the_kernels_by_it(name):
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    g = jax.grad(mlp_loss)(params, *batch)
    h = perturbation.step_for(0.05, params, g, perturbation=name)
    *_, z = [perturbation.resolve(name)(params, g)]
    norm = lambda tree: np.linalg.norm(
        np.concatenate([flat(tree)[i] for i in chosen(params)])
    )
    np.testing.assert_allclose(h * norm(z), 0.05 * norm(params), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["norm", "sum"])
def test_zero_gradients_and_zero_weights_are_finite(reduction):
    """One leaf has both, one only the zero weights, one only the zero gradient."""
    params = {"a": jnp.zeros((3, 2)), "b": jnp.ones((3, 2))}
    params |= {"c": jnp.zeros((3, 2)), "d": jnp.ones((3, 2))}
    hero = hero_jax.hero_value_and_grad(
        lambda p: jnp.sum(p["a"] * 0.0 + p["b"] ** 2 + p["c"] + 0.0 * p["d"]),
        h=0.1,
        gamma=0.5,
        perturbation="relative",
        reduction=reduction,
    )
    with jax.debug_nans(True):
        _, grads = jax.jit(hero)(params)
    assert not np.any(grads["a"])
    np.testing.assert_array_equal(grads["c"], 1.0)
    assert not np.any(grads["d"])
    assert np.all(grads["b"] > 2.0)


def test_what_does_not_move_has_no_share_and_no_step():
    """Under SAM a bias of zeros moves, but not by a share of its norm."""
    W = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    g = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    moved = perturbation.share_moved(W, g, h=1.0, perturbation="normalized")
    assert moved["bias"] == 0.0
    assert moved["kernel"] > 0.0
    zeros = jax.tree.map(jnp.zeros_like, g)
    assert np.isinf(perturbation.step_for(0.1, W, zeros, perturbation="relative"))
    for params, mask in ((W, {"kernel": False, "bias": True}), (jnp.ones(3), True)):
        with pytest.raises(ValueError, match="an embedding that moves"):
            perturbation.step_for(
                0.1, params, params, perturbation="relative", perturb_mask=mask
            )


def test_eq_11_moves_a_kernel_by_less_the_larger_it_is():
    """By 1.73 / n of its norm, if weights and gradient are Gaussian."""
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (256, 128))
    share = perturbation.share_moved(draw(0), draw(1), h=1.0, perturbation="layerwise")
    assert float(share) == pytest.approx(3**0.5 / (256 * 128), rel=0.02)


def test_the_share_is_the_same_for_tiny_and_huge_weights_and_gradients():
    """The square of 1e-25 is zero in float32, that of 1e25 infinite."""
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (8, 4))
    expected = perturbation.relative(draw(0), draw(1))
    for scale in (1e-25, 1e25):
        for other in (1e-25, 1e25):
            z = perturbation.relative(scale * draw(0), other * draw(1))
            np.testing.assert_allclose(z / scale, expected, rtol=1e-5, atol=1e-6)


def test_the_default_is_relative_without_the_penalty():
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    grad_fn = lambda params: jax.grad(mlp_loss)(params, *batch)
    _, gradient = hero_jax.hero_value_and_grad(mlp_loss, h=0.04)(params, *batch)
    z = perturbation.relative(params, grad_fn(params))
    U = np.array(flat(params))
    for i in chosen(params):
        U[i] += 0.04 * flat(z)[i]
    expected = flat(grad_fn(ravel_pytree(params)[1](jnp.asarray(U))))
    np.testing.assert_allclose(flat(gradient), expected, rtol=1e-4, atol=1e-6)
    tx = hero_jax.hero(h=0.04)
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(flat(updates), flat(gradient), rtol=1e-5, atol=1e-6)


def test_a_penalty_of_norms_needs_a_leaf_that_moves():
    """Of sums it does not."""
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    options = {"h": 0.04, "gamma": 0.5}
    others = [not keep for keep in KERNELS]
    mask = jax.tree.unflatten(jax.tree.structure(params), others)
    with pytest.raises(ValueError, match="no penalized leaf moves"):
        hero_jax.hero_value_and_grad(mlp_loss, penalty_mask=mask, **options)(
            params, *batch
        )
    hero = hero_jax.hero_value_and_grad(
        mlp_loss, penalty_mask=mask, reduction="sum", return_metrics=True, **options
    )
    *_, metrics = hero(params, *batch)
    assert metrics.penalty > 0.0


def test_a_factory_that_was_not_called_is_named():
    for wrong in ("rounding", perturbation.rounding):
        with pytest.raises(ValueError, match=r"hero_jax\.perturbation\.r\w+\("):
            hero_jax.hero_value_and_grad(mlp_loss, h=1.0, gamma=0.1, perturbation=wrong)
    with pytest.raises(ValueError, match="perturb_mask"):
        hero_jax.hero_value_and_grad(
            jnp.sum, h=1.0, gamma=0.0, perturbation="relative"
        )(jnp.ones(3))
    with pytest.raises(ValueError, match="bits must be"):
        perturbation.rounding(bits=1)
