"""The README's table: the networks of `examples/quickstart.py`, measured further.

Adds ||Hz|| at the end of training, and the time of a step by turns on one batch.

    python -m examples.experiments.digits --out examples/results   # 92 s on 2 cores
    python -m examples.experiments.digits --search --out examples/results   # 6 minutes

The search tries 12 settings of each method on 750 of the 1,000 training images, from
seeds that are not reported, and judges them on the other 250 with their true labels: by
the mean of the accuracies with weights of 32, 8, 6, 5, 4 and 3 bits. The test images
are not used. The paper's recipe (learning rate 0.1, weight decay 1e-4) is kept but for
SGD, which has nothing else to tune. A test holds METHODS against its winners.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

import hero_jax
from examples.experiments.common import comparison
from examples.experiments.common.digits import (
    BITS,
    METHODS,
    Method,
    hero_value_and_grad,
)

SEARCH_SEEDS = (100, 101, 102)

TRIALS: dict[str, list[Method]] = {
    "SGD, tuned": [
        Method(jax.value_and_grad, learning_rate=rate, weight_decay=decay)
        for rate, decay in itertools.product((0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2, 3e-2))
    ],
    "GRAD-L1": [
        Method(hero_jax.family.grad_l1_value_and_grad, {"strength": strength})
        for strength in (
            *(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3),
            *(5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
        )
    ],
    "first-order": [
        Method(hero_value_and_grad, {"h": h, "gamma": 0.0})
        for h in (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0)
    ],
    "HERO": [
        Method(hero_value_and_grad, {"h": h, "gamma": gamma})
        for h, gamma in itertools.product((2.0, 5.0, 10.0, 15.0), (0.1, 0.5, 1.0))
    ],
}


def plot(results: comparison.Results) -> Figure:
    """Draw accuracy against bits, one line per method."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    ended = {
        name: [result["accuracy"][str(bits)] for bits in BITS]
        for name, result in results.items()
        if "accuracy" in result
    }
    comparison.plot_against_bits(axes, ended, BITS)
    axes.set(xlabel="bits per weight", ylabel="test accuracy (%)")
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, or search; write the files and return the record."""
    start = time.perf_counter()
    options = comparison.parse(arguments, __doc__, METHODS, TRIALS, "digits_results")
    if options.search:
        return comparison.search(
            options, "quickstart_search", METHODS, TRIALS, SEARCH_SEEDS
        )
    results = comparison.compare(options, METHODS)
    text = comparison.table(results, exact=True)
    return comparison.report(options, "quickstart", results, text, plot(results), start)


if __name__ == "__main__":
    main()
