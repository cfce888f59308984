"""The paper's networks: parameters counted by hand, shapes, dtypes, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hero_jax import models
from tests import paper

NAMES = ("mobilenet_v2", "resnet18", "resnet20", "resnet8", "vgg19_bn")
SOME = [
    pytest.param(
        name, marks=() if name in ("mobilenet_v2", "resnet20") else pytest.mark.slow
    )
    for name in NAMES
]
NORM = 2  # scale and bias per feature


def conv(inputs, outputs, size=3):
    return size * size * inputs * outputs + NORM * outputs


def resnet_parameters(blocks, features, stem, num_classes):
    total, inputs = conv(3, features, stem), features
    for stage, count in enumerate(blocks):
        outputs = features * 2**stage
        for _ in range(count):
            total += conv(inputs, outputs) + conv(outputs, outputs)
            total += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return total + (inputs + 1) * num_classes


def mobilenet_parameters(num_classes):
    total, inputs = conv(3, 32), 32
    for expansion, outputs, blocks, first in [
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:
        for block in range(blocks):
            width = expansion * inputs
            total += conv(inputs, width, 1) + conv(1, width) + conv(width, outputs, 1)
            if (first if block == 0 else 1) == 1 and inputs != outputs:
                total += conv(inputs, outputs, 1)
            inputs = outputs
    return total + conv(320, 1280, 1) + 1281 * num_classes


def vgg_parameters(num_classes):
    features = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    pairs = zip([3, *features[:-1]], features, strict=True)
    return sum(conv(i, o) + o for i, o in pairs) + 513 * num_classes


COUNTS = {
    "resnet20": lambda n: resnet_parameters((3, 3, 3), 16, 3, n),
    "resnet18": lambda n: resnet_parameters((2, 2, 2, 2), 64, 7, n),
    "resnet8": lambda n: resnet_parameters((1, 1, 1), 16, 3, n),
    "mobilenet_v2": mobilenet_parameters,
    "vgg19_bn": vgg_parameters,
}
STATED = {
    "resnet20": (10, 272_474),
    "mobilenet_v2": (10, 2_296_922),
    "vgg19_bn": (10, 20_040_522),
    "resnet18": (1000, 11_689_512),
    "resnet8": (10, 78_042),
}


def shapes(model, images):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "num_classes", [10, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_parameters_are_those_counted_by_hand(name, num_classes):
    model = models.create(name, num_classes=num_classes)
    variables = shapes(model, jnp.zeros((1, 32, 32, 3)))
    assert set(variables) == {"params", "batch_stats"}
    actual = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert actual == COUNTS[name](num_classes)
    if num_classes == STATED[name][0]:
        assert actual == STATED[name][1]


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SOME)
def test_logits_and_statistics(name, dtype):
    model = models.create(name, num_classes=7, dtype=dtype)
    for side in (32, 64) + ((224,) if name == "resnet18" else ()):
        images = jnp.zeros((2, side, side, 3))
        variables = shapes(model, images)
        logits, new = jax.eval_shape(
            lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
            variables,
            images,
        )
        assert logits.shape == (2, 7)
        assert {x.dtype for x in jax.tree.leaves((logits, variables, new))} == {
            jnp.dtype(jnp.float32)
        }
        assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(
            variables["batch_stats"]
        )


def test_computes_in_the_dtype_asked_for():
    images = jnp.zeros((1, 32, 32, 3))
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.create("resnet20", num_classes=2, dtype=dtype)
        variables = shapes(model, images)
        run = jax.make_jaxpr(lambda v, m=model: m.apply(v, images, train=False))
        text = str(run(variables))
        assert ("bf16[1,8,8,64]" in text) == (dtype == jnp.bfloat16)


@pytest.mark.slow
def test_initial_weights_have_the_variance_of_he_et_al():
    model = models.create("resnet20", num_classes=10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)[
        "params"
    ]
    kernel = params["BasicBlock_8"]["Conv_1"]["kernel"]  # 36,864 weights
    np.testing.assert_allclose(np.var(kernel), 2 / (9 * 64), rtol=0.03)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 30, 32, 3), (2, 0, 32, 3)])
def test_other_images_are_named(name, shape):
    model = models.create(name, num_classes=10)
    with pytest.raises(ValueError, match=r"must have shape \[batch, height, width, ch"):
        shapes(model, jnp.zeros(shape))


def test_other_arguments_are_named():
    with pytest.raises(ValueError, match=r"name must be one of \['mobilenet_v2', 'res"):
        models.create("resnet50", num_classes=10)
    with pytest.raises(ValueError, match="num_classes must be an integer >= 1, got 0"):
        models.create("resnet20", num_classes=0)
    with pytest.raises(TypeError, match="num_classes must be an integer >= 1, got str"):
        models.create("resnet20", num_classes="10")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_every_normalization_is_that_of_all_devices(name):
    """One mean over the axis for each BatchNorm, and none without an axis."""
    images = jnp.zeros((2, 32, 32, 3))

    def means(axis_name):
        model = models.create(name, num_classes=3, axis_name=axis_name)
        variables = shapes(model, images)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        program = jax.make_jaxpr(apply, axis_env=[("data", 2)])(variables, images)
        return str(program).count("psum"), len(
            jax.tree.leaves(variables["batch_stats"])
        )

    count, statistics = means("data")
    assert count == statistics // 2 > 0
    assert means(None)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_all_layers_take_the_convolution_that_is_given(name):
    """Ours is a primitive of its own, which shows in the program."""
    images = jnp.zeros((2, 32, 32, 3))

    def of_its_own(conv_general_dilated):
        model = models.create(
            name, num_classes=3, conv_general_dilated=conv_general_dilated
        )
        variables = shapes(model, images)
        apply = functools.partial(model.apply, train=False)
        program = str(jax.make_jaxpr(apply)(variables, images))
        kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim == 4]
        return program.count(" convolution["), len(kernels)

    assert of_its_own(jax.lax.conv_general_dilated)[0] == 0
    ours, layers = of_its_own(None)
    assert ours == layers > 0


def fits_by_heart(name, steps):
    """Train on 64 random images with random labels."""
    model = models.create(name, num_classes=10)
    images = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 10)
    variables = model.init(jax.random.key(2), images, train=False)
    tx = optax.adam(1e-3)

    def loss_fn(params, stats):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (new["batch_stats"], jnp.mean(logits.argmax(-1) == labels))

    @jax.jit
    def step(params, stats, state):
        value_and_grad = paper.hero_value_and_grad(
            loss_fn, h=0.5, gamma=0.01, has_aux=True
        )
        (_, (stats, accuracy)), grads = value_and_grad(params, stats)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, accuracy

    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    for _ in range(steps):
        params, stats, state, accuracy = step(params, stats, state)
        if accuracy == 1.0:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_a_network_learns_random_labels_by_heart(name):
    """The others would take a quarter of an hour and more."""
    assert fits_by_heart(name, 100)
