"""Mixed precision against exhaustive search, and against the bytes of files."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from hero_jax import mixed_precision, quant

CHOICES = (2, 3, 4, 8)


def problem(seed, layers=5, choices=CHOICES, widths=(1, 40)):
    """Sensitivities over eight decades, some negative; sizes that do not divide."""
    rng = np.random.default_rng(seed)
    names = [f"layer_{i}/kernel" for i in range(layers)]
    scale = 10.0 ** rng.uniform(-8.0, 0.0, layers)
    rows = {
        name: s * (4.0 ** -np.array(choices) + rng.normal(0.0, 0.02, len(choices)))
        for name, s in zip(names, scale, strict=True)
    }
    sizes = {name: int(rng.integers(*widths)) for name in names}
    return rows, sizes


def interactions(seed, layers=5, choices=CHOICES):
    rng = np.random.default_rng(seed)
    n = layers * len(choices)
    matrix = rng.normal(size=(n, n)) * 0.01
    return (matrix + matrix.T).reshape(layers, len(choices), layers, len(choices))


def exhaustive(rows, sizes, limit, unit, choices=CHOICES, pairs=None):
    """Try every assignment: the least total and those that fit, by plain loops."""
    best = (np.inf, None)
    names = list(rows)
    for columns in itertools.product(range(len(choices)), repeat=len(names)):
        size = 0
        for name, c in zip(names, columns, strict=True):
            bits = choices[c]
            n = sizes[name]
            size += -(-n * bits // 8) if unit == "bytes" else n * bits
        total = sum(rows[name][c] for name, c in zip(names, columns, strict=True))
        if pairs is not None:
            for (i, b), (j, c) in itertools.combinations(enumerate(columns), 2):
                total += pairs[i, b, j, c]
        if size <= limit and total < best[0]:
            best = (total, columns)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", ["average_bits", "bytes"])
def test_the_program_finds_what_exhaustive_search_finds(seed, unit):
    rows, sizes = problem(seed)
    for average in (2.3, 3.5, 5.0):
        weights = sum(sizes.values())
        budget = average if unit == "average_bits" else int(average * weights / 8)
        limit = budget * weights if unit == "average_bits" else budget
        total, columns = exhaustive(rows, sizes, limit, unit)
        found = mixed_precision.allocate_bits(rows, sizes, budget, CHOICES, unit=unit)
        assert tuple(found.bits.values()) == tuple(CHOICES[c] for c in columns)
        np.testing.assert_allclose(found.sensitivity, total, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_interactions_change_the_optimum_as_exhaustive_search_says(seed):
    rows, sizes = problem(seed, layers=4)
    pairs = interactions(seed, layers=4)
    limit = 4.0 * sum(sizes.values())
    total, columns = exhaustive(rows, sizes, limit, "average_bits", pairs=pairs)
    alone, _ = exhaustive(rows, sizes, limit, "average_bits")
    found = mixed_precision.allocate_bits(rows, sizes, 4.0, CHOICES, interactions=pairs)
    assert tuple(found.bits.values()) == tuple(CHOICES[c] for c in columns)
    np.testing.assert_allclose(found.sensitivity, total, rtol=1e-10)
    assert total != alone


@pytest.mark.parametrize("unit", ["average_bits", "bytes"])
def test_the_frontier_is_the_optimum_of_every_budget(unit):
    rows, sizes = problem(7, layers=4)
    frontier = mixed_precision.pareto_frontier(rows, sizes, CHOICES, unit=unit)
    weights = sum(sizes.values())
    ours = frontier.bytes if unit == "bytes" else frontier.average_bits * weights
    assert np.all(np.diff(ours) > 0)
    assert np.all(np.diff(frontier.sensitivity) < 0)
    for budget in range(int(ours[0]), int(ours[-1]) + 2):
        total, _ = exhaustive(rows, sizes, budget, unit)
        best = frontier[np.searchsorted(ours, budget + 0.5) - 1]
        np.testing.assert_allclose(best.sensitivity, total, rtol=1e-12)
        if unit == "bytes":
            assert frontier.within(budget, unit=unit) == best
    with pytest.raises(ValueError, match=r"budget must be at least \d+, got 1"):
        frontier.within(1, unit="bytes")


def test_frontier_and_program_agree_on_a_network_too_large_to_search():
    """Two algorithms, at the sizes and spread of ResNet20."""
    choices = tuple(range(2, 9))
    rows, sizes = problem(3, layers=22, choices=choices, widths=(400, 37_000))
    frontier = mixed_precision.pareto_frontier(rows, sizes, choices, unit="bytes")
    for budget in np.linspace(frontier.bytes[0], frontier.bytes[-1], 12).astype(int):
        found = mixed_precision.allocate_bits(
            rows, sizes, budget, choices, unit="bytes"
        )
        best = frontier[np.searchsorted(frontier.bytes, budget, side="right") - 1]
        np.testing.assert_allclose(found.sensitivity, best.sensitivity, rtol=1e-9)
        assert found.bytes <= budget


def test_a_budget_one_weight_short_is_not_overdrawn():
    """The solver tolerates 1e-6 of a row; a weight among 2e7 is less than that."""
    sizes = {"large": 20_000_003, "small": 1}
    rows = {"large": [1.0, 0.0], "small": [1e-3, 0.0]}
    exact = 4 * sizes["large"] + 2
    frontier = mixed_precision.pareto_frontier(rows, sizes, (2, 4), unit="average_bits")
    weights = sum(sizes.values())
    assert [round(a.average_bits * weights) for a in frontier] == [
        2 * weights,
        2 * weights + 2,
        exact,
        4 * weights,
    ]
    whole = mixed_precision.allocate_bits(rows, sizes, 4, (2, 4))
    assert whole.bits == {"large": 4, "small": 4}
    large = {2: 10**9 + 7, 4: 2 * 10**9 + 9}
    sizes = {"large": mixed_precision.LayerSize(1, large), "small": 10**3}
    found = mixed_precision.allocate_bits(
        rows, sizes, large[4] + 499, (2, 4), unit="bytes"
    )
    assert found.bits == {"large": 4, "small": 2}
    assert found.bytes == large[4] + 250


def test_what_a_lenient_solver_overdraws_is_excluded(monkeypatch):
    """As if the solver's tolerance were a whole unit of the budget."""
    strict = optimize.milp

    def lenient(*args, constraints, **kwargs):
        looser = [
            optimize.LinearConstraint(c.A, c.lb, c.ub + 1)
            if np.shape(c.A)[0] == 1 and np.max(c.A) > 1
            else c
            for c in constraints
        ]
        return strict(*args, constraints=looser, **kwargs)

    monkeypatch.setattr(optimize, "milp", lenient)
    rows = {"a": [3.0, 2.0, 0.0], "b": [2.0, 1.0, 0.5], "c": [1.0, 0.9, 0.2]}
    sizes = {name: mixed_precision.LayerSize(1, {2: 3, 3: 5, 4: 8}) for name in rows}
    for budget in range(9, 25):
        found = mixed_precision.allocate_bits(
            rows, sizes, budget, (2, 3, 4), unit="bytes"
        )
        best = min(
            sum(rows[n][c] for n, c in zip(rows, columns, strict=True))
            for columns in itertools.product(range(3), repeat=3)
            if sum((3, 5, 8)[c] for c in columns) <= budget
        )
        assert found.sensitivity == pytest.approx(best)
        assert found.bytes <= budget


@pytest.mark.parametrize("order", [(2, 4, 8), (8, 2, 4)])
def test_choices_in_any_order(order):
    """Rows, columns and pairs are in the order of the choices that were given."""
    rows, sizes = problem(2, layers=3, choices=(2, 4, 8))
    pairs = interactions(2, layers=3, choices=(2, 4, 8)) * 1e-3
    column = [(2, 4, 8).index(bits) for bits in order]
    found = mixed_precision.allocate_bits(
        {path: row[column] for path, row in rows.items()},
        sizes,
        4.0,
        order,
        interactions=pairs[:, column][..., column],
    )
    limit = 4.0 * sum(sizes.values())
    total, columns = exhaustive(
        rows, sizes, limit, "average_bits", choices=(2, 4, 8), pairs=pairs
    )
    assert tuple(found.bits.values()) == tuple((2, 4, 8)[c] for c in columns)
    assert found.sensitivity == pytest.approx(total, rel=1e-9)


def test_a_decimal_budget_is_exactly_met():
    rows = {"a": [0.0, 5.0], "b": [0.0, 1.0]}
    found = mixed_precision.allocate_bits(rows, {"a": 7, "b": 3}, 3.4, (4, 2))
    assert found.bits == {"a": 4, "b": 2}
    assert found.average_bits == pytest.approx(3.4)


def test_paths_that_look_like_patterns_mean_themselves():
    """What an allocation says reaches the leaf it speaks of."""
    w = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
    for names in (("a*", "ab"), ("l[0]", "l0"), ("a", "a/c")):
        params = {"m": dict.fromkeys(names, w)}
        first, second = mixed_precision.layer_sizes(params)
        small = quant.quantize(params, {first: 2, second: 8})
        assert [small["m"][name].bits for name in sorted(names)] == [2, 8]
    params = {"m": {"a": {"b": w}, "a/b": w}}
    first, second = mixed_precision.layer_sizes(params)
    small = quant.quantize(params, {first: 2, second: 8})
    assert (small["m"]["a"]["b"].bits, small["m"]["a/b"].bits) == (2, 8)


def test_a_frontier_says_how_long_it_is():
    frontier = mixed_precision.pareto_frontier({"a": [1.0, 0.0]}, {"a": 8}, (2, 4))
    assert repr(frontier) == "<Frontier of 2 allocations, 2 to 4 bytes>"
    assert frontier[:1] == [frontier[0]]


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 3, 10))},
        "dense": {"kernel": jax.random.normal(keys[1], (13, 7)), "bias": jnp.ones(7)},
        "half": jax.random.normal(keys[2], (5, 5), jnp.bfloat16),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "symmetric"},
        {"axis": -1, "group_size": 4, "calibration": "mse"},
        {"axis": (-2, -1), "group_size": (2, 3)},
    ],
    ids=str,
)
def test_sizes_are_the_bytes_of_the_file(tmp_path, options):
    """Also with groups of channels, as in Q-BERT: all but the header is foreseen."""
    params = network()
    choices = (2, 5, 8)
    sizes = mixed_precision.layer_sizes(params, choices, **options)
    rows = {path: np.array([1.0, 0.1, 0.0]) * (i + 1) for i, path in enumerate(sizes)}
    total = sum(size.bytes[5] for size in sizes.values()) + 12
    found = mixed_precision.allocate_bits(rows, sizes, total, choices, unit="bytes")
    assert len({*found.bits.values()}) > 1
    quantized = quant.quantize(params, found.bits, **options)
    path = tmp_path / "mixed.safetensors"
    quant.save(path, quantized)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    bias = params["dense"]["bias"].nbytes
    assert found.bytes <= total
    assert len(data) == header + bias + found.bytes == quant.file_size(quantized)
    loaded = quant.load(path)
    assert loaded["conv"]["kernel"].bits == found.bits["conv/kernel"]
    assert loaded["half"].bits == found.bits["half"]


def test_sizes_need_shapes_only_and_heed_the_mask():
    params = network()
    shapes = jax.eval_shape(lambda: params)
    assert mixed_precision.layer_sizes(shapes) == mixed_precision.layer_sizes(params)
    mask = {"conv": True, "dense": {"kernel": False, "bias": True}, "half": False}
    assert [*mixed_precision.layer_sizes(params, mask=mask)] == [
        "conv/kernel",
        "dense/bias",
    ]
    partly = {**params, "half": quant.quantize(params["half"], 4)}
    assert [*mixed_precision.layer_sizes(partly)] == ["conv/kernel", "dense/kernel"]


ROWS, SIZES = {"a": [1.0, 0.0], "b": [2.0, 0.0]}, {"a": 10, "b": 10}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 1.9}, ValueError, r"budget must be at least 2 .*Got 1.9"),
        ({"budget": -1}, ValueError, r"budget must be finite and >= 0, got -1"),
        ({"budget": "3"}, TypeError, r"budget must be a real number"),
        (
            {"budget": 4, "unit": "bytes"},
            ValueError,
            r"at least 6 with choices \[2, 4\], unit='bytes'",
        ),
        ({"unit": "bits"}, ValueError, r"unit must be one of"),
        ({"choices": (2, 9)}, ValueError, r"bits must be .*got 9"),
        ({"choices": (2, 2)}, ValueError, r"choices must be .* different numbers"),
        ({"choices": {2, 4}}, ValueError, r"choices must be a sequence .*got set"),
        (
            {"choices": (2, 3, 4)},
            ValueError,
            r"each of the 3 choices.*\[1.0, 0.0\] at 'a'",
        ),
        ({"sizes": {"a": 10}}, ValueError, r"same layers: \['b'\]"),
        ({"sizes": {"a": 10, "b": 0}}, ValueError, r"integer >= 1, got 0 \(at 'b'\)"),
        ({"sizes": {"a": 1, "b": 1.5}}, TypeError, r"got 1.5 \(at 'b'\)"),
        (
            {"sizes": {"a": mixed_precision.LayerSize(1, {2: 1}), "b": 1}},
            ValueError,
            r"must know \[4\] bits.*'a'",
        ),
        (
            {"sensitivity": {"a": [1.0, 0.0], "b": [np.nan, 0.0]}},
            ValueError,
            r"sensitivity must have a finite .*nan.* at 'b'",
        ),
        ({"interactions": np.zeros((2, 2))}, ValueError, r"= \(2, 2, 2, 2\), got \(2,"),
        (
            {"interactions": np.arange(16.0).reshape(2, 2, 2, 2)},
            ValueError,
            r"interactions must be .* symmetric",
        ),
        (
            {"interactions": np.full((2, 2, 2, 2), np.inf)},
            ValueError,
            r"interactions must be finite",
        ),
        ({"time_limit": 0}, ValueError, r"time_limit must be finite and > 0"),
    ],
)
def test_misuse_is_named(change, error, message):
    arguments = {"sensitivity": ROWS, "sizes": SIZES, "budget": 3, "choices": (2, 4)}
    arguments |= change
    with pytest.raises(error, match=message):
        mixed_precision.allocate_bits(**arguments)


def test_a_time_limit_is_told():
    rows, sizes = problem(0, layers=14)
    pairs = interactions(0, layers=14)
    with pytest.raises(TimeoutError, match=r"time_limit=1e-06 seconds"):
        mixed_precision.allocate_bits(
            rows, sizes, 4.0, CHOICES, interactions=pairs, time_limit=1e-6
        )


def test_what_a_time_limit_leaves_is_within_the_gap(monkeypatch):
    """As if the solver stopped at its first solution, with a bound below the best."""
    rows, sizes = problem(1, layers=4)
    best = mixed_precision.allocate_bits(rows, sizes, 4.0, CHOICES)
    strict = optimize.milp

    def stopped(objective, **kwargs):
        least = strict(objective, **kwargs)
        first = strict(-objective, **kwargs)
        return optimize.OptimizeResult(
            x=first.x, status=1, fun=objective @ first.x, mip_dual_bound=least.fun - 1
        )

    monkeypatch.setattr(optimize, "milp", stopped)
    found = mixed_precision.allocate_bits(rows, sizes, 4.0, CHOICES, time_limit=1)
    assert found.sensitivity > best.sensitivity
    lower = found.sensitivity - found.gap
    assert lower < best.sensitivity
    # One unit of the solver's objective is a millionth of the largest cost.
    assert lower == pytest.approx(best.sensitivity, abs=1e-5 * best.sensitivity + 1e-5)
    assert best.gap == 0.0
