"""Quantization of a parameter pytree, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _frameworks, _tree
from hero_jax._typing import Mask, Params
from hero_jax.leaves import are_weights, describe
from hero_jax.quant import _array
from hero_jax.quant._array import QuantizedArray
from hero_jax.quant._bits import Bits, bits_of_leaves
from hero_jax.quant._options import (
    GridOptions,
    Options,
    check_bits,
    check_traceable_bits,
    resolve,
)
from hero_jax.quant._packing import PackedArray, pack_array, packed_size


def quantize(
    params: Params,
    bits: Bits,
    *,
    mask: Mask | None = None,
    key: chex.PRNGKey | None = None,
    **options: Unpack[GridOptions],
) -> chex.ArrayTree:
    """Store the weights of a network as integers of a few bits.

    Post-training quantization of the weights alone: no data, no retraining. Every
    chosen leaf gets a grid of its own, or several (`axis`, `group_size`).

    Args:
      params: tree of arrays; those that are quantized must be float16, bfloat16,
        float32 or float64.
      bits: number of bits per weight, 2 to 8, or 16; a tree of such numbers with the
        structure of `params` or a prefix of it; or a mapping from paths to numbers,
        `{"head": 8, "*/kernel": 4}`: of leaves or subtrees, keys joined by "/", or
        patterns in which a star matches everything. A leaf's own path counts first,
        else the first that matches.
      mask: which leaves are quantized: tree of bools or function `params -> tree`.
        Default: kernels and embeddings, of two or more dimensions, that are floats and
        not quantized yet; biases and normalization scales are few and stay as they are.
      key: random key for stochastic rounding. Default: to the nearest.
      **options: scheme, axis, group_size, calibration, percentile and leaves, see
        :class:`hero_jax.quant.GridOptions`.

    Returns:
      `params` with :class:`hero_jax.quant.QuantizedArray` in place of these leaves.

    Raises:
      TypeError: a chosen leaf has another dtype, `bits` is no integer, or an option is
        unknown.
      ValueError: `bits` or an option is out of range, a mask or tree of bits has
        another structure, a pattern matches nothing, a chosen leaf is of an optimizer's
        state, Flax NNX modules share a variable, or a leaf has NaN or infinite entries
        (seen only outside `jax.jit`).

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> params = {"kernel": jnp.array([[-1.0, 0.4, 2.0]]), "bias": jnp.zeros(3)}
      >>> quantized = hero_jax.quant.quantize(params, bits=2)
      >>> quantized["kernel"].values
      Array([[0, 1, 3]], dtype=uint8)
      >>> hero_jax.quant.dequantize(quantized)["kernel"]
      Array([[-1.,  0.,  2.]], dtype=float32)
    """
    plan = make_plan(params, bits, mask, options, check_bits)
    quantized, flags = [], []
    for x, b, leaf_key, chosen in plan.each(key):
        storage = _array.storage_dtype(b, chosen.scheme)
        integers, grids, finite = _array.fit_integers(
            x, np.int32(b), leaf_key, storage, chosen
        )
        quantized.append(_array.assemble(x, b, chosen, integers, grids))
        flags.append(finite)
    check_finite(plan.names, flags)
    return plan.put_back(quantized)


def fake_quantize(
    params: Params,
    bits: Bits | chex.Numeric,
    *,
    mask: Mask | None = None,
    key: chex.PRNGKey | None = None,
    **options: Unpack[GridOptions],
) -> Params:
    """Round the weights of a network to their quantization levels, and keep floats.

    Equal to `dequantize(quantize(...))`, except that the numbers of bits may be
    traced: under `jax.vmap` or `jax.lax.map` one program serves all precisions.

    Args:
      params: as in :func:`quantize`, like the other arguments.
      bits: as in :func:`quantize`, or traced, and not checked then.
      mask: which leaves are quantized.
      key: random key for stochastic rounding.
      **options: see :class:`hero_jax.quant.GridOptions`.

    Returns:
      Tree with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError: as :func:`quantize`.
      ValueError: as :func:`quantize`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hero_jax
      >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 100).reshape(10, 10)}
      >>> def error(bits):
      ...     rounded = hero_jax.quant.fake_quantize(params, bits)
      ...     return jnp.abs(rounded["kernel"] - params["kernel"]).max()
      >>> jax.vmap(error)(jnp.array([8, 4, 2])).round(4)
      Array([0.0039, 0.0667, 0.3333], dtype=float32)
    """
    plan = make_plan(params, bits, mask, options, check_traceable_bits)
    levels, flags = [], []
    for x, b, leaf_key, chosen in plan.each(key):
        b = b if isinstance(b, jax.Array) else np.int32(b)
        rounded, finite = _array.fit_levels(x, b, leaf_key, chosen)
        levels.append(rounded)
        flags.append(finite)
    check_finite(plan.names, flags)
    return plan.put_back(levels)


def dequantize(tree: chex.ArrayTree) -> Params:
    """Return the tree with the quantized leaves turned back into float arrays.

    Args:
      tree: as returned by :func:`quantize` or :func:`pack`; may be called inside
        `jax.jit`, where the weights stay integers in memory until they are used.

    Returns:
      The tree of float arrays, with the structure and dtypes that were quantized.
    """
    return jax.tree.map(
        lambda x: _dequantize(x) if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def pack(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Return the tree with :class:`hero_jax.quant.PackedArray` for quantized leaves.

    Weights of 4 bits then take half a byte each in memory, against the time to unpack
    them at every use.

    Args:
      tree: as returned by :func:`quantize`.

    Returns:
      The tree, packed; :func:`unpack` and :func:`dequantize` undo it.
    """
    return jax.tree.map(
        lambda x: pack_array(x) if isinstance(x, QuantizedArray) else x,
        tree,
        is_leaf=is_quantized,
    )


def unpack(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Return the tree with :class:`hero_jax.quant.QuantizedArray` for packed leaves.

    Args:
      tree: as returned by :func:`pack`.

    Returns:
      The tree, with one integer per byte or two; nothing is rounded.
    """
    return jax.tree.map(
        lambda x: x.unpack() if isinstance(x, PackedArray) else x,
        tree,
        is_leaf=is_quantized,
    )


def size_in_bytes(tree: chex.ArrayTree) -> int:
    """Return how many bytes the arrays of a tree take in a file.

    Args:
      tree: of arrays, quantized or not, or of anything with shape and dtype.

    Returns:
      Packed integers with their scales and zero points, and the other leaves as they
      are; without the header of the file, a few kilobytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import quant
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> quant.size_in_bytes(params)
      16640
      >>> quant.size_in_bytes(quant.quantize(params, bits=4))
      2312
    """

    def size(x: Any) -> int:
        if isinstance(x, QuantizedArray):
            integers = packed_size(int(np.prod(x.shape)), x.bits)
            return integers + sum(map(size, (x.scale, x.zero_point)))
        return sum(
            int(np.prod(np.shape(leaf))) * np.dtype(jnp.result_type(leaf)).itemsize
            for leaf in jax.tree.leaves(x)
        )

    return sum(map(size, jax.tree.leaves(tree, is_leaf=is_quantized)))


def is_quantized(x: object) -> bool:
    """Tell whether something is a quantized array, packed or not.

    Args:
      x: anything; as `is_leaf` it keeps `jax.tree.map` from looking inside.

    Returns:
      Whether it is a :class:`hero_jax.quant.QuantizedArray` or
      :class:`hero_jax.quant.PackedArray`.
    """
    return isinstance(x, (QuantizedArray, PackedArray))


class Plan(NamedTuple):
    """The leaves that are quantized, each with its name, bits and options."""

    leaves: list[Any]
    structure: Any
    where: list[int]
    names: list[str]
    arrays: list[chex.Array]
    bits: list[Any]
    options: tuple[Options, ...]

    def each(
        self, key: chex.PRNGKey | None
    ) -> Iterator[tuple[chex.Array, Any, chex.PRNGKey | None, Options]]:
        """Yield array, bits, key and options of every leaf; equal ones compile once."""
        n = len(self.arrays)
        keys = [None] * n if key is None else jax.random.split(key, n)
        return zip(self.arrays, self.bits, keys, self.options, strict=True)

    def put_back(self, replaced: list[Any]) -> chex.ArrayTree:
        """Return the tree with these in place of the chosen leaves."""
        leaves = list(self.leaves)
        for i, x in zip(self.where, replaced, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self.structure, leaves)


def make_plan(
    params: Params,
    bits: Any,
    mask: Mask | None,
    options: GridOptions,
    check: Callable[[Any], None],
) -> Plan:
    """Check all arguments and pick out the leaves."""
    _frameworks.check_untied("params", params)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_quantized)
    # One leaf for each, also for those that were quantized before.
    flat = jax.tree.unflatten(structure, range(len(leaves)))
    by_default = mask is None
    described = describe(params, options.get("leaves"), is_quantized)
    known = jax.tree.leaves(described)
    if mask is None:
        mask = jax.tree.unflatten(structure, _are_weights(leaves, described))
    mask = _tree.of_function("mask", mask, params)
    chosen = jax.tree.leaves(_tree.resolve_mask("mask", mask, flat))
    if by_default and not any(chosen) and (leaves or params is None):
        raise ValueError(
            "params must have a leaf to quantize: a floating-point kernel or "
            "embedding, of two or more dimensions, that is not quantized yet, unless "
            "mask chooses others; "
            f"got {_described(leaves)}."
        )
    if jax.tree_util.all_leaves([bits]):
        check(bits)
    all_bits = bits_of_leaves(bits, flat, chosen)
    where = [i for i, keep in enumerate(chosen) if keep]
    _check_no_optimizer(params, where)
    names = _tree.leaf_names(flat)
    arrays, resolved = [], []
    for i in where:
        with _checks.at(names[i]):
            if is_quantized(leaves[i]):
                raise TypeError("params must not be quantized where mask is True")
            arrays.append(_array.as_array("params", leaves[i]))
            check(all_bits[i])
            resolved.append(resolve(arrays[-1].shape, options, known[i]))
    return Plan(
        leaves,
        structure,
        where,
        [names[i] for i in where],
        arrays,
        [all_bits[i] for i in where],
        tuple(resolved),
    )


def _check_no_optimizer(params: chex.ArrayTree, where: list[int]) -> None:
    """Raise `ValueError` if a chosen leaf belongs to the state of an optimizer."""

    def is_state(x: Any) -> bool:
        return hasattr(x, "_fields") and type(x).__module__.startswith("optax.")

    states = jax.tree.map(
        lambda x: jax.tree.map(lambda _: is_state(x), x, is_leaf=is_quantized),
        params,
        is_leaf=lambda x: is_state(x) or is_quantized(x),
    )
    found = jax.tree_util.tree_leaves_with_path(states)
    for i in where:
        path, in_state = found[i]
        # The state of an nnx.Optimizer has the names alone.
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if in_state or "opt_state" in names:
            raise ValueError(
                "params must be weights alone, got the state of an optimizer, at "
                f"{jax.tree_util.keystr(path)}, which would be quantized, too. Pass "
                "state.params."
            )


def _described(leaves: list[Any]) -> str:
    """Say which kinds of leaves there are."""
    kinds = {
        f"{type(x).__name__} of {x.bits} bits"
        if is_quantized(x)
        else f"{getattr(x, 'dtype', type(x).__name__)} of shape {np.shape(x)}"
        for x in leaves
    }
    return ", ".join(sorted(kinds)) or "None"


def _are_weights(leaves: list[Any], described: chex.ArrayTree) -> list[bool]:
    """Return which leaves are kernels and embeddings of floats."""

    def is_float(x: Any) -> bool:
        dtype = getattr(x, "dtype", None)
        if is_quantized(x) or dtype is None:
            return False
        return bool(jnp.issubdtype(dtype, jnp.floating))

    kinds = jax.tree.leaves(are_weights(described))
    return [kind and is_float(x) for kind, x in zip(kinds, leaves, strict=True)]


@jax.jit
def _dequantize(x: QuantizedArray | PackedArray) -> chex.Array:
    return x.dequantize()


def check_finite(names: list[str], finite: list[chex.Array]) -> None:
    """Raise for the first leaf that is not finite, as far as that is known."""
    if any(isinstance(flag, jax.core.Tracer) for flag in finite):
        return
    for name, flag in zip(names, jax.device_get(finite), strict=True):
        if not flag:
            raise ValueError(
                f"params must be finite to be quantized: {name} has NaN or infinity."
            )
