"""Symmetric label noise, as in the paper's Table 2."""

import numpy as np


def symmetric_noise(
    num_examples: int, num_classes: int, ratio: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw examples, and for each a label, uniform over all classes.

    A drawn example keeps its true label by chance once in `num_classes`. Returns
    indices of `round(ratio * num_examples)` examples, and their labels.
    """
    chosen = rng.permutation(num_examples)[: round(ratio * num_examples)]
    return chosen, rng.integers(num_classes, size=len(chosen))
