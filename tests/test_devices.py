"""Eight devices against one: pmap, shard_map, vmap and jit of sharded arrays."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hero_jax
from hero_jax import family
from hero_jax.parts import averaged, in_parts
from tests import paper
from tests.problems import dense_hero, mlp_batch, mlp_loss, mlp_params

DEVICES = 8
EXAMPLES = 24
# Leaf order: hidden 0 bias, kernel; hidden 1 bias, kernel; out kernel, temperature.
MASKS = {
    "default": {},
    "disjoint": {
        "perturb_mask": [True, False, False, True, False, True],
        "penalty_mask": [False, True, False, False, True, True],
    },
}
METHODS = {
    "hero": lambda loss, **kw: paper.hero_value_and_grad(loss, h=0.3, gamma=0.7, **kw),
    "first-order": lambda loss, **kw: paper.hero_value_and_grad(
        loss, h=0.3, gamma=0.0, **kw
    ),
    "plain": lambda loss, **kw: paper.hero_value_and_grad(loss, h=0.0, gamma=0.0, **kw),
    "GRAD-L1": lambda loss, **kw: family.grad_l1_value_and_grad(
        loss, strength=0.3, **kw
    ),
    "GNP": lambda loss, **kw: family.gnp_value_and_grad(
        loss, strength=0.3, radius=0.1, **kw
    ),
    "GSAM": lambda loss, **kw: family.gsam_value_and_grad(loss, h=0.3, alpha=0.4, **kw),
}


def over_axis(scope, make, loss, axis_name="data", **options):
    """One perturbation for all devices, or one for each."""
    if scope == "global":
        return make(loss, axis_name=axis_name, **options)
    return averaged(make(loss, **options), axis_name)


def some(cases, *quick):
    """Mark all cases slow but these."""
    return [
        pytest.param(case, marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def pairs(*axes, quick):
    """Mark all combinations slow but the quick ones, which have all parts in them."""
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow)
        for case in itertools.product(*axes)
    ]


def close(actual, expected):
    """Sums in another order, in float64."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


def in_single_precision():
    return mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32, size=EXAMPLES)


def mesh(size=DEVICES):
    return Mesh(np.array(jax.devices()[:size]), ("data",))


def pmapped(function, devices=DEVICES):
    """Spread the examples over devices; the result of the first one."""

    def split(x):
        return x.reshape(devices, -1, *x.shape[1:])

    mapped = jax.pmap(
        function,
        axis_name="data",
        in_axes=(None, 0, 0),
        devices=jax.devices()[:devices],
    )
    lower = lambda params, x, y: mapped.lower(params, split(x), split(y))
    call = lambda params, x, y: jax.tree.map(
        lambda leaf: np.asarray(leaf)[0], mapped(params, split(x), split(y))
    )
    call.lower = lower
    return call


def shard_mapped(function, devices=DEVICES, check_vma=True):
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh(devices),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def unchecked(function, devices=DEVICES):
    return shard_mapped(function, devices, check_vma=False)


def vmapped(function, devices=DEVICES):
    def call(params, x, y):
        x, y = (a.reshape(devices, -1, *a.shape[1:]) for a in (x, y))
        mapped = jax.vmap(function, in_axes=(None, 0, 0), axis_name="data")
        return jax.tree.map(lambda leaf: leaf[0], mapped(params, x, y))

    return jax.jit(call)


MAPS = {
    "pmap": pmapped,
    "shard_map": shard_mapped,
    "shard_map unchecked": unchecked,
    "vmap": vmapped,
}


def settings(direction, reduction, masks, params):
    trees = {
        name: jax.tree.unflatten(jax.tree.structure(params), mask)
        for name, mask in MASKS[masks].items()
    }
    return {"perturbation": direction, "reduction": reduction, **trees}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("direction", "reduction", "masks"),
    [
        ("layerwise", "sum", "default"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("adaptive", "mean", "disjoint"),
                ("adaptive", "sum", "default"),
                ("normalized", "sum", "default"),
            ]
        ),
    ],
)
def test_hero_is_that_of_the_whole_batch(direction, reduction, masks):
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    kwargs = settings(direction, reduction, masks, params)
    make = lambda **kw: paper.hero_value_and_grad(
        mlp_loss, h=0.3, gamma=0.7, return_metrics=True, **kwargs, **kw
    )
    expected, metrics = dense_hero(
        mlp_loss,
        params,
        *batch,
        h=0.3,
        gamma=0.7,
        direction=direction,
        reduction=reduction,
        perturbed=MASKS[masks].get("perturb_mask"),
        penalized=MASKS[masks].get("penalty_mask"),
    )
    expected = (mlp_loss(params, *batch), expected, hero_jax.Metrics(**metrics))
    for transform in (pmapped, shard_mapped):
        close(transform(make(axis_name="data"))(params, *batch), expected)
    sharded = jax.device_put(batch, NamedSharding(mesh(), P("data")))
    close(jax.jit(make())(params, *sharded), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "map_name"),
    pairs(
        METHODS,
        MAPS,
        quick=[
            ("hero", "pmap"),
            ("hero", "shard_map"),
            ("first-order", "pmap"),
            ("plain", "shard_map"),
            ("GRAD-L1", "shard_map"),
        ],
    ),
)
def test_every_method_is_that_of_the_whole_batch(method, map_name):
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    expected = jax.jit(METHODS[method](mlp_loss))(params, *batch)
    actual = MAPS[map_name](METHODS[method](mlp_loss, axis_name="data"))
    close(actual(params, *batch), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("map_name", some(MAPS, "pmap", "shard_map"))
def test_a_mean_over_the_axis_within_the_loss_changes_nothing(map_name):
    """As a synchronized normalization takes it, and as the last operation."""
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)

    def loss(params, x, y, over=lambda x: x):
        for layer in params["hidden"]:
            x = x @ layer["kernel"]
            x = jnp.tanh((x - over(x.mean(0))) / jnp.exp(over(jnp.mean(x**2))))
        x = x @ params["out"]["kernel"] * jnp.exp(params["out"]["temperature"])
        return over(jnp.mean((x - y) ** 2))

    within = lambda *args: loss(*args, over=lambda x: lax.pmean(x, "data"))
    for make in (METHODS["hero"], METHODS["GRAD-L1"]):
        actual = MAPS[map_name](make(within, axis_name="data"))(params, *batch)
        close(actual, jax.jit(make(loss))(params, *batch))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("map_name", MAPS)
def test_the_mean_and_not_the_sum(map_name):
    """L = a (w - x)^2 / 2 per example, a = 2: every term of Eq. 13 in closed form."""
    w, x = 3.0, np.arange(EXAMPLES) / 10.0
    loss = lambda w, x, a: jnp.mean(a * (w - x) ** 2) / 2
    make = paper.hero_value_and_grad(
        loss,
        h=0.3,
        gamma=0.7,
        perturbation=lambda params, grads: grads,  # z = g shows every scale
        penalty_mask=True,
        axis_name="data",
    )
    g = 2 * (w - x.mean())
    expected = 2 * (w + 0.3 * g - x.mean()) + 0.7 * 2 * 2 * (2 * 0.3 * g)
    a = np.full(EXAMPLES, 2.0)
    value, gradient = MAPS[map_name](make)(jnp.float64(w), x, a)
    close((value, gradient), (np.mean((w - x) ** 2), expected))


LINKS = (optax.add_decayed_weights(1e-3), optax.sgd(0.02, momentum=0.9))
SCHEDULE = lambda count: 0.3 / (1.0 + count)


def chain(axis_name=None):
    return optax.chain(paper.hero(SCHEDULE, 0.05, axis_name=axis_name), *LINKS)


def train(tx, own=lambda params: params):
    """Return a function that takes three steps of a chain with `hero` in it."""

    def run(params, x, y):
        grad_fn = jax.grad(lambda params: mlp_loss(params, x, y))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                grad_fn(own(params)), state, params, grad_fn=grad_fn
            )
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), length=3)[0]

    return run


def varying(params):
    """Take the gradient of each device's own examples under shard_map's checks."""
    if hasattr(lax, "pcast"):
        return lax.pcast(params, "data", to="varying")
    return jax.tree.map(lambda x: lax.pvary(x, "data"), params)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("map_name", some(MAPS, "pmap", "shard_map"))
def test_the_link_of_a_chain(map_name):
    """Weights, momentum and metrics after three steps."""
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    expected = jax.jit(train(chain()))(params, *batch)
    own = {"own": varying} if map_name == "shard_map" else {}
    spread = MAPS[map_name](train(chain("data"), **own))
    close(spread(params, *batch), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "map_name"),
    pairs(
        METHODS,
        ("pmap", "shard_map"),
        quick=[("hero", "shard_map")],
    ),
)
def test_each_device_by_itself_is_as_many_parts_on_one(method, map_name):
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    make = METHODS[method]
    alone = jax.jit(make(mlp_loss))
    parts = [
        alone(params, x, y)
        for x, y in zip(*(np.split(np.asarray(a), DEVICES) for a in batch), strict=True)
    ]
    expected = jax.tree.map(lambda *xs: sum(xs) / DEVICES, *parts)
    local = MAPS[map_name](averaged(make(mlp_loss), "data"))
    close(local(params, *batch), expected)
    by_parts = in_parts(make(mlp_loss), EXAMPLES // DEVICES, batch_argnums=(1, 2))
    close(jax.jit(by_parts)(params, *batch), expected)
    if method in ("hero", "first-order", "GRAD-L1"):
        whole = alone(params, *batch)
        assert optax.tree.norm(optax.tree.sub(whole[1], expected[1])) > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "map_name"),
    pairs(
        ("jax", "hero"),
        MAPS,
        quick=[("hero", "shard_map"), ("jax", "shard_map")],
    ),
)
def test_the_number_of_devices_does_not_matter(name, map_name):
    """A perturbation for every three examples, on one device or four; and none."""
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    make = METHODS["hero"](mlp_loss, return_metrics=True)
    if name == "jax":
        make = jax.value_and_grad(mlp_loss)
    by_threes = in_parts(make, 3, batch_argnums=(1, 2))
    expected = jax.jit(by_threes)(params, *batch)
    spread = MAPS[map_name](averaged(by_threes, "data"), devices=4)
    close(spread(params, *batch), expected)
    whole = jax.jit(make)(params, *batch)
    as_one = jax.jit(in_parts(make, EXAMPLES, batch_argnums=[1, -1]))
    close(as_one(params, *batch), whole)
    if name == "jax":
        close(expected, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_parts_may_each_be_spread_over_the_devices():
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    make = METHODS["hero"](mlp_loss, axis_name="data")
    spread = shard_mapped(in_parts(make, 3, batch_argnums=(1, 2)), devices=4)
    # The first half of each device's six examples, then the second.
    order = np.arange(EXAMPLES).reshape(4, 2, 3).swapaxes(0, 1).ravel()
    expected = jax.jit(in_parts(METHODS["hero"](mlp_loss), 12, batch_argnums=(1, 2)))
    close(spread(params, *batch), expected(params, *(x[order] for x in batch)))


def every_second(params, x, y):
    return mlp_loss(params, x[::2], y[::2])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("map_name", "hvp"),
    [("pmap", hero_jax.FiniteDifference(0.01)), ("shard_map", "exact")],
)
def test_a_product_over_a_part_of_each_device(map_name, hvp):
    """With gamma traced and the product in a branch, like the means that it takes."""
    params, batch = mlp_params(), mlp_batch(size=2 * DEVICES)

    def make(gamma, **kwargs):
        return paper.hero_value_and_grad(
            mlp_loss, h=0.3, gamma=gamma, hvp=hvp, hvp_loss_fn=every_second, **kwargs
        )

    def local(params, x, y):
        gamma = 0.7 * jnp.mean(params["out"]["temperature"] ** 0)
        return lax.cond(
            gamma != 0,
            lambda: make(gamma, axis_name="data")(params, x, y),
            lambda: make(0.0, axis_name="data")(params, x, y),
        )

    expected = jax.jit(make(0.7))(params, *batch)
    actual = MAPS[map_name](local)(params, *batch)
    # The difference divides rounding by 0.01.
    chex.assert_trees_all_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_link_averages_the_gradient_of_its_product():
    params, batch = mlp_params(), mlp_batch(size=2 * DEVICES)

    def update(params, x, y, tx):
        whole, part = (
            lambda p, k=k: jax.grad(mlp_loss)(p, x[::k], y[::k]) for k in (1, 2)
        )
        return tx.update(
            whole(params), tx.init(params), params, grad_fn=whole, hvp_grad_fn=part
        )[0]

    alone = functools.partial(update, tx=paper.hero(h=0.3, gamma=0.7))
    expected = jax.jit(alone)(params, *batch)
    tx = paper.hero(h=0.3, gamma=0.7, axis_name="data")
    close(pmapped(functools.partial(update, tx=tx))(params, *batch), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_product_over_a_part_of_sharded_arrays(kind):
    if kind == "Explicit" and jax.__version_info__ < (0, 8):
        pytest.skip("JAX does not know how a part of a sharded array lies")
    params, batch = mlp_params(), mlp_batch(size=2 * DEVICES)
    run = jax.jit(
        paper.hero_value_and_grad(mlp_loss, h=0.3, gamma=0.7, hvp_loss_fn=every_second)
    )
    grid = jax.make_mesh((DEVICES,), ("data",), axis_types=(getattr(AxisType, kind),))
    with set_mesh(grid):
        sharded = jax.device_put(batch, NamedSharding(grid, P("data")))
        actual = run(jax.device_put(params, NamedSharding(grid, P())), *sharded)
    close(actual, run(params, *batch))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_auxiliary_outputs_of_parts_are_stacked():
    params, (x, y) = mlp_params(), mlp_batch(size=EXAMPLES)
    loss = lambda params, x, y: (mlp_loss(params, x, y), {"x": x.sum(0), "n": len(x)})
    for examples in (6, EXAMPLES):
        make = METHODS["hero"](loss, has_aux=True)
        by_parts = in_parts(make, examples, batch_argnums=(1, 2), has_aux=True)
        (_, aux), _ = jax.jit(by_parts)(params, x, y)
        np.testing.assert_allclose(
            aux["x"], np.asarray(x).reshape(-1, examples, 3).sum(1)
        )
        np.testing.assert_array_equal(aux["n"], [examples] * (EXAMPLES // examples))


@pytest.mark.usefixtures("x64")
def test_the_batch_may_be_a_tree_and_the_rest_stays_whole():
    params, (x, y) = mlp_params(), mlp_batch(size=EXAMPLES)
    scale = jnp.arange(3.0) + 1.0  # as many as there are examples to a part
    loss = lambda params, scale, batch: mlp_loss(params, batch["x"] * scale, batch["y"])
    actual = jax.jit(in_parts(METHODS["hero"](loss), 3, batch_argnums=2))(
        params, scale, {"x": x, "y": y}
    )
    expected = jax.jit(in_parts(METHODS["hero"](mlp_loss), 3, batch_argnums=(1, 2)))(
        params, x * scale, y
    )
    close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scope"),
    pairs(
        METHODS,
        ("global", "local"),
        quick=[*((method, "global") for method in METHODS), ("hero", "local")],
    ),
)
def test_half_precision_is_averaged_in_full(method, scope):
    """Eight gradients of which bfloat16 could not hold the sum."""
    loss = lambda w, x, y: jnp.mean(jnp.asarray(w, jnp.float32) * x * y)
    x = np.float32([256.0, *[1.0] * (DEVICES - 1)])
    mask = {} if method == "GSAM" else {"penalty_mask": True}  # of a scalar
    make = over_axis(scope, METHODS[method], loss, **mask)
    mean = jnp.bfloat16((256.0 + DEVICES - 1) / DEVICES)
    for transform in (pmapped, shard_mapped):
        _, gradient = transform(make)(jnp.bfloat16(1.0), x, np.ones_like(x))
        assert gradient.dtype == jnp.bfloat16
        assert gradient == mean
    by_parts = in_parts(METHODS[method](loss, **mask), 1, batch_argnums=(1, 2))
    assert by_parts(jnp.bfloat16(1.0), x, np.ones_like(x))[1] == mean


def test_a_link_averages_half_precision_in_full():
    loss = lambda w, x, y: jnp.mean(jnp.asarray(w, jnp.float32) * x * y)
    x = np.float32([256.0, *[1.0] * (DEVICES - 1)])
    mean = jnp.bfloat16((256.0 + DEVICES - 1) / DEVICES)
    link = paper.hero(0.3, 0.1, penalty_mask=True, axis_name="data")

    def update(w, x, y):
        grad_fn = jax.grad(loss)
        g = grad_fn(w, x, y)
        return link.update(
            g, link.init(w), w, grad_fn=lambda U: grad_fn(jnp.bfloat16(U), x, y)
        )[0]

    assert pmapped(update)(jnp.bfloat16(1.0), x, np.ones_like(x)) == mean


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("map_name", ["shard_map", "shard_map unchecked"])
def test_python_numbers_stay_what_they_are(map_name):
    """A loss may branch on them; weights among them would get a sum."""

    def loss(w, x, y, power, *, strength):
        penalty = strength * w if strength > 0.0 else 0.0
        return jnp.mean((w * x - y) ** 2) + (penalty if power > 1.0 else 0.0)

    value_and_grad = jax.value_and_grad(loss)
    local = averaged(value_and_grad, "data")
    step = MAPS[map_name](lambda w, x, y: local(w, x, y, 2.0, strength=0.5))
    w, x, y = jnp.float64(2.0), np.arange(1.0, 1.0 + EXAMPLES), np.ones(EXAMPLES)
    close(step(w, x, y), value_and_grad(w, x, y, 2.0, strength=0.5))
    if map_name == "shard_map":
        with pytest.raises(ValueError, match=r"the gradient must be those of each"):
            MAPS[map_name](lambda _, x, y: local(2.0, x, y, 2.0, strength=0.5))(w, x, y)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_one_bad_device_is_not_hidden(scope):
    params = {"w": jnp.ones((3, 2))}
    loss = lambda params, x, y: jnp.mean((jax.nn.relu(x @ params["w"]) - y) ** 2)
    x, y = np.ones((EXAMPLES, 3), np.float32), np.zeros((EXAMPLES, 2), np.float32)
    x[-1] = np.nan
    for transform in (pmapped, shard_mapped):
        _, grads = transform(over_axis(scope, METHODS["hero"], loss))(params, x, y)
        assert np.all(np.isnan(grads["w"]))


SHARDINGS = {
    "weights replicated": lambda x: P(),
    "weights sharded": lambda x: P(*[None] * (x.ndim - 1), "model") if x.ndim else P(),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "kind", "weights"),
    pairs(
        METHODS,
        ("Auto", "Explicit"),
        SHARDINGS,
        quick=[
            ("hero", "Auto", "weights sharded"),
            ("hero", "Explicit", "weights sharded"),
            ("GRAD-L1", "Explicit", "weights replicated"),
        ],
    ),
)
def test_jit_distributes_sharded_arrays(method, kind, weights):
    """Data over four devices, weights over two; by Explicit axes grads lie alike."""
    batch = mlp_batch(size=EXAMPLES)
    params = mlp_params()
    rng = np.random.default_rng(0)
    params["hidden"][0] = {
        "kernel": jnp.asarray(rng.normal(size=(3, 6))),
        "bias": jnp.asarray(rng.normal(size=6)),
    }
    params["hidden"][1]["kernel"] = jnp.asarray(rng.normal(size=(6, 4)))
    expected = jax.jit(METHODS[method](mlp_loss))(params, *batch)
    types = (getattr(AxisType, kind),) * 2
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    with set_mesh(grid):
        placed = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(grid, SHARDINGS[weights](x))),
            params,
        )
        examples = jax.device_put(batch, NamedSharding(grid, P("data")))
        actual = jax.jit(METHODS[method](mlp_loss))(placed, *examples)
    close(actual, expected)
    if kind == "Explicit":
        for grad, weight in zip(
            *map(jax.tree.leaves, (actual[1], placed)), strict=True
        ):
            assert grad.sharding.is_equivalent_to(weight.sharding, grad.ndim)


def set_mesh(grid):
    return (
        jax.set_mesh(grid) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(grid)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scope", ["global", "local"])
def test_examples_may_be_spread_over_two_axes(scope):
    params, batch = mlp_params(), mlp_batch(size=EXAMPLES)
    grid = Mesh(np.array(jax.devices()).reshape(2, 4), ("hosts", "data"))
    axes = ("hosts", "data")
    spread = jax.shard_map(
        over_axis(scope, METHODS["hero"], mlp_loss, axes),
        mesh=grid,
        in_specs=(P(), P(axes), P(axes)),
        out_specs=P(),
    )
    size = EXAMPLES // (DEVICES if scope == "local" else 1)
    one = in_parts(METHODS["hero"](mlp_loss), size, batch_argnums=(1, 2))
    close(jax.jit(spread)(params, *batch), jax.jit(one)(params, *batch))


@pytest.mark.parametrize("method", some(METHODS, "hero", "plain"))
def test_shard_map_does_not_sum_where_an_axis_is_forgotten(method):
    params, batch = in_single_precision()
    axes = ("hosts", "data")
    grid = Mesh(np.array(jax.devices()).reshape(2, 4), axes)
    for axis_name, forgotten in [(None, "'data', 'hosts'"), ("data", "'hosts'")]:
        step = jax.shard_map(
            METHODS[method](mlp_loss, axis_name=axis_name),
            mesh=grid,
            in_specs=(P(), P(axes), P(axes)),
            out_specs=P(),
        )
        message = rf"loss_fn's value varies over the axis {forgotten}, and params do no"
        with pytest.raises(ValueError, match=message):
            jax.jit(step)(params, *batch)


def test_parts_of_explicitly_sharded_arrays_are_refused():
    params, batch = in_single_precision()
    grid = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with set_mesh(grid):
        batch = jax.device_put(batch, NamedSharding(grid, P("data")))
        make = in_parts(METHODS["hero"](mlp_loss), 3, batch_argnums=(1, 2))
        with pytest.raises(
            ValueError, match=r"argument 1 is sharded over Explicit axes"
        ):
            jax.jit(make)(params, *batch)


def test_nothing_is_compiled_twice():
    traces = []

    def loss(params, x, y):
        traces.append(None)
        return mlp_loss(params, x, y)

    params, batch = in_single_precision()
    params = jax.device_put(params, NamedSharding(mesh(), P()))
    step = shard_mapped(METHODS["hero"](loss, axis_name="data"))
    _, grads = step(params, *batch)
    once = len(traces)
    step(jax.tree.map(jnp.add, params, grads), *batch)
    assert len(traces) == once


def collectives(lowered):
    """Count operations across devices in the compiled program."""
    text = lowered.compile().as_text()
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return len(re.findall(rf" (?:{names})(?:-start)?\(", text))


COLLECTIVES = {
    "hero": {"global": 3, "local": 1},
    "first-order": {"global": 2, "local": 1},
    "plain": {"global": 1, "local": 1},
    "GRAD-L1": {"global": 2, "local": 1},
    "GNP": {"global": 2, "local": 1},
    "GSAM": {"global": 2, "local": 1},
}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="XLA does not yet join what one pmean does"
)
@pytest.mark.parametrize(
    ("method", "scope"),
    pairs(
        METHODS,
        ("global", "local"),
        quick=[("hero", "global"), ("hero", "local")],
    ),
)
def test_collective_operations_per_step(method, scope):
    params, batch = in_single_precision()
    others = ("GRAD-L1", "GNP", "GSAM")
    metrics = {} if method in others else {"return_metrics": True}
    make = over_axis(scope, METHODS[method], mlp_loss, **metrics)
    for transform in (pmapped, shard_mapped):
        lowered = transform(make).lower(params, *batch)
        assert collectives(lowered) == COLLECTIVES[method][scope]
    if scope == "global":
        batch = jax.device_put(batch, NamedSharding(mesh(), P("data")))
        params = jax.device_put(params, NamedSharding(mesh(), P()))
        lowered = jax.jit(METHODS[method](mlp_loss, **metrics)).lower(params, *batch)
        assert collectives(lowered) == COLLECTIVES[method][scope]


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="as above")
def test_collective_operations_of_a_chain():
    params, batch = in_single_precision()
    tx = chain("data")

    def step(params, x, y):
        grad_fn = jax.grad(lambda params: mlp_loss(params, x, y))
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)

    assert collectives(pmapped(step).lower(params, *batch)) == 3


@pytest.mark.parametrize("axis_name", [0, ("a", "a")], ids=str)
@pytest.mark.parametrize("factory", ["hero", "GRAD-L1", "averaged"])
def test_what_is_no_name_gives_no_mean(factory, axis_name):
    params, (x, y) = in_single_precision()
    make = METHODS.get(factory, lambda f, **kw: averaged(jax.value_and_grad(f), **kw))
    step = make(mlp_loss, axis_name=axis_name)
    with pytest.raises((TypeError, ValueError)):
        jax.jit(jax.vmap(step, (None, 0, 0), axis_name="a"))(
            params, np.asarray(x)[:2, None], np.asarray(y)[:2, None]
        )


PARTS = {
    "m = 0": (0, 1, {}, ValueError, r"size must be an integer >= 1, got 0"),
    "m = 2.0": (2.0, 1, {}, TypeError, r"size must be an integer >= 1, got 2.0"),
    "none": (2, None, {}, TypeError, r"batch_argnums must name arg.*got None"),
    "bool": (2, [True], {}, TypeError, r"batch_argnums must name .*got \[True\]"),
    "twice": (1, (1, 1), {}, ValueError, r"several that differ, got \(1, 1\)"),
    "too large": (6, (1, 2), {}, ValueError, r"size must divide the 3 examples, got 6"),
    "a scalar among the examples": (
        *(1, (1, 4), {}, ValueError),
        r"\(1, 4\), .* at least one, along .*got the shapes .*\(\)\]",
    ),
    "other numbers": (
        *(1, (1, 3), {}, ValueError),
        r"must have the same number of them, .*got .*\(3, 3\), \(5,\)",
    ),
    "no such argument": (
        *(1, 7, {}, TypeError),
        r"batch_argnums asks for positional argument 7, which was not given: got 5",
    ),
    "no pair": (
        *(1, 1, {"has_aux": True}, TypeError),
        r"value_and_grad must return a pair \(loss, aux\) with has_aux=True",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_misuse_of_parts_is_named(case):
    size, batch_argnums, options, error, message = PARTS[case]
    make = METHODS["hero"](lambda p, x, y, *_: mlp_loss(p, x, y))
    params, (x, y) = in_single_precision()
    with pytest.raises(error, match=message):
        in_parts(make, size, batch_argnums=batch_argnums, **options)(
            params, x[:3], y[:3], jnp.zeros(5), {"scale": 1.0}
        )


def test_a_gradient_alone_is_no_value_and_gradient():
    params, batch = in_single_precision()
    by_parts = in_parts(jax.grad(mlp_loss), 2, batch_argnums=(1, 2))
    with pytest.raises(TypeError, match=r"must return \(value, gradient\), got dict"):
        by_parts(params, *batch)


def test_misuse_of_an_axis_is_named():
    params, batch = in_single_precision()
    for make in (
        METHODS["hero"](mlp_loss, axis_name="batch"),
        averaged(METHODS["hero"](mlp_loss), "batch"),
    ):
        with pytest.raises(ValueError, match=r"axis_name must be an axis of .*'batch'"):
            pmapped(make)(params, *batch)
    with pytest.raises(TypeError, match=r"averaged needs the axis_name .*use in_parts"):
        averaged(METHODS["hero"](mlp_loss), None)
    pairs = averaged(
        jax.value_and_grad(lambda *a: (mlp_loss(*a), 0), has_aux=True), "data"
    )
    with pytest.raises(TypeError, match=r"If that is \(loss, aux\), pass has_aux=True"):
        pmapped(pairs)(params, *batch)


def test_shard_map_refuses_weights_and_gradients_that_mislead():
    params, batch = in_single_precision()
    make = METHODS["hero"](mlp_loss, axis_name="data")
    with pytest.raises(ValueError, match=r"params must be the same on all devices of"):
        shard_mapped(lambda p, x, y: make(varying(p), x, y))(params, *batch)
    with pytest.raises(ValueError, match=r"grads must be those of each device's own"):
        shard_mapped(train(chain("data")))(params, *batch)
    link = paper.hero(0.1, 0.1, axis_name="data")
    update = lambda w: link.update(w, link.init(w), w, grad_fn=lambda U: U)[0]
    apart = jax.shard_map(update, mesh=mesh(), in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match=r"params must be the same on all devices of"):
        apart(jnp.ones(DEVICES))
    with pytest.raises(ValueError, match=r"axis_name must be an axis .*got 'data'"):
        jax.jit(train(chain("data")))(params, *batch)
