"""The integer program of mixed precision: a multiple-choice knapsack, with pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

COSTS_UP_TO = 1e6
"""The solver is exact to about 1e-6: costs are scaled to make that small."""

TIME_LIMIT_REACHED = 1
"""Status of `scipy.optimize.milp`."""


class Solution(NamedTuple):
    """A choice of one column for every row.

    Attributes:
      chosen: `[rows]`.
      cost: total.
      gap: at most so much less is possible; zero where that is known to be nothing.
    """

    chosen: np.ndarray
    cost: float
    gap: float


def solve(
    cost: np.ndarray,
    size: np.ndarray,
    limit: int,
    pairs: np.ndarray | None,
    time_limit: float | None,
) -> Solution:
    """Choose one column of every row: the least total cost within a total size.

    With `x[i, b]` one where row i takes column b, and `y[i, b, j, c]` where j takes c,
    too, for pairs `i < j`: `sum_b x = 1`, `sum_c y = x[i, b]`, `sum_b y = x[j, c]`. The
    latter two let y be a continuous variable: where x is whole, so is y.

    Args:
      cost: `[rows, columns]`, finite.
      size: `[rows, columns]`, integers.
      limit: largest total size; some choice must be within it.
      pairs: symmetric `[rows, columns, rows, columns]`, added once for every pair of
        different rows; or None.
      time_limit: seconds, or None.

    Returns:
      The best choice; with a time limit, the best that was found by then.

    Raises:
      TimeoutError: the time limit was reached before any choice was found.
    """
    from scipy import optimize

    rows, columns = cost.shape
    objective, unit_cost = _scaled(cost, pairs)
    constraints = _constraints(rows, columns, pairs is not None)
    integrality = np.zeros(objective.size)
    integrality[: cost.size] = 1
    weight = np.zeros((1, objective.size))
    unit = np.gcd.reduce(size.ravel()) or 1
    weight[0, : cost.size] = size.ravel() / unit
    constraints.append(optimize.LinearConstraint(weight, ub=limit // unit))
    options: dict[str, Any] = {"mip_rel_gap": 0.0}
    if time_limit is not None:
        options["time_limit"] = float(time_limit)
    while True:
        result = optimize.milp(
            objective,
            integrality=integrality,
            bounds=optimize.Bounds(0.0, 1.0),
            constraints=constraints,
            options=options,
        )
        if result.x is None and result.status == TIME_LIMIT_REACHED:
            raise TimeoutError(
                f"no allocation was found within time_limit={time_limit} seconds. "
                "Without interactions the program is a small one."
            )
        if result.x is None:
            raise RuntimeError(f"scipy.optimize.milp failed: {result.message}")
        chosen = result.x[: cost.size].reshape(cost.shape).argmax(1)
        if size[np.arange(rows), chosen].sum() <= limit:
            total = total_cost(cost, pairs, chosen)
            gap = 0.0
            if result.status == TIME_LIMIT_REACHED:
                gap = max(0.0, (result.fun - result.mip_dual_bound) * unit_cost)
            return Solution(chosen, total, gap)
        # Over the limit by less than the solver can see: all but this one.
        taken = np.zeros((1, objective.size))
        taken[0, np.arange(rows) * columns + chosen] = 1.0
        constraints.append(optimize.LinearConstraint(taken, ub=rows - 1.0))


def total_cost(cost: np.ndarray, pairs: np.ndarray | None, chosen: np.ndarray) -> float:
    """Return the objective of a choice of one column per row."""
    rows = np.arange(len(cost))
    total = cost[rows, chosen].sum()
    if pairs is not None:
        between = pairs[rows[:, None], chosen[:, None], rows, chosen]
        total += np.triu(between, 1).sum()
    return float(total)


def _scaled(cost: np.ndarray, pairs: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Return the coefficients of x, and of y if there are pairs; and what one costs."""
    shifted = cost - cost.min(1, keepdims=True)  # one per row is taken in any case
    parts = [shifted.ravel()]
    if pairs is not None:
        upper = np.triu_indices(len(cost), 1)
        parts.append(pairs.transpose(0, 2, 1, 3)[upper].ravel())
    objective = np.concatenate(parts)
    largest = np.abs(objective).max()
    unit_cost = largest / COSTS_UP_TO if largest > 0.0 else 1.0
    return objective / unit_cost, unit_cost


def _constraints(rows: int, columns: int, with_pairs: bool) -> list[Any]:
    """Return the equations between the variables."""
    from scipy import optimize, sparse

    one, each = np.ones((1, columns)), sparse.identity(columns)
    take_one = sparse.kron(sparse.identity(rows), one)
    if not with_pairs:
        return [optimize.LinearConstraint(take_one, 1.0, 1.0)]
    first, second = np.triu_indices(rows, 1)
    num_pairs = len(first)

    def of_row(row: np.ndarray) -> Any:
        """For every pair, pick the variables x of one of its rows."""
        picks = sparse.csr_matrix(
            (np.ones(num_pairs), (np.arange(num_pairs), row)), (num_pairs, rows)
        )
        return sparse.kron(picks, each)

    every_pair = sparse.identity(num_pairs)
    marginals = sparse.bmat(
        [
            [-of_row(first), sparse.kron(every_pair, sparse.kron(each, one))],
            [-of_row(second), sparse.kron(every_pair, sparse.kron(one, each))],
        ]
    )
    take_one = sparse.hstack(
        [take_one, sparse.csr_matrix((rows, num_pairs * columns**2))]
    )
    return [
        optimize.LinearConstraint(take_one, 1.0, 1.0),
        optimize.LinearConstraint(marginals, 0.0, 0.0),
    ]
