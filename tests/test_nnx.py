"""Losses of NNX modules against the same losses of plain trees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from hero_jax import family, parts
from tests import paper
from tests.problems import dense_hero

nnx = pytest.importorskip("flax.nnx")
import hero_jax.nnx  # noqa: E402

nnx_hero = functools.partial(hero_jax.nnx.hero_value_and_grad, **paper.AS_IN_THE_PAPER)


class Net(nnx.Module):
    """A network with BatchNorm statistics and dropout."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(params=seed, dropout=seed + 1)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


class Plain(nnx.Module):
    """A network without state."""

    def __init__(self, seed=0, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, 5, rngs=rngs, param_dtype=dtype)
        self.last = nnx.Linear(5, 1, rngs=rngs, param_dtype=dtype)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def plain_apply(params, x):
    """The same as a function of a tree."""
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def batch(size=16, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (size, 4), dtype)
    return x, jnp.sin(x.sum(1, keepdims=True))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def tree_of(state):
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


@pytest.mark.usefixtures("x64")
def test_equals_dense_hessian():
    model, (x, y) = Plain(dtype=jnp.float64), batch(dtype=jnp.float64)
    params = tree_of(nnx.state(model, nnx.Param))
    expected, expected_metrics = dense_hero(
        lambda p: jnp.mean((plain_apply(p, x) - y) ** 2),
        params,
        h=0.3,
        gamma=0.7,
        direction="adaptive",
        reduction="sum",
    )
    value_and_grad = nnx_hero(
        lambda model, x, y: (loss_fn(model, x, y), "aux"),
        h=0.3,
        gamma=0.7,
        perturbation="adaptive",
        has_aux=True,
        return_metrics=True,
    )
    (loss, aux), grads, metrics = value_and_grad(model, x, y)
    assert isinstance(grads, nnx.State)
    # Float64 rounds at 1e-16; sums of a few dozen terms leave 1e-10 far away.
    chex.assert_trees_all_close(tree_of(grads), expected, rtol=1e-10)
    chex.assert_trees_all_close(metrics._asdict(), expected_metrics, rtol=1e-10)
    np.testing.assert_allclose(loss, loss_fn(model, x, y), rtol=1e-12)
    assert aux == "aux"
    chex.assert_trees_all_equal(tree_of(nnx.state(model, nnx.Param)), params)


FAMILY = {
    "HERO": lambda f, **kw: nnx_hero(f, h=3.0, gamma=0.5, **kw),
    "GRAD-L1": lambda f, **kw: hero_jax.nnx.over_modules(family.grad_l1_value_and_grad)(
        f, strength=0.5, **kw
    ),
    "GNP": lambda f, **kw: hero_jax.nnx.over_modules(family.gnp_value_and_grad)(
        f, strength=0.5, radius=0.5, **kw
    ),
    "GSAM": lambda f, **kw: hero_jax.nnx.over_modules(family.gsam_value_and_grad)(
        f, h=0.5, alpha=0.5, **kw
    ),
    "CURE": lambda f, **kw: hero_jax.nnx.over_modules(family.cure_value_and_grad)(
        f, h=0.5, gamma=0.5, **kw
    ),
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in ("HERO", "CURE") else pytest.mark.slow)
        for name in FAMILY
    ],
)
def test_state_is_that_of_one_clean_pass(method):
    """BatchNorm statistics, and the number of keys drawn for dropout."""
    x, y = batch()
    model, clean = Net(), Net()
    expected = loss_fn(clean, x, y)
    before = nnx.state(Net(), nnx.Not(nnx.Param))
    loss, grads = nnx.jit(FAMILY[method](loss_fn))(model, x, y)
    # Two compilations of the same float32 formula: a few rounding errors apart.
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    after, expected = (nnx.state(m, nnx.Not(nnx.Param)) for m in (model, clean))
    count = after["dropout"]["rngs"]["count"]
    assert int(count[...] if hasattr(count, "__getitem__") else count.value) == 1
    chex.assert_trees_all_close(after["norm"], expected["norm"], rtol=1e-5)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(after["norm"], before["norm"], rtol=1e-2)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, nnx.state(model, nnx.Param))


def test_dropout_is_the_same_in_all_passes():
    """The loss is linear in W under any mask, so a common mask leaves no difference."""

    class Linear(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.arange(1.0, 101.0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    model = Linear()
    _, _, metrics = nnx_hero(
        lambda model: jnp.sum(model.dropout(model.w[...])),
        h=1.0,
        gamma=1.0,
        penalty_mask=True,
        return_metrics=True,
    )(model)
    assert float(metrics.grad_norm) > 1
    np.testing.assert_array_equal(metrics.grad_difference_norm, 0.0)


def test_trains_with_an_optimizer_and_is_compiled_once():
    model, (x, y), traces = Net(), batch(), []
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def counted(model, x, y):
        traces.append(None)
        return loss_fn(model, x, y)

    value_and_grad = nnx_hero(counted, h=1.0, gamma=0.1)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = value_and_grad(model, x, y)
        optimizer.update(model, grads)
        return loss

    first = float(step(model, optimizer, x, y))
    traced = len(traces)
    for _ in range(80):
        last = float(step(model, optimizer, x, y))
    assert last < 0.6 * first
    assert len(traces) == traced == 2  # the clean pass and the perturbed one
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0


@pytest.mark.slow
def test_modules_among_the_other_arguments_keep_their_clean_state():
    x, _ = batch()
    model, teacher, rngs = Plain(), Net(3), nnx.Rngs(7)

    def loss(x, model, others, *, rngs):
        noise = jax.random.normal(rngs.noise(), x.shape)
        target = others["teacher"](x)
        return jnp.mean((model(x + noise) - target) ** 2) * others["scale"]

    value_and_grad = nnx_hero(loss, 1, h=1.0, gamma=0.1)
    found, grads = value_and_grad(
        x, model, {"teacher": teacher, "scale": 2.0}, rngs=rngs
    )
    fresh, same_rngs = Net(3), nnx.Rngs(7)
    expected = loss(x, model, {"teacher": fresh, "scale": 2.0}, rngs=same_rngs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    chex.assert_trees_all_equal(rngs.noise(), same_rngs.noise())
    statistics = [nnx.state(m, nnx.BatchStat) for m in (teacher, fresh)]
    chex.assert_trees_all_close(*statistics, rtol=1e-6)
    chex.assert_trees_all_equal_shapes(grads, nnx.state(model, nnx.Param))


@pytest.mark.slow
def test_tied_weights_count_once():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    model, x = Tied(), jnp.ones((2, 3))
    params = tree_of(nnx.state(model, nnx.Param))["first"]
    linear = lambda p, x: x @ p["kernel"] + p["bias"]
    expected = paper.hero_value_and_grad(
        lambda p: jnp.mean(linear(p, jnp.tanh(linear(p, x))) ** 2), h=1.0, gamma=0.5
    )(params)
    loss, grads = nnx_hero(lambda model: jnp.mean(model(x) ** 2), h=1.0, gamma=0.5)(
        model
    )
    # Two orders of the same sums in float32.
    chex.assert_trees_all_close(
        (loss, tree_of(grads)["first"]), expected, rtol=1e-4, atol=1e-6
    )


def test_wrt_and_masks_select_leaves():
    model, (x, y) = Plain(), batch()
    first = lambda path, _: path[0] == "first"
    _, grads = nnx_hero(loss_fn, h=1.0, gamma=0.5, wrt=nnx.All(nnx.Param, first))(
        model, x, y
    )
    assert [*grads] == ["first"]
    kernels = nnx.All(nnx.Param, lambda path, _: path[-1] == "kernel")
    _, grads = nnx_hero(loss_fn, h=1.0, gamma=0.5, wrt=kernels)(model, x, y)
    assert [*grads["first"]] == [*grads["last"]] == ["kernel"]
    # Leaves that are neither perturbed nor penalized may as well be constants.
    only = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    _, masked = nnx_hero(loss_fn, h=1.0, gamma=0.5, perturb_mask=only)(model, x, y)
    expected = {name: {"kernel": layer["kernel"]} for name, layer in masked.items()}
    chex.assert_trees_all_close(
        tree_of(grads), tree_of(nnx.State(expected)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4,), (4, 8)])
def test_parts_of_a_batch_leave_the_mean_of_their_state(sizes):
    """Those of parts of parts, too."""
    x, y = batch()
    model = Net()
    step = nnx_hero(loss_fn, h=1.0, gamma=0.1)
    for size in sizes:
        step = parts.in_parts(step, size, batch_argnums=(1, 2))
    step(model, x, y)
    each = [Net() for _ in range(4)]
    for k, part in enumerate(each):
        part(x[4 * k : 4 * k + 4])
    statistics = [nnx.state(m, nnx.BatchStat) for m in each]
    mean = jax.tree.map(lambda *s: sum(s) / 4, *statistics)
    found = nnx.state(model, nnx.BatchStat)
    chex.assert_trees_all_close(found, mean, rtol=1e-5, atol=1e-7)
    clean = each[0].dropout(jnp.ones((8,)))
    chex.assert_trees_all_equal(model.dropout(jnp.ones((8,))), clean)


def test_weights_in_half_precision():
    model, (x, y) = Plain(dtype=jnp.bfloat16), batch()
    _, grads = nnx_hero(loss_fn, h=1.0, gamma=0.5)(model, x, y)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, nnx.state(model, nnx.Param))


def test_quantized_weights_go_back_into_the_module():
    model, (x, _) = Plain(), batch()
    params = nnx.state(model, nnx.Param)
    quantized = hero_jax.quant.quantize(params, {"first/*": 8, "*": 4})
    is_leaf = hero_jax.quant.is_quantized
    leaves = jax.tree.leaves(quantized, is_leaf=is_leaf)
    assert [leaf.bits for leaf in leaves if is_leaf(leaf)] == [8, 4]
    rounded = hero_jax.quant.dequantize(quantized)
    nnx.update(model, rounded)
    expected = plain_apply(tree_of(rounded), x)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(tree_of(rounded)["last"]["kernel"])) <= 16


class Changing(nnx.Module):
    """Changes itself when it is called, in a way that is asked for."""

    def __init__(self, way):
        self.way, self.calls = way, 0
        self.late = getattr(nnx, "data", lambda x: x)(None)  # since Flax 0.12
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        if self.way == "counter":
            self.calls += 1
        elif self.way == "mode":
            self.linear.eval()
            self.calls = -1
        elif self.way == "deletion":
            del self.seen
        elif self.way == "late variable":
            self.late = nnx.BatchStat(x.mean())
        elif self.way == "new variable":
            self.new = nnx.BatchStat(x.mean())
        return self.linear(x)


@pytest.mark.parametrize("way", ["counter", "mode", "deletion", "late variable"])
def test_changes_that_variables_cannot_carry_out_are_refused(way):
    """Lost in silence, a counter would stay at zero."""
    value_and_grad = nnx_hero(loss_fn, h=1.0, gamma=0.0)
    with pytest.raises(ValueError, match=r"must change variables of the modules only"):
        value_and_grad(Changing(way), *batch())


def test_new_variables_stay():
    (x, y), model = batch(), Changing("new variable")
    nnx_hero(loss_fn, h=1.0, gamma=0.0)(model, x, y)
    np.testing.assert_allclose(model.new[...], x.mean(), rtol=1e-6)


def test_a_module_is_no_tree_of_weights():
    """As one, BatchNorm's statistics would get gradients: in Flax 0.12 it is a tree."""
    model, (x, y) = Net(), batch()
    trees = [nnx.state(model)]
    if jax.tree_util.all_leaves([model]) is False:
        trees.append(model)
    for tree in trees:
        with pytest.raises(
            TypeError, match=r"weights alone.*'BatchStat'.*hero_jax.nnx"
        ):
            paper.hero_value_and_grad(loss_fn, h=1.0, gamma=0.1)(tree, x, y)


def test_what_the_loss_returns_is_checked():
    model, (x, y) = Plain(), batch()
    make = lambda loss, **kw: nnx_hero(loss, h=1.0, gamma=0.1, **kw)
    pair = lambda model, x, y: (loss_fn(model, x, y), x)
    with pytest.raises(TypeError, match=r"got a tuple of 2.*has_aux=True"):
        make(pair)(model, x, y)
    with pytest.raises(TypeError, match=r"must return a pair .*got float32"):
        make(loss_fn, has_aux=True)(model, x, y)
    with pytest.raises(TypeError, match=r"scalar loss.*mean over the examples"):
        make(lambda model, x, y: (model(x) - y)[:, 0])(model, x, y)


def test_gamma_with_nothing_to_penalize_is_refused():
    model, (x, y) = Plain(), batch()
    options = {"wrt": nnx.PathContains("bias"), "perturbation": "normalized"}
    make = lambda **kw: nnx_hero(loss_fn, h=1.0, **options, **kw)
    with pytest.raises(ValueError, match=r"gamma must have leaves.*penalty_mask=True"):
        make(gamma=0.1)(model, x, y)
    first_order, penalized = (
        tree_of(make(penalty_mask=True, gamma=gamma)(model, x, y)[1])["last"]["bias"]
        for gamma in (0.0, 0.1)
    )
    assert float(abs(penalized - first_order)[0]) > 1e-3


def test_errors():
    model, (x, y) = Plain(), batch()
    make = lambda *args, **kw: nnx_hero(loss_fn, *args, h=1.0, gamma=0.1, **kw)
    with pytest.raises(TypeError, match=r"argument 0 must be an nnx.Module, got dict"):
        make()({"kernel": x}, x, y)
    with pytest.raises(
        TypeError, match=r"positional argument 0 must be .* got NoneType"
    ):
        make()(model=model, x=x, y=y)
    with pytest.raises(
        TypeError, match=r"argnums must be an integer >= 0, got str: 'model'"
    ):
        make("model")
    with pytest.raises(
        ValueError, match=r"wrt must select .*Cache.* none of this Plain"
    ):
        make(wrt=nnx.Cache)(model, x, y)
    with pytest.raises(ValueError, match=r"none of this Plain.*PathContains"):
        make(wrt="kernel")(model, x, y)
    with pytest.raises(ValueError, match=r"h must be finite and >= 0"):
        nnx_hero(loss_fn, h=-1.0, gamma=0.1)
    with pytest.raises(TypeError, match=r"loss_fn must be a callable"):
        nnx_hero(None, h=1.0, gamma=0.1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'rho'"):
        make(rho=0.1)
    with pytest.raises(TypeError, match=r"must be an nnx.Module, got list.*nnx.List"):
        make()([model], x, y)
