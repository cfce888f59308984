"""Leaves against what the authors of the layers say: Flax, Equinox and Haiku."""

import jax
import jax.numpy as jnp
import pytest

from hero_jax import _tree, leaves
from hero_jax.leaves import Leaf

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:haiku")


def kernel(layers=0, outputs=(-1,)):
    return Leaf("kernel", layers, outputs)


def bias(layers=0, outputs=(-1,)):
    return Leaf("bias", layers, outputs)


def normalization(layers=0, outputs=(-1,)):
    return Leaf("normalization", layers, outputs)


def embedding(layers=0):
    return Leaf("embedding", layers, (-1,))


def attention(layers=0, with_bias=True):
    found = {}
    for name in ("query", "key", "value", "out"):
        axes = (-1,) if name == "out" else (-2, -1)
        found[f"{name}/kernel"] = kernel(layers, axes)
        if with_bias:
            found[f"{name}/bias"] = bias(layers, axes)
    return found


def inside(module, found):
    return {f"{module}/{path}": leaf for path, leaf in found.items()}


def flax_linen():
    nn = pytest.importorskip("flax.linen")

    class MLP(nn.Module):
        use_bias: bool = True

        @nn.compact
        def __call__(self, x, _=None):
            for name in ("up", "down"):
                x = nn.Dense(x.shape[-1], use_bias=self.use_bias, name=name)(x)
            return x, None

    class Block(nn.Module):
        """A layer of a transformer, whose experts have no bias."""

        use_bias: bool = True

        @nn.compact
        def __call__(self, x, _=None):
            attend = nn.MultiHeadDotProductAttention(
                num_heads=3, use_bias=self.use_bias, name="attention"
            )
            x = x + attend(nn.LayerNorm(name="before", use_bias=self.use_bias)(x))
            x = nn.Dense(12, use_bias=False, name="mix")(x)
            experts = lifted(nn.vmap, nn.Dense, 4, in_axes=None)
            return experts(12, use_bias=False, name="experts")(x).mean(0), None

    class Stack(nn.Module):
        """Everything, between layers that are no stack."""

        use_bias: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Embed(10, 12, name="embed")(x)
            blocks = lifted(nn.scan, Block, 6)(self.use_bias, name="blocks")
            x, _ = blocks(x, None)
            return nn.Dense(5, name="head")(x)

    def lifted(lift, module, size, **options):
        options["length" if lift is nn.scan else "axis_size"] = size
        return lift(
            module, variable_axes={"params": 0}, split_rngs={"params": True}, **options
        )

    def of(module, shape, dtype=jnp.float32):
        x = jnp.zeros(shape, dtype)
        return jax.eval_shape(module.init, jax.random.key(0), x)["params"]

    class Scanned(nn.Module):
        """A square network, as many layers as units: shapes alone cannot tell."""

        use_bias: bool

        @nn.compact
        def __call__(self, x):
            return lifted(nn.scan, MLP, 12)(self.use_bias)(x, None)[0]

    words, images = (2, 7), (1, 8, 8, 3)
    block = {
        **inside("attention", attention(1)),
        "before/scale": normalization(1),
        "before/bias": bias(1),
        "mix/kernel": kernel(1),
        "experts/kernel": kernel(2),
    }
    ends = {
        "embed/embedding": embedding(),
        "head/kernel": kernel(),
        "head/bias": bias(),
    }
    square = "ScanMLP_0"
    dense = {"kernel": kernel(), "bias": bias()}
    norm = {"scale": normalization(), "bias": bias()}
    return {
        "dense": (of(nn.Dense(5), (2, 3)), dense),
        "dense_general": (
            of(nn.DenseGeneral((3, 4)), (2, 12)),
            {"kernel": kernel(0, (-2, -1)), "bias": bias(0, (-2, -1))},
        ),
        "conv": (of(nn.Conv(5, (3, 3)), images), dense),
        "conv_1d": (of(nn.Conv(5, (3,)), (1, 8, 3)), dense),
        "conv_1d_alone": (
            of(nn.Conv(5, (3,), use_bias=False), (1, 8, 3)),
            {"kernel": kernel()},
        ),
        "conv_transpose": (of(nn.ConvTranspose(5, (3, 3)), images), dense),
        "conv_transposed_kernel": (
            of(nn.ConvTranspose(5, (3, 3), transpose_kernel=True), images),
            {"kernel": kernel(0, (-2,)), "bias": bias()},
        ),
        "layer_norm": (of(nn.LayerNorm(), (2, 3)), norm),
        "group_norm": (of(nn.GroupNorm(3), (2, 3)), norm),
        "rms_norm": (of(nn.RMSNorm(), (2, 3)), {"scale": normalization()}),
        "attention": (of(nn.MultiHeadDotProductAttention(3), (2, 7, 12)), attention()),
        "attention_without_bias": (
            of(nn.MultiHeadDotProductAttention(3, use_bias=False), (2, 7, 12)),
            attention(with_bias=False),
        ),
        "stack": (of(Stack(), words, int), {**inside("blocks", block), **ends}),
        "stack_without_bias": (
            of(Stack(use_bias=False), words, int),
            {
                **inside("blocks", {k: v for k, v in block.items() if "bias" not in k}),
                **ends,
            },
        ),
        **{
            f"square_{use_bias}": (
                of(Scanned(use_bias), (2, 12)),
                {
                    f"{square}/{name}/{leaf}": what
                    for name in ("up", "down")
                    for leaf, what in [("kernel", kernel(1)), ("bias", bias(1))]
                    if use_bias or leaf == "kernel"
                },
            )
            for use_bias in (True, False)
        },
        "lstm": (
            of(nn.RNN(nn.LSTMCell(5)), (2, 7, 3)),
            {
                f"cell/{side}{gate}/{leaf}": what
                for gate in "ifgo"
                for side, leaf, what in [
                    ("i", "kernel", kernel()),
                    ("h", "kernel", kernel()),
                    ("h", "bias", bias()),
                ]
            },
        ),
    }


def flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(12, rngs=rngs)
            self.linear = nnx.Linear(12, 12, use_bias=False, rngs=rngs)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 12, rngs=rngs)
            self.conv = nnx.Conv(12, 5, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.blocks = blocks(rngs)

    @nnx.split_rngs(splits=6)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def blocks(rngs):
        return Block(rngs)

    state = nnx.eval_shape(lambda: nnx.state(Network(nnx.Rngs(0)), nnx.Param))
    found = {
        "embed/embedding": embedding(),
        "conv/kernel": kernel(),
        "conv/bias": bias(),
        "norm/scale": normalization(),
        "norm/bias": bias(),
        **inside("blocks/attention", attention(1)),
        "blocks/norm/scale": normalization(1),
        "blocks/norm/bias": bias(1),
        "blocks/linear/kernel": kernel(1),
    }
    return {"network": (state, found)}


def equinox():
    eqx = pytest.importorskip("equinox")

    def of(make):
        return eqx.filter(eqx.filter_eval_shape(make, jax.random.key(0)), is_array)

    def is_array(x):
        return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)

    class Block(eqx.Module):
        linear: eqx.nn.Linear
        head: eqx.nn.Linear
        conv: eqx.nn.Conv2d
        first: eqx.nn.LayerNorm
        second: eqx.nn.RMSNorm
        embed: eqx.nn.Embedding
        cell: eqx.nn.GRUCell

        def __init__(self, key):
            self.linear = eqx.nn.Linear(12, 12, use_bias=False, key=key)
            self.head = eqx.nn.Linear(12, 1, key=key)
            self.conv = eqx.nn.Conv2d(3, 5, 3, key=key)
            self.first = eqx.nn.LayerNorm(12)
            self.second = eqx.nn.RMSNorm(12, use_bias=False)
            self.embed = eqx.nn.Embedding(10, 12, key=key)
            self.cell = eqx.nn.GRUCell(3, 5, key=key)

    def block(layers):
        return {
            "linear/weight": kernel(layers, (-2,)),
            "head/weight": kernel(layers, (-2,)),
            "head/bias": bias(layers),
            "conv/weight": kernel(layers, (-4,)),
            "conv/bias": bias(layers, (-3, -2, -1)),
            "first/weight": normalization(layers),
            "first/bias": bias(layers),
            "second/weight": normalization(layers),
            "embed/weight": embedding(layers),
            "cell/weight_ih": kernel(layers, (-2,)),
            "cell/weight_hh": kernel(layers, (-2,)),
            "cell/bias": bias(layers),
            "cell/bias_n": bias(layers),
        }

    def stack(key):
        return eqx.filter_vmap(Block)(jax.random.split(key, 6))

    return {"block": (of(Block), block(0)), "stack": (of(stack), block(1))}


def haiku():
    hk = pytest.importorskip("haiku")

    def of(function, shape, dtype=jnp.float32):
        init = hk.transform_with_state(function).init
        return jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape, dtype))[0]

    def block(x):
        return hk.LayerNorm(-1, True, True)(hk.Linear(12)(x))

    dense = {"w": kernel(), "b": bias()}
    images = (1, 8, 8, 5)
    whole = (-3, -2, -1)
    return {
        "linear": (of(lambda x: hk.Linear(5)(x), (2, 3)), inside("linear", dense)),
        "conv": (of(lambda x: hk.Conv2D(5, 3)(x), images), inside("conv2_d", dense)),
        "conv_transpose": (  # as many channels out as in
            of(lambda x: hk.Conv2DTranspose(5, 3)(x), images),
            inside("conv2_d_transpose", {"w": kernel(0, (-2,)), "b": bias()}),
        ),
        "embed": (
            of(lambda x: hk.Embed(10, 5)(x), (3,), int),
            {"embed/embeddings": embedding()},
        ),
        "batch_norm": (
            of(lambda x: hk.BatchNorm(True, True, 0.9)(x, True), (2, 7, 12)),
            {
                "batch_norm/scale": normalization(0, whole),
                "batch_norm/offset": bias(0, whole),
            },
        ),
        "stack": (
            of(lambda x: hk.experimental.layer_stack(6)(block)(x), (2, 12)),
            inside(
                "__layer_stack_no_per_layer",
                {
                    "linear/w": kernel(1),
                    "linear/b": bias(1),
                    "layer_norm/scale": normalization(1),
                    "layer_norm/offset": bias(1),
                },
            ),
        ),
    }


@pytest.mark.parametrize("library", [flax_linen, flax_nnx, equinox, haiku])
def test_knows_the_layers_of(library):
    for name, (params, expected) in library().items():
        described = leaves.describe(params)
        assert jax.tree.structure(described) == jax.tree.structure(params)
        paths = _tree.leaf_paths(params)
        found = dict(zip(paths, jax.tree.leaves(described), strict=True))
        assert (name, found) == (name, expected)


def test_plain_dicts():
    """Names of one's own: two axes are a kernel, and `b` is a bias beside `w` only."""
    shapes = {"w1": (3, 5), "b1": (5,), "A": (4, 4), "b": (4, 4), "c": (4,), "t": ()}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    kinds = {name: leaf.kind for name, leaf in leaves.describe(params).items()}
    assert kinds == {
        **dict.fromkeys(("w1", "A", "b"), "kernel"),
        "b1": "bias",
        "c": "other",
        "t": "other",
    }
    assert leaves.weights(jnp.ones((2, 2))) is True
    assert leaves.describe({}) == {}
    stack = {"w1": jnp.ones((6, 3, 5)), "b1": jnp.ones((6, 5)), "gain": jnp.ones((6,))}
    found = leaves.describe(stack)
    assert found == {"w1": kernel(1), "b1": bias(1), "gain": Leaf("other", 1, ())}


def test_what_is_known_counts_for_leaf_bias_and_neighbours():
    """Scanned over six layers, with neither normalization nor telling names."""
    params = {
        "blocks": {
            "up": {"kernel": jnp.ones((6, 12, 12))},
            "down": {"kernel": jnp.ones((6, 6, 12)), "bias": jnp.ones((6, 12))},
            "gain": jnp.ones((6, 12)),
        },
        "head": {"kernel": jnp.ones((12, 5))},
    }
    guessed = leaves.describe(params)["blocks"]
    assert guessed["up"]["kernel"] == kernel(0)
    # Six inputs of the dense layer, or six layers.
    assert guessed["down"]["kernel"] == kernel(0, (-2, -1))
    stack = {"kernel": kernel(1), "bias": bias(1)}
    assert leaves.describe(params, {"blocks/up": {"layer_axes": 1}}) == {
        "blocks": {
            "up": {"kernel": kernel(1)},
            "down": stack,
            "gain": Leaf("other", 1, ()),
        },
        "head": {"kernel": kernel()},
    }
    known = {"*/down/kernel": {"layer_axes": 1}, "*/gain": {"kind": "normalization"}}
    found = leaves.describe(params, known)["blocks"]
    assert found["down"] == stack
    assert found["gain"].kind == "normalization"
    first_counts = {"head/kernel": {"output_axes": (0,)}, "*": {"layer_axes": 0}}
    found = leaves.describe(params, first_counts)
    assert found["head"]["kernel"] == kernel(0, (-2,))
    assert found["blocks"]["down"]["kernel"].layer_axes == 0


@pytest.mark.parametrize(
    ("error", "message", "overrides"),
    [
        (TypeError, "mapping from patterns", [("kernel", 1)]),
        (TypeError, "unexpected keyword argument 'layers'", {"*": {"layers": 1}}),
        (TypeError, "layer_axes as an integer", {"*": {"layer_axes": 1.0}}),
        (TypeError, "output_axes as a tuple", {"*": {"output_axes": -1}}),
        (ValueError, r"'heads' matches none of \['kernel'\]", {"heads": {}}),
        (ValueError, "kind must be one of", {"*": {"kind": "weight"}}),
        (ValueError, "must name axes of kernel", {"*": {"layer_axes": 3}}),
        (ValueError, "must name axes of kernel", {"*": {"output_axes": (2,)}}),
        (
            *(ValueError, "of outputs behind those of layers"),
            {"*": {"layer_axes": 1, "output_axes": (0,)}},
        ),
    ],
)
def test_overrides_errors(error, message, overrides):
    with pytest.raises(error, match=message):
        leaves.describe({"kernel": jnp.ones((3, 5))}, overrides)
