"""Containers as JSON and back."""

import collections
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_jax.quant import _structure


class Pair(NamedTuple):
    left: object
    right: object


keys = st.text(max_size=4) | st.integers(-3, 3)
trees = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), children, max_size=3)
        | st.dictionaries(st.integers(-3, 3), children, max_size=3)
        | st.builds(Pair, children, children)
    ),
    max_leaves=12,
)


def describe(tree):
    leaves = {}

    def leaf(name, x):
        assert name not in leaves
        leaves[name] = x
        return "leaf"

    return _structure.describe(tree, leaf, lambda _: False), leaves


def plain(tree):
    """Replace named tuples by what they hold, for comparison across classes."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return (type(tree).__name__, {k: plain(v) for k, v in tree._asdict().items()})
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(plain, tree))
    return tree


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(trees)
def test_round_trip_through_text(tree):
    description, leaves = describe(tree)
    assert list(leaves.values()) == jax.tree.leaves(tree)
    again = _structure.rebuild(
        json.loads(json.dumps(description)), lambda name, _: leaves[name]
    )
    assert plain(again) == plain(tree)


def test_names_are_paths_and_never_the_same():
    tree = {"a": [1, {"b": 2}], "a/1/b": 3, "__metadata__": 4}
    assert describe(tree)[1] == {"__metadata__~": 4, "a/0": 1, "a/1/b": 2, "a/1/b~": 3}
    assert describe(7)[1] == {".": 7}


def test_named_tuples_of_equal_files_are_of_one_class():
    description, leaves = describe(Pair(1, [2]))
    one, two = (_structure.rebuild(description, lambda n, _: leaves[n]) for _ in "ab")
    assert type(one) is type(two)
    assert type(one).__name__ == "Pair"
    assert jax.tree.map(lambda x, y: x + y, one, two).right == [4]


def test_other_containers_become_what_they_look_like():
    ordered = collections.OrderedDict(z=1, a=2)
    assert describe(ordered)[0] == ["dict", [["z", "leaf"], ["a", "leaf"]]]

    flax = pytest.importorskip("flax")
    assert describe(flax.core.freeze({"a": {"b": 1}}))[1] == {"a/b": 1}
    box = flax.linen.Partitioned(np.ones(2), ("x",))
    assert list(describe({"w": box})[1]) == ["w"]

    @flax.struct.dataclass
    class State:
        step: int
        params: dict

    assert describe(State(3, {"w": 1}))[1] == {"step": 3, "params/w": 1}


@pytest.mark.parametrize("key", [1.5, (1, 2), True, None])
def test_keys_that_json_does_not_keep_are_named(key):
    with pytest.raises(
        TypeError, match=r"must be all strings or all integers .* dict at a/0"
    ):
        describe({"a": [{key: 1}]})


@pytest.mark.parametrize(
    "bad",
    [
        [],
        ["dict"],
        ["dict", {}],
        ["dict", [["a"]]],
        ["dict", [["a", None], ["a", None]]],
        ["dict", [[1.5, None]]],
        ["set", []],
        ["list", None],
        ["namedtuple", "T", [["class", None]]],
        ["namedtuple", "T; x", [["a", None]]],
        ["namedtuple", 3, []],
        ["namedtuple", "T", [["_private", None]]],
        ["namedtuple", "T", [[1, None]]],
        5,
        True,
    ],
)
def test_malformed_structures_are_refused(bad):
    with pytest.raises((ValueError, TypeError)):
        _structure.rebuild(bad, lambda *_: 0)
