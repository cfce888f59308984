"""What the leaves of a tree of weights are: kernels or biases, and of which layers.

The number of dimensions does not tell. Under `nn.scan`, `nn.vmap`, `nnx.vmap`,
`eqx.filter_vmap` or Haiku's `layer_stack` every leaf has leading axes of layers (or of
experts), and in attention a bias has the axes (heads, dim). :func:`describe` goes by
paths and shapes; the first row that fits a leaf counts:

=============  =====================================  ==================================
kind           leaf                                   axes of layers; of output features
=============  =====================================  ==================================
normalization  `scale`; `weight` as large as its      all but the last; the last
               `bias`, or of a `*norm*` or `ln*`
bias           `bias*`, `offset`; `b` beside a `w`    of the kernel or scale beside it;
                                                      all others
kernel         `kernel` of `query`, `key`, `value`    all but the last three;
               and `out` with shapes of attention     (heads, dim), of `out` the last
kernel         `kernel`, `w`                          as the bias says: layers, outputs,
                                                      which are the last axes; or, of
                                                      transposed convolutions, before
kernel         `weight*`, unless of an `Embedding`    likewise, but outputs come first
embedding      `*embed*`; `weight` of an `Embedding`  all but the last two; the last
kernel         anything else                          of the neighbours; the last
=============  =====================================  ==================================

Where this leaves a choice, as for a kernel of three axes without a bias, a leaf has the
layers that its neighbours share: the leaves without a choice in the smallest subtree
that has any. Each name of a stack on the path from there to the leaf adds an axis:
`Scan*` and `Vmap*` of Flax, `__layer_stack*` of Haiku, and `*experts`. Where nothing
decides, no axis is of layers. A kernel of fewer than two axes per layer is "other".

So a stack without biases and normalization is taken for one layer, and a normalization
over two axes for a stack; layers on another axis than the first are not recognized.
Correct this by path: `leaves={"blocks/*": {"layer_axes": 1}}`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import numpy as np

from hero_jax import _checks, _tree
from hero_jax._typing import Params

__all__ = ["Leaf", "describe"]

Axes: TypeAlias = tuple[int, ...]
IsLeaf: TypeAlias = Callable[[Any], bool] | None
Path: TypeAlias = tuple[str, ...]
Kind = Literal["kernel", "bias", "normalization", "embedding", "other"]
KINDS = ("bias", "embedding", "kernel", "normalization", "other")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a leaf is.

    Attributes:
      kind: "kernel", "bias", "normalization", "embedding" or "other".
      layer_axes: how many leading axes are layers, experts or members of an ensemble.
      output_axes: which axes are output features, counted from the last: -1.
    """

    kind: Kind
    layer_axes: int
    output_axes: Axes


Overrides: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Patterns of paths to fields of :class:`Leaf`: `{"blocks/*": {"layer_axes": 1}}`."""


def describe(
    params: Params, overrides: Overrides | None = None, is_leaf: IsLeaf = None
) -> chex.ArrayTree:
    """Say what every leaf is.

    Args:
      params: weights, or anything with shapes.
      overrides: what is known better: a path of a leaf or subtree, keys joined by "/",
        or a pattern in which a star matches everything, to some fields of
        :class:`Leaf`. Of several that match, the first counts. Neighbours go by it.
      is_leaf: as in `jax.tree.map`.

    Returns:
      Tree like `params` with a :class:`Leaf` for each.

    Raises:
      TypeError: there is no such field, or overrides are not a mapping.
      ValueError: a pattern matches nothing, or a leaf has no such axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import leaves
      >>> stack = {"kernel": jnp.ones((6, 3, 5)), "bias": jnp.ones((6, 5))}
      >>> leaves.describe(stack)["kernel"]
      Leaf(kind='kernel', layer_axes=1, output_axes=(-1,))
      >>> alone = {"kernel": jnp.ones((6, 3, 5))}
      >>> leaves.describe(alone)["kernel"].layer_axes
      0
      >>> leaves.describe(alone, {"*": {"layer_axes": 1}})["kernel"].layer_axes
      1
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_leaf)
    arrays = _arrays(structure, [tuple(np.shape(x)) for x in flat])
    given = _given(overrides, [array.path for array in arrays])
    modules: dict[str, list[_Array]] = {}
    for array in arrays:
        modules.setdefault(array.module, []).append(array)
    guesses = {array: _guess(array, modules) for array in arrays}
    for array, fields in zip(arrays, given, strict=True):
        if "layer_axes" in fields:
            guesses[array] = guesses[array]._replace(
                layers=(fields["layer_axes"],), beside=None
            )
    shared = _shared_layers(guesses)
    described = []
    for array, fields in zip(arrays, given, strict=True):
        guess = guesses[array]
        judge = guess.beside or array
        n = _choose(judge, guesses[judge].layers, shared)
        found = dataclasses.replace(_leaf(array, guess, n), **fields)
        described.append(_checked(array, found) if fields else found)
    return jax.tree.unflatten(structure, described)


def weights(
    params: Params, overrides: Overrides | None = None, is_leaf: IsLeaf = None
) -> chex.ArrayTree:
    """Mask of the weights proper: kernels and embeddings."""
    return are_weights(describe(params, overrides, is_leaf))


def are_weights(described: chex.ArrayTree) -> chex.ArrayTree:
    """Return the same mask, given the descriptions."""
    return jax.tree.map(lambda leaf: leaf.kind in ("kernel", "embedding"), described)


def per_layer(function: Callable[..., Any], leaf: Leaf) -> Callable[..., Any]:
    """Map a function of arrays over the layers of a stack."""
    for _ in range(leaf.layer_axes):
        function = jax.vmap(function)
    return function


class _Array(NamedTuple):
    """A leaf by its number, as `module/stem` with a rest, such as `cell/weight_ih`.

    `owner` is the type of the module, where that tells more than a name.
    """

    number: int
    path: str
    module: str
    stem: str
    rest: str
    owner: str
    shape: Axes

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Guess(NamedTuple):
    """How many axes may be layers, fewest first, and which then are outputs.

    `beside` is the kernel or scale whose layers these are.
    """

    kind: Kind
    layers: Sequence[int]
    output_axes: Callable[[int], Axes]
    beside: _Array | None = None


_NAME = re.compile(r"(kernel|weight|w|bias|b|scale|offset)(\d*|_\w+)", re.IGNORECASE)
_NORM = re.compile(r".*norm.*|ln([_\d].*)?", re.IGNORECASE)
_OWNERS = ("BatchNorm", "Embedding", "GroupNorm", "LayerNorm", "RMSNorm")
"""Of Equinox, where what they have is a `weight`."""
_ATTENTION = ("query", "key", "value", "out")


def _arrays(structure: Any, shapes: list[Axes]) -> list[_Array]:
    """Return the leaves of a tree of this structure."""
    numbers = jax.tree.unflatten(structure, range(len(shapes)))
    owners = {
        path: type(node).__name__
        for path, node in zip(
            _tree.leaf_paths(numbers, _is_owner),
            jax.tree.leaves(numbers, is_leaf=_is_owner),
            strict=True,
        )
    }
    arrays: list[_Array] = []
    for path, shape in zip(_tree.leaf_paths(numbers), shapes, strict=True):
        module, _, name = path.rpartition("/")
        match = _NAME.fullmatch(name)
        stem, rest = (match[1].lower(), match[2]) if match else (name, "")
        owner = owners.get(module, "")
        arrays.append(_Array(len(arrays), path, module, stem, rest, owner, shape))
    return arrays


def _is_owner(node: Any) -> bool:
    return type(node).__name__ in _OWNERS


def _guess(array: _Array, modules: Mapping[str, list[_Array]]) -> _Guess:
    """Look the leaf up in the table at the top."""
    shape, stem, ndim = array.shape, array.stem, array.ndim
    siblings = [x for x in modules[array.module] if x is not array]
    bias = _find(("bias", "b", "offset"), array.rest, siblings)
    kernel = _find(("kernel", "weight", "w", "scale"), array.rest, siblings)

    def all_but(last: int) -> list[int]:
        """Return how many leading axes there are, without those that broadcast."""
        leading = shape[: max(ndim - last, 0)]
        return [0 if 1 in leading[:1] else sum(n != 1 for n in leading)]

    def after(layers: int) -> Axes:
        return tuple(range(layers - ndim, 0))

    if stem == "scale" or (stem == "weight" and _is_normalization(array, bias)):
        return _Guess("normalization", all_but(1), after)
    is_b = (
        stem == "b" and kernel is not None and kernel.stem == "w" and ndim < kernel.ndim
    )
    if is_b or stem in ("bias", "offset"):
        return _Guess("bias", range(max(ndim, 1)), after, kernel)
    if stem in ("kernel", "w", "weight") and array.owner != "Embedding":
        outputs = _of_attention(array, modules) or _of_kernel(array, bias)
        return _Guess("kernel", [*outputs] or [0], lambda n: outputs.get(n, (-1,)))
    if array.owner == "Embedding" or "embed" in stem.lower():
        return _Guess("embedding", all_but(2), lambda _: (-1,))
    return _Guess("kernel", range(ndim + 1), lambda _: (-1,))


def _find(stems: Sequence[str], rest: str, siblings: Sequence[_Array]) -> _Array | None:
    """Return the sibling of one of these names, `b1` for `w1`, or the only one."""
    named = [x for stem in stems for x in siblings if x.stem == stem]
    alike = [x for x in named if x.rest == rest]
    return next(iter(alike or named[: len(named) == 1]), None)


def _is_normalization(array: _Array, bias: _Array | None) -> bool:
    named = _NORM.fullmatch(array.module.rpartition("/")[2])
    of_equinox = array.owner not in ("", "Embedding")
    return bool(named) or of_equinox or (bias is not None and bias.shape == array.shape)


def _of_kernel(array: _Array, bias: _Array | None) -> dict[int, Axes]:
    """Return for each number of layer axes that fits the bias the axes of outputs."""
    shape, ndim = array.shape, array.ndim
    b = () if bias is None else bias.shape
    if array.stem == "weight":  # of Equinox: (out, in), (out, in, k), bias (out, 1)
        first: dict[int, Axes] = {n: (n - ndim,) for n in range(ndim - 1)}
        fitting = {
            n: axes
            for n, axes in first.items()
            if len(b) == ndim - 1 and b[: n + 1] == shape[: n + 1]
            if all(length == 1 for length in b[n + 1 :])
        }
        return fitting or first
    # Haiku has transposed kernels always, Flax with transpose_kernel=True.
    transposed = array.stem == "w" and "transpose" in array.module
    last: dict[int, Axes] = {}
    last_but_one: dict[int, Axes] = {}
    for n in range(len(b)):
        outputs = len(b) - n
        if n + outputs < ndim and b == shape[:n] + shape[-outputs:]:
            last[n] = tuple(range(-outputs, 0))
        if n + outputs < ndim - 1 and b == shape[:n] + shape[-1 - outputs : -1]:
            last_but_one[n] = tuple(range(-1 - outputs, -1))
    found = last_but_one or last if transposed else last or last_but_one
    return found or dict.fromkeys(range(ndim - 1), (-2 if transposed else -1,))


def _of_attention(
    array: _Array, modules: Mapping[str, list[_Array]]
) -> dict[int, Axes]:
    """Return the same for kernels (embed, heads, dim) and `out` (heads, dim, embed)."""
    above, _, name = array.module.rpartition("/")
    prefix = f"{above}/" if above else ""
    shapes = [
        x.shape
        for key in _ATTENTION
        for x in modules.get(f"{prefix}{key}", [])
        if (x.stem, x.rest) == ("kernel", "")
    ]
    n = array.ndim - 3
    if name not in _ATTENTION or len(shapes) != 4 or n < 0:
        return {}
    query, _, value, out = shapes
    of_heads = query[-2:] == out[-3:-1] and value[-1] == out[-2]
    alike = len({(len(shape), shape[:n]) for shape in shapes}) == 1
    return {n: (-1,) if name == "out" else (-2, -1)} if of_heads and alike else {}


def _shared_layers(guesses: Mapping[_Array, _Guess]) -> dict[Path, Axes]:
    """Return the lengths of the layer axes that each subtree shares, where known."""
    shared: dict[Path, Axes] = {}
    for array, guess in guesses.items():
        if guess.beside is None and len(guess.layers) == 1:
            lengths = array.shape[: guess.layers[0]]
            keys = _keys(array)
            for i in range(len(keys) + 1):
                before = shared.get(keys[:i], lengths)
                shared[keys[:i]] = _in_common(before, lengths)
    return shared


def _choose(array: _Array, layers: Sequence[int], shared: Mapping[Path, Axes]) -> int:
    """Return the number of layer axes, of which there may be a choice."""
    if len(layers) == 1:
        return layers[0]
    keys = _keys(array)
    expected = 0
    for i in range(len(keys), -1, -1):
        if keys[:i] in shared:
            expected += len(_in_common(shared[keys[:i]], array.shape))
            break
        expected += _num_stacks(keys[i - 1 : i + 1])
    return max((n for n in layers if n <= expected), default=layers[0])


def _keys(array: _Array) -> Path:
    return tuple(array.module.split("/")) if array.module else ()


def _in_common(a: Axes, b: Axes) -> Axes:
    """Return how two shapes begin."""
    equal = [x == y for x, y in zip(a, b, strict=False)]
    return a[: [*equal, False].index(False)]


def _num_stacks(keys: Path) -> int:
    """Return how many axes the first of these keys says that its leaves have more."""
    key = keys[0] if keys else ""
    lifted = re.match(r"((Scan|Vmap|Checkpoint|Remat)(?=[A-Z]))+", key)
    if lifted:
        return len(re.findall("Scan|Vmap", lifted[0]))
    is_list = len(keys) > 1 and keys[1].isdigit()
    of_experts = key.endswith("experts") and not is_list
    return int(of_experts or key.startswith("__layer_stack"))


def _leaf(array: _Array, guess: _Guess, layers: int) -> Leaf:
    if guess.kind in ("kernel", "embedding") and array.ndim - layers < 2:
        return Leaf("other", layers, ())
    return Leaf(guess.kind, layers, guess.output_axes(layers))


def _given(overrides: Overrides | None, paths: list[str]) -> list[Mapping[str, Any]]:
    """Return what is known better of each leaf."""
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "leaves must be a mapping from patterns of paths to fields of Leaf, such "
            f"as {{'blocks/*': {{'layer_axes': 1}}}}, got {type(overrides).__name__}."
        )
    for pattern in overrides:
        if not any(_tree.path_matches(path, pattern) for path in paths):
            raise ValueError(
                f"leaves must have patterns that match a leaf: {pattern!r} matches "
                f"none of {paths}."
            )
        fields = overrides[pattern]
        axes = fields.get("output_axes", ())
        several = axes if isinstance(axes, (list, tuple)) else ("none",)
        if not all(type(n) is int for n in (fields.get("layer_axes", 0), *several)):
            raise TypeError(
                "leaves must give layer_axes as an integer and output_axes as a tuple "
                f"of integers, got {fields!r} for {pattern!r}."
            )
    return [
        next((f for p, f in overrides.items() if _tree.path_matches(path, p)), {})
        for path in paths
    ]


def _checked(array: _Array, leaf: Leaf) -> Leaf:
    """Raise `ValueError` unless the leaf has such axes; count outputs from the last."""
    _checks.check_choice("kind", leaf.kind, KINDS)
    ndim = array.ndim
    outputs = tuple(a - ndim if a >= 0 else a for a in leaf.output_axes)
    fits = all(leaf.layer_axes - ndim <= a < 0 for a in outputs)
    if not 0 <= leaf.layer_axes <= ndim or not fits:
        raise ValueError(
            f"leaves must name axes of {array.path}, of shape {array.shape}, and those "
            f"of outputs behind those of layers, got {leaf}."
        )
    return dataclasses.replace(leaf, output_axes=outputs)
