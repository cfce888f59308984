"""Choose the settings of the quick start: the same number of trials for each method.

Every setting is trained on 750 of the 1,000 training images, from seeds that the quick
start does not report, and judged on the other 250 with their true labels: by the mean
of the accuracies with weights of 32, 8, 6, 5, 4 and 3 bits. The test images are not
used. The paper's recipe (learning rate 0.1, weight decay 1e-4) is kept but for SGD,
which has nothing else to tune.

    python -m examples.experiments.quickstart_search --out examples/results  # 6 minutes, 2 cores

It prints the winners and writes all trials as JSON; a test holds METHODS against it.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import hero_jax
from examples.experiments.common import digits as quickstart
from examples.experiments.common.digits import BITS, METHODS, Method
from examples.experiments.common.statistics import summary
from examples.image_classification.results import environment, write_json

SEEDS = (100, 101, 102)
VALIDATION_SIZE = 250

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
        Method(hero_jax.hero_value_and_grad, {"h": h, "gamma": 0.0})
        for h in (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0)
    ],
    "HERO": [
        Method(hero_jax.hero_value_and_grad, {"h": h, "gamma": gamma})
        for h, gamma in itertools.product((2.0, 5.0, 10.0, 15.0), (0.1, 0.5, 1.0))
    ],
}


def try_one(
    method: Method,
    datasets: Sequence[quickstart.Data],
    epochs: int,
    progress: tqdm,
    make_program: Callable[..., quickstart.Program] = quickstart.make_program,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Train one setting from every seed; return its accuracies."""
    steps = len(datasets[0].train_labels) // quickstart.BATCH_SIZE
    program = make_program(method, epochs * steps)
    accuracies = []
    for seed, data in zip(seeds, datasets, strict=True):
        try:
            state = quickstart.train(program, data, epochs, seed, progress)
        except FloatingPointError:
            accuracies.append([0.0] * len(BITS))
            continue
        accuracies.append(
            [100 * float(quickstart.evaluate(state, data, bits)) for bits in BITS]
        )
    return {
        "settings": method.settings,
        "learning_rate": method.learning_rate,
        "weight_decay": method.weight_decay,
        "accuracy": dict(zip(BITS, np.mean(accuracies, 0).tolist(), strict=True)),
        "score": summary(np.mean(accuracies, 1).tolist()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Search, print the best settings and those in use, write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label-noise", type=float, default=0.4)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("quickstart_results"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    datasets = [
        quickstart.load_data(options.label_noise, seed, VALIDATION_SIZE)
        for seed in SEEDS
    ]
    trials: dict[str, list[dict[str, Any]]] = {}
    images = len(datasets[0].train_labels) // quickstart.BATCH_SIZE
    images *= quickstart.BATCH_SIZE * options.epochs * len(SEEDS)
    for name, methods in TRIALS.items():
        with tqdm(
            total=images * len(methods), desc=name, unit="images", unit_scale=True
        ) as progress:
            trials[name] = [
                try_one(method, datasets, options.epochs, progress)
                for method in methods
            ]

    for name, results in trials.items():
        best = max(results, key=lambda trial: trial["score"]["mean"])
        used = METHODS[name]
        print(
            f"{name}: {best['score']['mean']:.1f} % by {best['settings']}, "
            f"learning rate {best['learning_rate']}, weight decay "
            f"{best['weight_decay']}; the quick start uses {used.settings}, "
            f"{used.learning_rate}, {used.weight_decay}."
        )
    record = {
        "environment": environment(),
        "label_noise": options.label_noise,
        "epochs": options.epochs,
        "seeds": SEEDS,
        "validation_size": VALIDATION_SIZE,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "trials": trials,
    }
    write_json(options.out / "quickstart_search.json", record)
    return record


if __name__ == "__main__":
    main()
