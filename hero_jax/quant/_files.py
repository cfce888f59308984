"""Quantized trees in files: safetensors, with what is needed to rebuild the tree.

The tensors of a file hold packed integers, scales, zero points and the leaves that are
not quantized. Its metadata hold the structure of the tree as JSON and a checksum over
all of it. Nothing in a file is executed when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _frameworks
from hero_jax.quant import _structure
from hero_jax.quant._array import FLOATS, QuantizedArray
from hero_jax.quant._packing import PackedArray, pack_array
from hero_jax.quant._tree import is_quantized

FORMAT, VERSIONS = "hero_jax.quant", ("1", "2")
"""Version 1 has the floats of `_SHORT` as unsigned integers of their size."""

_SHORT = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_STORED = {
    "BOOL": "bool",
    **{
        f"{k[0].upper()}{n}": f"{k}{n}"
        for k in ("int", "uint")
        for n in (8, 16, 32, 64)
    },
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **_SHORT,
}
"""The dtypes of files by their names there."""
_SAFETENSORS = ("safetensors.numpy", "files", "saving a tree to a file")
_FIELDS = dataclasses.fields(PackedArray)
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a description that does not fit its tensors may raise."""


class QuantFileError(ValueError):
    """A file is damaged, or is not one that :func:`save` wrote."""


def save(path: str | os.PathLike[str], tree: chex.ArrayTree) -> None:
    """Write a tree, quantized or not, to a safetensors file.

    Integers are packed: 4-bit weights take half a byte each. The file appears at once
    and whole; an older one stays until then. Equal trees give equal bytes. Needs the
    package safetensors.

    Args:
      path: file to write, by custom `*.safetensors`.
      tree: dicts, lists, tuples, named tuples and None are kept. Other containers are
        kept as the dicts or lists that they look like: Flax's `FrozenDict` and
        dataclasses, an NNX `State`; see `like` of :func:`load`.

    Raises:
      ImportError: safetensors is not installed.
      TypeError: a leaf is not an array of a plain dtype, a key of a dict is neither
        string nor integer, or one dict has keys of both kinds.
      ValueError: a quantized leaf has NaN or infinite scales, or two leaves would be
        stored under one name.
      OSError: the file cannot be written, or `path` is there and no file: a folder, a
        pipe, a link to itself.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from hero_jax import quant
      >>> params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     quant.save(f"{folder}/net.safetensors", quant.quantize(params, bits=4))
      ...     quantized = quant.load(f"{folder}/net.safetensors")
      >>> quantized["kernel"].bits, quantized["bias"].shape
      (4, (3,))
    """
    write_file(path, _serialized(tree))


def file_size(tree: chex.ArrayTree) -> int:
    """Return how many bytes the file of a tree has: :func:`save` without writing.

    Args:
      tree: as in :func:`save`.

    Returns:
      Its length with header and checksum, which :func:`hero_jax.quant.size_in_bytes`
      leaves out.

    Raises:
      ImportError: safetensors is not installed.
      TypeError: as :func:`save`.
      ValueError: as :func:`save`.
    """
    return len(_serialized(tree))


def _serialized(tree: chex.ArrayTree) -> bytes:
    """Return what is in the file of a tree."""
    safetensors = _frameworks.needed(*_SAFETENSORS)
    tensors: dict[str, np.ndarray] = {}

    def leaf(name: str, x: Any) -> Any:
        with _checks.at(name):
            description, arrays = _disassemble(x)
        for suffix, array in arrays.items():
            if name + suffix in tensors:
                raise ValueError(f"two leaves would be stored as {name + suffix}.")
            tensors[name + suffix] = array
        return description

    text = json.dumps(
        _structure.describe(tree, leaf, is_quantized), separators=(",", ":")
    )
    short = any(array.dtype.name in _SHORT.values() for array in tensors.values())
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[short],
        "structure": text,
        "sha256": _checksum(text, tensors),
    }
    data = memoryview(safetensors.save(tensors, metadata))
    length = int.from_bytes(data[:8], "little")
    # The package orders the metadata at random: equal trees are to be equal files.
    header = {**json.loads(bytes(data[8 : 8 + length])), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return b"".join(
        (len(text).to_bytes(8, "little"), text.encode(), data[8 + length :])
    )


def load(
    path: str | os.PathLike[str], *, like: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Read a tree that :func:`save` wrote.

    Args:
      path: file to read.
      like: tree with the containers that are wanted, such as the `nnx.State` or the
        params before quantization; leaves may be `jax.ShapeDtypeStruct`. Default: what
        the file says, in which a named tuple is of a new class with the old name and
        fields, the same as in the other trees in use that have them.

    Returns:
      The tree, of JAX arrays; 64-bit leaves are NumPy arrays unless JAX's double
      precision is on.

    Raises:
      ImportError: safetensors is not installed.
      QuantFileError: the file is damaged, of another kind or of a newer version.
      ValueError: `like` has another structure, shape or dtype; or weights were float64
        and JAX's double precision is off.
      OSError: the file cannot be read, or `path` is no file: a folder, a pipe, a link
        to itself.
    """
    path = Path(path)
    text, tensors = _read(path)
    leaves: dict[str, Any] = {}

    def leaf(name: str, description: Any) -> Any:
        leaves[name] = _assemble(name, description, tensors)
        return leaves[name]

    with _well_formed(path):
        tree = _structure.rebuild(json.loads(text), leaf)
        if tensors:
            raise ValueError(f"no leaf owns the tensors {sorted(tensors)}")
    for name, x in leaves.items():
        if is_quantized(x) and not isinstance(x.scale, jax.Array):
            raise ValueError(
                f"{path} has float64 weights at {name}: "
                "turn jax_enable_x64 on to load them."
            )
    return tree if like is None else _poured_into(like, json.loads(text), leaves)


@contextlib.contextmanager
def _well_formed(path: Path) -> Iterator[None]:
    """Raise `QuantFileError` for whatever a description that does not fit causes."""
    try:
        yield
    except _MALFORMED as error:
        kind = type(error).__name__
        raise QuantFileError(f"{path} is malformed: {kind}: {error}") from error


def _disassemble(x: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the description of a leaf, and its arrays by suffix of its name."""
    if not is_quantized(x):
        dtype, array = _as_stored(x)
        return dtype, {"": array}
    packed = pack_array(x) if isinstance(x, QuantizedArray) else x
    packed = PackedArray(**{f.name: getattr(packed, f.name) for f in _FIELDS})  # checks
    arrays = {".values": packed.packed, ".scale": packed.scale}
    if packed.zero_point is not None:
        arrays[".zero_point"] = packed.zero_point
    description = {
        "bits": packed.bits,
        "row_shape": packed.row_shape,
        "scheme": packed.scheme,
        "dtype": str(packed.dtype),
        "block_shape": packed.block_shape,
        "packed": isinstance(x, PackedArray),
    }
    defaults = _defaults(description)
    description = {k: v for k, v in description.items() if v != defaults.get(k)}
    return description, {suffix: _as_stored(a)[1] for suffix, a in arrays.items()}


def _defaults(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a description does not say: headers count in small files."""
    whole = description["row_shape"]
    return {"dtype": "float32", "block_shape": whole, "packed": False}


def _assemble(name: str, description: Any, tensors: dict[str, np.ndarray]) -> Any:
    """Return a leaf, taking what it is made of out of `tensors`."""
    if isinstance(description, str):
        return _as_jax(_as_dtype(tensors.pop(name), description))
    description = {**_defaults(description), **description}
    affine = {"affine": True, "symmetric": False}[description["scheme"]]
    array = PackedArray(
        packed=_as_jax(tensors.pop(f"{name}.values")),
        scale=_as_jax(tensors.pop(f"{name}.scale")),
        zero_point=_as_jax(tensors.pop(f"{name}.zero_point")) if affine else None,
        bits=description["bits"],
        dtype={str(dtype): dtype for dtype in FLOATS}[description["dtype"]],
        row_shape=tuple(description["row_shape"]),
        block_shape=tuple(description["block_shape"]),
    )
    if not isinstance(description["packed"], bool):
        raise ValueError(f"{name} has packed={description['packed']!r}")
    return array if description["packed"] else array.unpack()


def _as_stored(x: Any) -> tuple[str, np.ndarray]:
    """Return the name of the dtype, and the array as one that safetensors knows."""
    name = _dtype_name(x)
    if name not in _STORED.values():
        raise TypeError(
            "leaves must be arrays of booleans, integers or floats to be saved, "
            f"got {name}."
        )
    array = np.asarray(x, order="C")
    return name, array.astype(array.dtype.newbyteorder("<"), copy=False)


def _dtype_name(x: Any) -> str:
    """Return the name of the dtype of an array or number, else that of the type."""
    if isinstance(x, (bool, int, float)):
        return np.asarray(x).dtype.name
    return str(getattr(getattr(x, "dtype", None), "name", type(x).__name__))


def _as_dtype(stored: np.ndarray, name: str) -> np.ndarray:
    """Return the leaf of this dtype, of version 1, too."""
    if name in _SHORT.values() and stored.dtype == f"u{np.dtype(name).itemsize}":
        return stored.view(name)
    if name not in _STORED.values() or stored.dtype != np.dtype(name):
        raise ValueError(f"a leaf of dtype {name!r} is stored as {stored.dtype}")
    return stored


def _as_jax(array: np.ndarray) -> chex.Array:
    """Return a JAX array, unless JAX would drop half of the bits."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array)


def _checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the structure and of all tensors with their headers."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        header = json.dumps([name, array.dtype.name, array.shape])
        digest.update(header.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return the structure as JSON, and the tensors, of a file that is whole and ours.

    Of other files only the header is read.
    """
    safetensors = _frameworks.needed(*_SAFETENSORS)
    _check_is_file(path)
    with path.open("rb") as file:
        try:
            with safetensors.safe_open(path, framework="numpy") as checked:
                metadata = checked.metadata() or {}
        except OSError:
            raise
        except Exception as error:  # whatever the parser says of damaged bytes
            raise QuantFileError(
                f"{path} is not a valid safetensors file: {error}."
            ) from error
        if metadata.get("format") != FORMAT:
            raise QuantFileError(f"{path} was not written by hero_jax.quant.save.")
        if metadata.get("version") not in VERSIONS:
            raise QuantFileError(
                f"{path} has version {metadata.get('version')!r} of the format; this "
                f"hero_jax reads versions {' and '.join(VERSIONS)}."
            )
        with _well_formed(path):
            tensors = _tensors(file)
    text = metadata.get("structure", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise QuantFileError(f"{path} is damaged: its checksum does not fit.")
    return text, tensors


def _tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, whose package lacks 8-bit floats."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        data = np.fromfile(file, np.uint8, end - begin)
        tensors[name] = data.view(_STORED[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _poured_into(
    like: chex.ArrayTree, description: Any, leaves: Mapping[str, Any]
) -> chex.ArrayTree:
    """Return the leaves in the containers of `like`, which must be the same tree."""
    wanted: dict[str, Any] = {}

    def leaf(name: str, x: Any) -> str:
        wanted[name] = x
        return "leaf"

    expected = _structure.describe(like, leaf, is_quantized)
    if _structure.skeleton(expected) != _structure.skeleton(description):
        only_like, only_file = set(wanted) - set(leaves), set(leaves) - set(wanted)
        raise ValueError(
            "like must have the structure of the file: leaves "
            f"{sorted(only_like)} are in like only, {sorted(only_file)} in the file "
            "only, or containers differ."
        )
    for name, x in wanted.items():
        y = leaves[name]
        in_like, in_file = (f"{_dtype_name(a)}{list(_shape(a))}" for a in (x, y))
        if in_like != in_file:
            raise ValueError(
                f"like must have the shapes and dtypes of the file: {name} is "
                f"{in_like} in like and {in_file} in the file."
            )
    return jax.tree.unflatten(
        jax.tree.structure(like, is_leaf=is_quantized),
        [leaves[name] for name in wanted],
    )


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape if hasattr(x, "shape") else np.shape(x))


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: beside its place, then into it.

    :func:`save` writes this way. A link keeps pointing at the file, and the file keeps
    its permissions.

    Args:
      path: of the file.
      data: its content.

    Raises:
      OSError: the file, which the message names, cannot be written.

    Example:
      >>> import os, tempfile
      >>> from hero_jax import quant
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     quant.write_file(os.path.join(folder, "result.json"), b"{}")
      ...     os.listdir(folder)
      ['result.json']
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        _check_is_file(path)
    path = path.resolve()
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            if path.exists():
                partial.chmod(path.stat().st_mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_is_file(path: Path) -> None:
    """Raise `OSError` for a folder, a pipe, a device, a link to itself, or nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a file, but a folder, a pipe or a device.")
