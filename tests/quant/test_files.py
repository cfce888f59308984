"""Files: round trips, damage, and what must never be half written."""

import builtins
import collections
import functools
import gc
import json
import os
import sys
import tempfile
import tracemalloc
import weakref
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hero_jax import quant
from hero_jax.quant import PackedArray, QuantFileError, _files

safetensors_numpy = pytest.importorskip("safetensors.numpy")

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


class Layer(NamedTuple):
    kernel: object
    bias: object


def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "conv": Layer(draw(3, 3, 4, 5), draw(5)),
        "head": [draw(7, 3).astype(jnp.bfloat16), (draw(2, 2), None)],
        "empty": {},
        "step": jnp.int32(7),
        "nothing": draw(0, 3),
        "scalar": draw(),
        "flags": jnp.array([True, False]),
        "half": draw(4).astype(jnp.float16),
        "eighth": draw(4).astype(jnp.float8_e4m3fn),
    }


def quantized(bits=4, **options):
    tree = params()
    floats = {k: tree[k] for k in ("conv", "head", "nothing", "scalar")}
    return {**tree, **quant.quantize(floats, bits, **options)}


def leaves(tree):
    return jax.tree.leaves(tree)


def check_equal(actual, expected):
    for x, y in zip(leaves(actual), leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(
            np.asarray(x).view(f"u{x.dtype.itemsize}"),
            np.asarray(y).view(f"u{y.dtype.itemsize}"),
        )


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (3, {}),
        *(
            pytest.param(bits, options, marks=pytest.mark.slow)
            for bits, options in [
                *((bits, {}) for bits in WIDTHS if bits != 3),
                *((bits, {"scheme": "symmetric"}) for bits in (2, 5, 16)),
                (3, {"axis": -1}),
            ]
        ),
        (4, {"axis": (0, -1), "group_size": (2, 1), "calibration": "mse"}),
    ],
    ids=str,
)
def test_round_trip_is_exact(bits, options, tmp_path):
    tree = quantized(bits, **options)
    path = tmp_path / "net.safetensors"
    quant.save(path, tree)
    loaded = quant.load(path)
    check_equal(loaded, tree)
    assert type(loaded["conv"]).__name__ == "Layer"
    assert loaded["conv"].kernel.bits == bits
    assert loaded["head"][1][1] is None
    assert loaded["empty"] == {}
    for x, y in zip(
        jax.tree.leaves(tree, is_leaf=quant.is_quantized),
        jax.tree.leaves(loaded, is_leaf=quant.is_quantized),
        strict=True,
    ):
        if quant.is_quantized(x):
            assert (x.bits, x.dtype, x.block_shape) == (y.bits, y.dtype, y.block_shape)
            assert (x.scheme, x.shape) == (y.scheme, y.shape)
            np.testing.assert_array_equal(x.dequantize(), y.dequantize())


def test_like_restores_the_classes(tmp_path):
    tree = quantized()
    quant.save(tmp_path / "net", tree)
    for like in (params(), tree, jax.eval_shape(params)):
        loaded = quant.load(tmp_path / "net", like=like)
        assert isinstance(loaded["conv"], Layer)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        check_equal(loaded, tree)


def test_like_restores_containers_whose_fields_are_not_sorted(tmp_path):
    tree = {"ordered": collections.OrderedDict(w=jnp.ones((2, 2)), b=jnp.zeros(2))}
    flax = pytest.importorskip("flax")

    @flax.struct.dataclass
    class State:
        step: int
        params: dict
        loss: float

    tree["state"] = State(3, {"w": np.ones(2), "b": np.arange(3)}, 0.1)
    tree["frozen"] = flax.core.freeze({"z": jnp.ones(1), "a": 2})
    quant.save(tmp_path / "x", tree)
    loaded = quant.load(tmp_path / "x", like=tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(loaded, tree)
    assert quant.load(tmp_path / "x")["state"]["params"]["w"].dtype == np.float64


def test_packed_trees_stay_packed(tmp_path):
    tree = quant.pack(quantized(3))
    quant.save(tmp_path / "net", tree)
    loaded = quant.load(tmp_path / "net")
    assert isinstance(loaded["conv"].kernel, PackedArray)
    check_equal(loaded, tree)
    # Equal weights, equal bytes, packed or not, but for the note that says which.
    quant.save(tmp_path / "other", quant.unpack(tree))
    sizes = [(tmp_path / name).stat().st_size for name in ("net", "other")]
    assert abs(sizes[0] - sizes[1]) <= 100


@pytest.mark.parametrize("tree", [jnp.arange(3.0), {}, [], None, (), 2.5, np.int8(3)])
def test_small_trees(tree, tmp_path):
    quant.save(tmp_path / "x", tree)
    loaded = quant.load(tmp_path / "x")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(loaded, tree)


def test_arrays_in_any_memory_layout(tmp_path):
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    tree = {"t": x.T, "strided": x[:, ::2], "big": x.astype(">f4"), "zero": x[0, 0]}
    quant.save(tmp_path / "x", tree)
    chex.assert_trees_all_equal(quant.load(tmp_path / "x"), tree)


SHORT = {"BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}


def test_short_floats_are_floats_for_other_readers(tmp_path):
    """Dtypes and bytes as the package `safetensors` finds them; the values by hand."""
    values = [1.5, -2.0, 0.0, 0.25]
    quant.save(tmp_path / "x", {k: jnp.array(values, v) for k, v in SHORT.items()})
    found = dict(safetensors_numpy.deserialize((tmp_path / "x").read_bytes()))
    assert {name: entry["dtype"] for name, entry in found.items()} == {
        name: name for name in SHORT
    }
    bits = np.frombuffer(found["BF16"]["data"], "<u2").astype("<u4") << 16
    np.testing.assert_array_equal(bits.view("<f4"), values)
    # Sign, 4 and 3 bits with bias 7; sign, 5 and 2 bits with bias 15.
    assert bytes(found["F8_E4M3"]["data"]) == bytes(
        [0b00111100, 0b11000000, 0, 0b101000]
    )
    assert bytes(found["F8_E5M2"]["data"]) == bytes(
        [0b00111110, 0b11000000, 0, 0b110100]
    )
    with safetensors_numpy.safe_open(tmp_path / "x", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("BF16").astype(float), values)
        assert file.metadata()["version"] == "2"  # which older versions name


def test_files_of_version_1_load(tmp_path):
    """They have short floats as unsigned integers."""
    values = jnp.array([1.5, -2.0, 0.25])
    short = {str(np.dtype(d)): values.astype(d) for d in SHORT.values()}
    text = json.dumps(["dict", [[name, name] for name in sorted(short)]])
    tensors = {k: np.asarray(v).view(f"u{v.itemsize}") for k, v in short.items()}
    metadata = {"format": "hero_jax.quant", "version": "1", "structure": text}
    metadata["sha256"] = _files._checksum(text, tensors)
    safetensors_numpy.save_file(tensors, tmp_path / "old", metadata)
    loaded = quant.load(tmp_path / "old")
    assert jax.tree.structure(loaded) == jax.tree.structure(short)
    check_equal(loaded, short)


def test_equal_trees_are_equal_files(tmp_path):
    contents = set()
    for k in range(20):
        quant.save(tmp_path / str(k), quantized(3, axis=-1))
        contents.add((tmp_path / str(k)).read_bytes())
    assert len(contents) == 1
    assert len(contents.pop()) == quant.file_size(quantized(3, axis=-1))


def test_stacked_layers(tmp_path):
    x = jax.random.normal(jax.random.key(0), (5, 3, 7))
    tree = jax.vmap(lambda x: quant.quantize_array(x, 4, axis=-1))(x)
    quant.save(tmp_path / "x", {"layers": tree})
    loaded = quant.load(tmp_path / "x")["layers"]
    assert loaded.block_shape == tree.block_shape == (3, 1)
    np.testing.assert_array_equal(loaded.dequantize(), tree.dequantize())


@pytest.mark.usefixtures("x64")
def test_double_precision(tmp_path):
    tree = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.arange(3.0)}
    quant.save(tmp_path / "q", quant.quantize(tree, 4))
    quant.save(tmp_path / "f", tree)
    assert quant.load(tmp_path / "q")["w"].dequantize().dtype == jnp.float64
    with (
        jax.experimental.disable_x64()
        if hasattr(jax.experimental, "disable_x64")
        else jax.enable_x64(False)
    ):
        with pytest.raises(
            ValueError, match=r"float64 weights at w: turn jax_enable_x"
        ):
            quant.load(tmp_path / "q")
        floats = quant.load(tmp_path / "f")
        assert floats["w"].dtype == np.float64
        np.testing.assert_array_equal(floats["w"], np.asarray(tree["w"]))


def test_flax_states(tmp_path):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Sequential(*[nnx.Linear(3, 3, rngs=rngs) for _ in "ab"])
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    tree = quant.quantize(state, 4)
    quant.save(tmp_path / "net", tree)
    loaded = quant.load(tmp_path / "net", like=state)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    check_equal(loaded, tree)
    net = Net(nnx.Rngs(1))
    nnx.update(net, quant.dequantize(loaded))
    np.testing.assert_array_equal(
        jax.tree.leaves(nnx.state(net, nnx.Param))[1],
        jax.tree.leaves(quant.dequantize(tree))[1],
    )
    # By itself the file gives plain dicts.
    assert quant.load(tmp_path / "net")["body"]["layers"][1]["kernel"].bits == 4


def test_sizes_are_those_of_packed_integers(tmp_path):
    tree = {"w": jnp.ones((100, 100)), "b": jnp.ones(100)}
    for bits in WIDTHS:
        q = quant.quantize(tree, bits, axis=-1)
        expected = 100 * 100 * bits // 8 + 100 * (4 + 4) + 400
        assert quant.size_in_bytes(q) == expected
        assert quant.size_in_bytes(quant.pack(q)) == expected
        quant.save(tmp_path / "x", q)
        assert 0 < (tmp_path / "x").stat().st_size - expected < 1000
    assert quant.size_in_bytes(jax.eval_shape(lambda: tree)) == 40_400


def test_another_like_is_named(tmp_path):
    tree = quantized()
    quant.save(tmp_path / "net", tree)
    like = params()
    del like["scalar"]
    with pytest.raises(
        ValueError, match=r"\[\] are in like only, \['scalar'\] in the f"
    ):
        quant.load(tmp_path / "net", like=like)
    with pytest.raises(ValueError, match="or containers differ"):
        quant.load(tmp_path / "net", like={**params(), "head": tuple(params()["head"])})
    with pytest.raises(
        ValueError, match=r"half is float16\[5\] in like and float16\[4"
    ):
        quant.load(
            tmp_path / "net", like={**params(), "half": jnp.ones(5, jnp.float16)}
        )


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": "text"}, TypeError, r"must be arrays of booleans.* got str \(at a\)"),
        (
            {"a": [object()]},
            TypeError,
            r"must be arrays of booleans.*object \(at a/0\)",
        ),
        ({"a": jnp.ones(2, jnp.complex64)}, TypeError, r"got complex64 \(at a\)"),
        ({"a": np.array(["x"])}, TypeError, r"must be arrays of booleans"),
        ({1.5: jnp.ones(2)}, TypeError, "must be all strings or all integers"),
        (
            {"a": {1: jnp.ones(2), "b": jnp.ones(2)}},
            TypeError,
            r"all strings or all integers to be saved, got \[1, 'b'\] in dict at a",
        ),
        (  # not sorted by JAX, but it would be a dict when loaded
            {"a": collections.OrderedDict([(1, jnp.ones(2)), ("b", jnp.ones(2))])},
            TypeError,
            r"got \[1, 'b'\] in OrderedDict at a",
        ),
        ({"a": 2**70}, TypeError, r"must be arrays of booleans.*got object \(at a\)"),
    ],
)
def test_what_cannot_be_saved_is_named(tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        quant.save(tmp_path / "x", tree)
    assert not list(tmp_path.iterdir())


def test_keys_and_weights_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"got key<.* \(at rng\)"):
        quant.save(tmp_path / "x", {"rng": jax.random.key(0)})
    bad = jax.jit(lambda x: quant.quantize(x, 4))({"w": jnp.array([[1.0, jnp.nan]])})
    with pytest.raises(
        ValueError, match=r"scale must be positive and finite.* \(at w\)"
    ):
        quant.save(tmp_path / "x", bad)


# Damage


@functools.cache
def sound_file():
    """Bytes of a small file."""
    with tempfile.TemporaryDirectory() as folder:
        quant.save(Path(folder) / "x", {"w": quantized(3, axis=-1)["conv"]})
        return (Path(folder) / "x").read_bytes()


def load_bytes(folder, data):
    path = folder / "damaged"
    path.write_bytes(data)
    return quant.load(path)


anywhere = st.integers(0, len(sound_file()) - 1)
shared_folder = settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@shared_folder
@given(anywhere, st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path, place, bit):
    data = bytearray(sound_file())
    data[place] ^= 1 << bit
    with pytest.raises(QuantFileError, match="damaged"):
        load_bytes(tmp_path, bytes(data))


@shared_folder
@given(anywhere)
def test_every_truncation_is_noticed(tmp_path, length):
    with pytest.raises(QuantFileError):
        load_bytes(tmp_path, sound_file()[:length])


@shared_folder
@given(anywhere, st.binary(min_size=1, max_size=20))
def test_insertions_are_noticed(tmp_path, place, extra):
    data = sound_file()
    with pytest.raises(QuantFileError):
        load_bytes(tmp_path, data[:place] + extra + data[place:])


@shared_folder
@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(tmp_path, data):
    with pytest.raises(QuantFileError):
        load_bytes(tmp_path, data)


def rewritten(folder, change, resign=True):
    """Write the sound file anew after `change(tensors, metadata)`."""
    original, path = folder / "original", folder / "changed"
    original.write_bytes(sound_file())
    with safetensors_numpy.safe_open(original, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    described = json.loads(metadata["structure"])
    kernel = described[1][0][1][2][0][1]
    change(tensors, metadata, kernel)
    metadata["structure"] = json.dumps(described)
    if resign:
        metadata["sha256"] = _files._checksum(metadata["structure"], tensors)
    safetensors_numpy.save_file(tensors, path, metadata)
    return path


def test_an_unchanged_rewriting_loads(tmp_path):
    assert quant.load(rewritten(tmp_path, lambda *_: None))["w"].kernel.bits == 3


LIES = {
    "fewer bits": lambda t, m, k: k.update(bits=2),
    "no bits": lambda t, m, k: k.update(bits=9),
    "text for bits": lambda t, m, k: k.update(bits="3"),
    "another shape": lambda t, m, k: k.update(row_shape=[3, 3, 4, 6]),
    "a huge shape": lambda t, m, k: k.update(row_shape=[2**40, 2**40]),
    "a negative shape": lambda t, m, k: k.update(row_shape=[-3, -3, 4, 5]),
    "a shape of text": lambda t, m, k: k.update(row_shape="3345"),
    "numbers beyond floats": lambda t, m, k: k.update(
        row_shape=[10**400, 1], block_shape=[1, 1]
    ),
    "text for a flag": lambda t, m, k: k.update(packed="no"),
    "other blocks": lambda t, m, k: k.update(block_shape=[3, 3, 4, 5]),
    "empty blocks": lambda t, m, k: k.update(block_shape=[0, 0, 0, 0]),
    "another dtype": lambda t, m, k: k.update(dtype="int32"),
    "code for a dtype": lambda t, m, k: k.update(dtype="__import__('os')"),
    "a wider dtype": lambda t, m, k: k.update(dtype="float64"),
    "no scheme": lambda t, m, k: k.update(scheme="none"),
    "another scheme": lambda t, m, k: k.update(scheme="symmetric"),
    "missing facts": lambda t, m, k: k.clear(),
    "a missing tensor": lambda t, m, k: t.pop("w/kernel.scale"),
    "an extra tensor": lambda t, m, k: t.update(extra=np.ones(2)),
    "a negative scale": lambda t, m, k: t["w/kernel.scale"].fill(-1.0),
    "a scale that is not finite": lambda t, m, k: t["w/kernel.scale"].fill(np.nan),
    "a leaf of another dtype": lambda t, m, k: t.update({"w/bias": np.ones(5)}),
    "another format": lambda t, m, k: m.update(format="pt"),
    "no format": lambda t, m, k: m.pop("format"),
    "a later version": lambda t, m, k: m.update(version="3"),
}


@pytest.mark.parametrize("lie", LIES)
def test_mislabelled_files_are_refused_even_with_a_sound_checksum(lie, tmp_path):
    with pytest.raises(QuantFileError, match="changed"):
        quant.load(rewritten(tmp_path, LIES[lie]))


def test_a_changed_structure_is_noticed_by_the_checksum(tmp_path):
    path = rewritten(
        tmp_path, lambda t, m, k: k.update(block_shape=[3, 3, 4, 2]), False
    )
    with pytest.raises(QuantFileError, match="its checksum does not fit"):
        quant.load(path)


def test_a_changed_shape_is_noticed_by_the_checksum(tmp_path):
    """The bytes are the same, and nothing else says what shape they had."""

    def turn(tensors, *_):
        tensors["w/bias"] = tensors["w/bias"].reshape(5, 1)

    with pytest.raises(QuantFileError, match="its checksum does not fit"):
        quant.load(rewritten(tmp_path, turn, resign=False))
    assert quant.load(rewritten(tmp_path, turn))["w"].bias.shape == (5, 1)


def test_leaves_that_would_overwrite_each_other_are_refused(tmp_path):
    tree = {"w": quant.quantize_array(jnp.ones(3), 4), "w.scale": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"two leaves would be stored as w\.scale"):
        quant.save(tmp_path / "x", tree)


def test_structures_of_another_kind_are_refused(tmp_path):
    path = rewritten(tmp_path, lambda t, m, k: k.update(deep=None))
    assert quant.load(path)["w"].kernel.bits == 3  # unknown facts do no harm
    mixed = ["dict", [[1, ["list", []]], ["b", ["list", []]]]]
    boolean = ["dict", [[True, ["list", []]]]]
    missing = ["list", ["float32"]]
    trees = map(json.dumps, (missing, mixed, boolean))
    for text in ("[" * 100_000, "not json", *trees):
        metadata = {"format": "hero_jax.quant", "version": "1", "structure": text}
        metadata["sha256"] = _files._checksum(text, {})
        safetensors_numpy.save_file({}, tmp_path / "deep", metadata)
        with pytest.raises(QuantFileError, match="malformed"):
            quant.load(tmp_path / "deep")


def test_other_safetensors_files_are_refused_by_their_header(tmp_path):
    """Without the memory for what is in them."""
    safetensors_numpy.save_file({"w": np.ones(10**6)}, tmp_path / "x")
    safetensors_numpy.save_file(
        {"w": np.ones(10**6)},
        tmp_path / "later",
        {"format": "hero_jax.quant", "version": "9"},
    )
    tracemalloc.start()
    try:
        with pytest.raises(
            QuantFileError, match=r"not written by hero_jax\.quant\.save"
        ):
            quant.load(tmp_path / "x")
        with pytest.raises(QuantFileError, match="has version '9' of the format"):
            quant.load(tmp_path / "later")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        quant.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match="is not a file, but a folder"):
        quant.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        quant.save(tmp_path / "nowhere" / "x", {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a file system without pipes")
def test_what_is_no_file_is_refused(tmp_path):
    folder, pipe, loop = (tmp_path / name for name in ("folder", "pipe", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path, error, message in (
        (folder, OSError, "folder is not a file, but a folder"),
        (pipe, OSError, "pipe is not a file, but a folder, a pipe or a device"),
        (loop, OSError, "symbolic links: .*loop"),
    ):
        for call in (quant.load, lambda path: quant.save(path, {})):
            with pytest.raises(error, match=message):
                call(path)
    assert len(list(tmp_path.iterdir())) == 3
    assert pipe.is_fifo()


def test_classes_of_named_tuples_live_as_long_as_they_are_used(tmp_path):
    quant.save(tmp_path / "x", Layer(np.ones(2), np.ones(3)))
    one, other = quant.load(tmp_path / "x"), quant.load(tmp_path / "x")
    assert type(one) is type(other)
    made = weakref.ref(type(one))
    del one, other
    gc.collect()
    assert made() is None


def test_an_older_file_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "x"
    quant.save(path, {"w": jnp.ones(3)})
    before = path.read_bytes()

    def fail(_):
        assert len(list(tmp_path.iterdir())) == 2
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        quant.save(path, {"w": jnp.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == before


def test_files_get_the_usual_permissions_and_keep_others(tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    quant.save(x, {"w": jnp.ones(3)})
    y.write_bytes(b"")
    assert x.stat().st_mode == y.stat().st_mode
    x.chmod(0o600)
    quant.save(x, {"w": jnp.zeros(3)})
    assert x.stat().st_mode & 0o777 == 0o600


def test_a_link_keeps_pointing_at_the_file(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.write_bytes(b"")
    link.symlink_to(real)
    quant.save(link, {"w": jnp.ones(3)})
    assert link.is_symlink()
    np.testing.assert_array_equal(quant.load(real)["w"], 1.0)
    quant.save(tmp_path / ("n" * 250), {})  # the longest names leave little room


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [m for m in sys.modules if m.startswith("safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    for call in (lambda: quant.save(tmp_path / "x", {}), lambda: quant.load(tmp_path)):
        with pytest.raises(ImportError, match=r'pip install "hero_jax\[files\]"'):
            call()
