"""What `optax.tree` lacks: overflow-safe norms, boolean masks, names of leaves."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _frameworks
from hero_jax._typing import Mask, Params


def wide_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Return the dtype in which a leaf is perturbed and its norm taken.

    A perturbation added to half-precision weights is rounded away, so those are
    widened to float32. Wider floats keep their own dtype.
    """
    dtype = np.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def widest_dtype(tree: chex.ArrayTree) -> np.dtype:
    """Return the widest :func:`wide_dtype` of the leaves, float32 for no leaves."""
    dtypes = [wide_dtype(jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))


def has_half_precision(tree: chex.ArrayTree) -> bool:
    """Whether a leaf would be widened."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    return any(dtype != wide_dtype(dtype) for dtype in dtypes)


def widen(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Cast every leaf to its :func:`wide_dtype`."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(jnp.result_type(x))), tree)


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Cast every leaf of `tree` to the dtype of the same leaf of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def scale(factor: chex.Numeric, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Multiply every leaf, which keeps its dtype whatever that of the factor."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, tree)


def norm(x: chex.Array) -> chex.Array:
    """Euclidean norm of one array, free of overflow and underflow.

    The largest magnitude is divided out before squaring, so that every finite
    nonzero array of representable norm has a finite nonzero norm: a norm that
    overflowed to infinity would silently turn a direction `x / norm(x)` into zero.

    Args:
      x: array of any shape.

    Returns:
      Scalar of the array's :func:`wide_dtype`; NaN or infinity when `x` has any.
    """
    x = jnp.asarray(x, wide_dtype(jnp.result_type(x)))
    largest = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
    square = jnp.sum(jnp.square(x / scale))
    is_zero = square == 0.0  # where the square root has no derivative
    return jnp.where(is_zero, 0.0, scale * jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def global_norm(tree: chex.ArrayTree) -> chex.Array:
    """Euclidean norm over all leaves together; zero for a tree without leaves."""
    dtype = widest_dtype(tree)
    norms = [norm(x).astype(dtype) for x in jax.tree.leaves(tree)]
    return norm(jnp.stack(norms)) if norms else jnp.zeros((), dtype)


def mean(trees: Sequence[chex.ArrayTree]) -> chex.ArrayTree:
    """Return the mean over trees of one structure; one alone comes back as it is."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def leaf_names(tree: chex.ArrayTree) -> list[str]:
    """Return the path of every leaf, as in `['dense']['kernel']`."""
    return [
        jax.tree_util.keystr(path) or "the tree itself"
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def leaf_paths(
    tree: chex.ArrayTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
    """Return the path of every leaf, as in `dense/kernel`.

    Flax's boxes around an array, `nnx.Param` and `nn.Partitioned`, do not count.
    """
    box = jax.tree_util.GetAttrKey("value")
    return [
        jax.tree_util.keystr(
            path[:-1] if path and path[-1] == box else path, simple=True, separator="/"
        )
        for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    ]


def path_matches(path: str, pattern: str) -> bool:
    """Whether a leaf is this one, in this subtree, or fits a pattern with stars."""
    inside = path == pattern or path.startswith(f"{pattern}/")
    return inside or fnmatch.fnmatchcase(path, pattern)


def unique_leaf_paths(tree: chex.ArrayTree) -> list[str]:
    """Return the path of every leaf, as in `dense/kernel`, if that tells all apart.

    Otherwise as in `['dense']['kernel']`: keys with a slash may coincide with others.
    """
    paths = leaf_paths(tree)
    return paths if len({*paths}) == len(paths) else leaf_names(tree)


def size(tree: chex.ArrayTree) -> int:
    """Return the number of entries of all leaves."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(tree))


def check_real(name: str, tree: chex.ArrayTree) -> None:
    """Raise `TypeError` unless every leaf is a real floating-point array."""
    for path, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
            raise TypeError(
                f"{name} must have real floating-point arrays as leaves, got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)} at {path}."
            )


def check_params(name: str, tree: chex.ArrayTree) -> None:
    """Raise unless this is a tree of weights and nothing else: of real arrays."""
    _frameworks.check_weights_alone(name, tree)
    try:
        check_real(name, tree)
    except TypeError as error:
        for note in _frameworks.notes(name, tree):
            error.add_note(f"hero_jax: {note}")
        raise


def check_same_structure(
    name: str, tree: chex.ArrayTree, like_name: str, like: chex.ArrayTree
) -> None:
    """Raise `ValueError` unless `tree` has the structure and shapes of `like`."""
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(like)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must have the tree structure of {like_name}: "
            f"expected {structures[1]}, got {structures[0]}."
        )
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    for path, shapes in zip(leaf_names(like), pairs, strict=True):
        got, expected = map(np.shape, shapes)
        if got != expected:
            raise ValueError(
                f"{name} must have the shapes of {like_name}: expected {expected} "
                f"at {path}, got {got}."
            )


def check_vector(name: str, vector: chex.ArrayTree, params: Params) -> None:
    """Raise unless `vector` is a tree of real arrays like `params`."""
    check_real(name, vector)
    check_same_structure(name, vector, "params", params)


def is_function_of(mask: Any, params: Params) -> bool:
    """Whether a mask is a function, and not a tree like `params` that can be called."""
    of_mask, of_params = map(jax.tree.structure, (mask, params))
    same = bool(of_mask == of_params)  # type: ignore[operator]
    is_tree = same and not jax.tree_util.all_leaves([mask])
    return callable(mask) and not is_tree


def of_function(name: str, mask: Any, params: Params) -> Any:
    """Return what a mask that is a function makes of `params`; else the mask itself.

    Raises:
      TypeError: it returned no tree, as if called for each leaf, or nothing at all.
    """
    if not is_function_of(mask, params):
        return mask
    called = (
        f"{name} was called as {name}(params), with the whole tree. To look at each "
        "leaf: lambda params: jax.tree.map(lambda x: x.ndim >= 2, params); by path: "
        "lambda params: jax.tree_util.tree_map_with_path(lambda path, x: 'kernel' in "
        "jax.tree_util.keystr(path), params)."
    )
    try:
        found = mask(params)
    except Exception as error:
        error.add_note(f"hero_jax: {called}")
        raise
    is_tree = found is not None and not jax.tree_util.all_leaves([found])
    if not is_tree and not jax.tree_util.all_leaves([params]):
        raise TypeError(f"{name} must return a tree of booleans, got {found}. {called}")
    return found


def resolve_mask(
    name: str,
    mask: Mask | None,
    params: Params,
    needed_for: str | None = None,
    default: Mask | None = None,
) -> chex.ArrayTree:
    """Return `mask` as a tree with one Python bool per leaf of `params`.

    Args:
      name: what the argument is called, for the errors.
      mask: tree of booleans with the structure of `params` or a prefix of it
        (`True` alone selects everything), or a function of `params` returning one;
        `None` is for the default.
      params: the tree to be masked.
      needed_for: an argument that does nothing unless a leaf is selected. A mask
        spelled out as a tree may select nothing all the same.
      default: function that selects kernels and embeddings, or `None`: everything.

    Returns:
      Tree of Python bools with the structure of `params`.

    Raises:
      ValueError: the structure is not a prefix of that of `params`, or a function
        selects nothing where something is needed.
      TypeError: a leaf is not a concrete boolean.
    """
    by_default = mask is None
    mask = default if by_default else mask
    by_function = is_function_of(mask, params)
    mask = True if mask is None else of_function(name, mask, params)

    def as_bool(path: Any, leaf: Any) -> bool:
        known = not isinstance(leaf, jax.core.Tracer) and np.ndim(leaf) == 0
        if not known or not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), bool):
            raise TypeError(
                f"{name} must have plain booleans, one for each leaf of params and "
                "known before tracing, as in jax.tree.map(lambda x: x.ndim >= 2, "
                f"params); got {_checks.got(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the tree itself'}."
            )
        return bool(leaf)

    mask = jax.tree_util.tree_map_with_path(as_bool, mask)
    try:
        resolved = jax.tree.broadcast(mask, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must have the tree structure of params, or a prefix of it: "
            f"params has {jax.tree.structure(params)}, "
            f"{name} has {jax.tree.structure(mask)}."
        ) from error
    leaves = jax.tree.leaves(resolved)
    if needed_for and by_function and leaves and not any(leaves):
        shapes = sorted({np.shape(x) for x in jax.tree.leaves(params)})
        which = "a function"
        if by_default:
            which = "by default kernels and embeddings, of two or more dimensions"
        raise ValueError(
            f"{needed_for} must have leaves to act on, and {name} ({which}) selects "
            f"none of params, which have the shapes {shapes}. Pass {name}=True to "
            f"select all, or {needed_for}=0."
        )
    return resolved


def select(mask: chex.ArrayTree, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Replace by zeros the leaves whose `mask` is False."""
    return jax.tree.map(lambda keep, x: x if keep else jnp.zeros_like(x), mask, tree)
