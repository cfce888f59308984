"""Settings by trials on the validation text: as many for each method."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from .corpus import Corpus
from .model import Transformer, make_loss
from .training import METHODS, Evaluation, Settings, make_program, train

SEED = 100
PRECISIONS: dict[str, dict[str, Any]] = {
    "float": {},
    "8 bit, channel": {"bits": 8, "axis": -1},
    "4 bit, channel": {"bits": 4, "axis": -1},
    "3 bit, channel": {"bits": 3, "axis": -1},
    "4 bit, tensor": {"bits": 4},
    "3 bit, tensor": {"bits": 3},
}
"""The columns of the table, as arguments of an evaluation."""

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
"""Values of h, tried by first-order-only with AdamW."""
SHRINKAGES = (0.1, 0.3, 1.0, 3.0)
"""By what weight decay alone would lower the logarithm of the weights in the end."""
LENGTHS = {
    "layerwise": (0.03, 0.1, 0.3, 1.0),
    "adaptive": (0.01, 0.03, 0.1, 0.3),
    "normalized": (0.003, 0.01, 0.03, 0.1),
}
"""Values of h for first-order-only; the middle ones are HERO's, with each gamma."""
GAMMAS = (0.01, 0.1)


def decays(rate: float, num_steps: int) -> list[Settings]:
    """Return the weight decays to try with the plain gradient."""
    total = rate * num_steps / 2  # of a cosine
    return [Settings(rate, float(f"{x / total:.2g}")) for x in SHRINKAGES]


def lengths(method: str, base: Settings, perturbation: str) -> list[Settings]:
    """Return what to try of HERO with the rate and decay of the plain gradient."""
    values = LENGTHS[perturbation]
    if method == "first-order":
        return [base._replace(h=h) for h in values]
    return [base._replace(h=h, gamma=gamma) for h in values[1:3] for gamma in GAMMAS]


def score(bits_per_character: dict[str, float]) -> float:
    """Return the mean over the precisions but 8 bits, which is next to float."""
    return float(np.mean([x for k, x in bits_per_character.items() if k[0] != "8"]))


def search(
    corpus: Corpus,
    model: Transformer,
    optimizers: Sequence[str],
    num_steps: int,
    batch_size: int,
    quiet: bool,
    write: Callable[[dict[str, Any]], None],
    known: dict[str, Any],
) -> dict[str, Any]:
    """Try all settings; return every trial, and write them after each optimizer.

    First come AdamW's learning rates, by the best of which it decides about the
    direction of the perturbation. Then each optimizer decides about its learning rate,
    with that about its weight decay, and with these about h and gamma.

    Args:
      corpus: to train on and to judge by.
      model: what is trained.
      optimizers: names.
      num_steps: of every trial.
      batch_size: windows of text in a step.
      quiet: show no progress bars.
      write: what to do with the trials so far.
      known: what an earlier search wrote before it was stopped; empty if none was.
    """
    loss_fn = make_loss(model)
    evaluation = Evaluation(model, corpus.validation)

    def attempt(
        optimizer: str, method: str, perturbation: str, settings: Sequence[Settings]
    ) -> list[dict[str, Any]]:
        program = make_program(loss_fn, optimizer, method, num_steps, perturbation)
        trials = []
        with tqdm(
            total=len(settings) * num_steps * batch_size * model.context,
            desc=f"{optimizer} {method}",
            unit="char",
            unit_scale=True,
            disable=quiet,
        ) as progress:
            run = functools.partial(
                train,
                program,
                model,
                corpus.train,
                num_steps=num_steps,
                batch_size=batch_size,
                seed=SEED,
                progress=progress,
            )
            for chosen in settings:
                trial: dict[str, Any] = {"settings": chosen._asdict()}
                try:
                    params = run(chosen)
                except FloatingPointError:
                    trial |= {"bits_per_character": None, "score": None}
                else:
                    found = {k: evaluation(params, **v) for k, v in PRECISIONS.items()}
                    trial |= {"bits_per_character": found, "score": score(found)}
                trials.append(trial)
        return trials

    def rates(optimizer: str) -> list[dict[str, Any]]:
        settings = [Settings(rate) for rate in RATES[optimizer]]
        return attempt(optimizer, "plain", "layerwise", settings)

    record = dict(known)
    if not record:
        record["rates"] = {"AdamW": rates("AdamW")}
        rate = float(best(record["rates"]["AdamW"]).learning_rate)
        record["directions"] = found = {
            direction: attempt(
                "AdamW", "first-order", direction, [Settings(rate, h=h) for h in values]
            )
            for direction, values in DIRECTIONS.items()
        }
        record["perturbation"] = min(found, key=lambda name: least(found[name]))
        record["trials"] = {}
    perturbation = record["perturbation"]
    for optimizer in optimizers:
        if optimizer in record["trials"]:
            continue  # known
        if optimizer != "AdamW":
            record["rates"][optimizer] = rates(optimizer)
        rate = float(best(record["rates"][optimizer]).learning_rate)
        trials = attempt(optimizer, "plain", perturbation, decays(rate, num_steps))
        base = best([*record["rates"][optimizer], *trials])
        record["trials"][optimizer] = {"plain": trials} | {
            method: attempt(
                optimizer, method, perturbation, lengths(method, base, perturbation)
            )
            for method in METHODS[1:]
        }
        write(record)
    write(record)
    return record


def least(trials: Sequence[dict[str, Any]]) -> float:
    """Return the best score; infinity where none is finite."""
    return min((t["score"] for t in trials if t["score"] is not None), default=np.inf)


def best(trials: Sequence[dict[str, Any]]) -> Settings:
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
