"""The snippets of docs/getting_started.md, run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from hero_jax import quant

PAGE = Path(__file__).parents[1] / "docs" / "getting_started.md"
OPTIONAL = ("equinox", "flax", "haiku")


def snippets():
    """Yield the heading above each block of Python, and the block."""
    heading = None
    for part in re.split(
        r"^(#+ [^\n]*|```python\n.*?\n```)$", PAGE.read_text(), flags=re.M | re.S
    ):
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```python") and ">>>" not in part:
            yield heading, part.removeprefix("```python\n").removesuffix("\n```")


(_, DATA), *SNIPPETS = snippets()


def test_there_is_one_for_every_library():
    assert [heading for heading, _ in SNIPPETS] == [
        *("Plain JAX", "Plain JAX", "Flax Linen", "Flax NNX", "Equinox", "Haiku")
    ]
    for heading, code in SNIPPETS:
        assert sum(map(bool, code.splitlines())) <= 21, heading


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning:haiku")
def test_snippet_trains_and_quantizes(number):
    heading, code = SNIPPETS[number]
    for package in OPTIONAL:
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package)
    names = {}
    exec(compile(DATA + "\n" + code, f"{PAGE.name}, {heading}", "exec"), names)
    # The best constant has a loss of var(y), 0.5; most of it is explained at the end.
    assert float(names["loss"]) < 0.4 * float(names["y"].var())
    params = names["state"].params if heading == "Flax Linen" else names["params"]
    rounded = quant.dequantize(quant.quantize(params, bits=4))
    kernels = [x for x in jax.tree.leaves(rounded) if np.ndim(x) >= 2]
    assert len(kernels) == 2
    assert all(len(np.unique(x)) <= 16 for x in kernels)
