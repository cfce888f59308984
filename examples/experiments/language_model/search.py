"""Settings by trials on the validation text: as many for each method."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .training import Direction, Settings, Task

SEED = 100

RATES = {
    "SGD": (0.1, 0.3, 1.0, 3.0),
    "AdamW": (0.003, 0.01, 0.02, 0.04),
    "Lion": (0.0003, 0.001, 0.003, 0.01),
    "LAMB": (0.003, 0.01, 0.03, 0.1),
    "Muon": (0.01, 0.02, 0.04, 0.08),
}
"""Learning rates, tried with the plain gradient without weight decay."""
DIRECTIONS = {
    "layerwise": (0.1, 0.3, 1.0),
    "adaptive": (0.03, 0.1, 0.3),
    "normalized": (0.01, 0.03, 0.1),
}
"""Values of h, tried by the first-order part with AdamW."""
SHRINKAGES = (0.1, 0.3, 1.0, 3.0)
"""By what weight decay alone would lower the logarithm of the weights in the end."""
LENGTHS = {
    "layerwise": (0.03, 0.1, 0.3, 1.0),
    "adaptive": (0.01, 0.03, 0.1, 0.3),
    "normalized": (0.003, 0.01, 0.03, 0.1),
}
"""Values of h for the first-order part; the middle ones are HERO's, with each gamma."""
GAMMAS = (0.01, 0.1)

Trials = list[dict[str, Any]]


def search(task: Task, optimizers: Sequence[str]) -> dict[str, Any]:
    """Try all settings, and return every trial.

    First come AdamW's learning rates, by the best of which it decides about the
    direction of the perturbation. Then each optimizer decides about its learning rate,
    with that about its weight decay, and with these about h and gamma.
    """

    def attempt(
        optimizer: str, method: str, direction: str, settings: Sequence[Settings]
    ) -> Trials:
        cases = [(chosen, SEED) for chosen in settings]
        results = task.attempts(optimizer, method, Direction(direction), cases)
        return [
            {
                "settings": chosen._asdict(),
                "bits_per_character": bits,
                "score": None if bits is None else score(bits),
            }
            for chosen, bits in zip(settings, results, strict=True)
        ]

    def rates(optimizer: str) -> Trials:
        settings = [Settings(rate) for rate in RATES[optimizer]]
        return attempt(optimizer, "plain", "layerwise", settings)

    tried = {"AdamW": rates("AdamW")}
    rate = best(tried["AdamW"]).learning_rate
    directions = {
        direction: attempt(
            "AdamW", "first-order", direction, [Settings(rate, h=h) for h in lengths]
        )
        for direction, lengths in DIRECTIONS.items()
    }
    perturbation = min(directions, key=lambda name: least(directions[name]))
    trials: dict[str, dict[str, Trials]] = {}
    for optimizer in optimizers:
        if optimizer != "AdamW":
            tried[optimizer] = rates(optimizer)
        rate = best(tried[optimizer]).learning_rate
        total = float(rate) * task.num_steps / 2  # of a cosine
        decays = [Settings(rate, float(f"{x / total:.2g}")) for x in SHRINKAGES]
        plain = attempt(optimizer, "plain", perturbation, decays)
        base, h = best([*tried[optimizer], *plain]), LENGTHS[perturbation]
        grids = {
            "first-order": [base._replace(h=x) for x in h],
            "HERO": [base._replace(h=x, gamma=y) for x in h[1:3] for y in GAMMAS],
        }
        trials[optimizer] = {"plain": plain} | {
            method: attempt(optimizer, method, perturbation, grid)
            for method, grid in grids.items()
        }
    return {
        "rates": tried,
        "directions": directions,
        "perturbation": perturbation,
        "trials": trials,
    }


def score(bits_per_character: dict[str, float]) -> float:
    """Return the mean over the precisions but 8 bits, which is next to float."""
    return float(np.mean([x for k, x in bits_per_character.items() if k[0] != "8"]))


def least(trials: Trials) -> float:
    """Return the best score; infinity where none is finite."""
    return min((t["score"] for t in trials if t["score"] is not None), default=np.inf)


def best(trials: Trials) -> Settings:
    """Return the settings of the best score.

    Raises:
      FloatingPointError: no trial has a finite loss.
    """
    finite = [trial for trial in trials if trial["score"] is not None]
    if not finite:
        raise FloatingPointError(f"none of {len(trials)} trials has a finite loss.")
    return Settings(**min(finite, key=lambda trial: trial["score"])["settings"])


def winner(record: dict[str, Any], optimizer: str, method: str) -> Settings:
    """Return the best settings of a method; plain may go without weight decay."""
    trials = record["trials"][optimizer][method]
    if method == "plain":
        trials = [*record["rates"][optimizer], *trials]
    return best(trials)
