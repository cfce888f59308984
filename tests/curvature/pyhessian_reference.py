"""Make the numbers that `test_pyhessian.py` compares with.

    pip install numpy torch==2.13.0 pyhessian==0.1
    python tests/curvature/pyhessian_reference.py

PyHessian takes the eigenvalue of largest magnitude by power iteration, and the trace by
Hutchinson's estimator, on a small convolutional network in double precision; with a
data loader of 24, 24 and 16 images. Weights and batch are drawn by numpy, here and in
the test alike.
"""

import json
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).with_suffix(".json")
PROBES = 4000
BATCH_SIZE = 24


def draw():
    """Return weights in the layout of JAX, images `[64, 8, 8, 1]` and labels `[64]`."""
    rng = np.random.default_rng(0)
    weights = {
        "conv1": 0.5 * rng.normal(size=(3, 3, 1, 4)),
        "bias1": 0.1 * rng.normal(size=4),
        "conv2": 0.3 * rng.normal(size=(3, 3, 4, 6)),
        "bias2": 0.1 * rng.normal(size=6),
        "dense": 0.5 * rng.normal(size=(6, 10)),
        "bias3": 0.1 * rng.normal(size=10),
    }
    return weights, rng.normal(size=(64, 8, 8, 1)), rng.integers(0, 10, size=64)


def main():
    """Run PyHessian and write its numbers."""
    import pyhessian
    import torch

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    weights, images, labels = draw()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 10),
    )
    with torch.no_grad():
        for parameter, w in zip(model.parameters(), weights.values(), strict=True):
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[w.ndim]
            parameter.copy_(torch.tensor(w.transpose(order)))
    x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    y = torch.tensor(labels)
    starts = range(0, len(y), BATCH_SIZE)
    loader = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE]) for i in starts]
    criterion = torch.nn.CrossEntropyLoss()
    record = {"torch": torch.__version__, "pyhessian": "0.1", "probes": PROBES}
    for name, data in (("batch", {"data": (x, y)}), ("loader", {"dataloader": loader})):
        hessian = pyhessian.hessian(model, criterion, **data, cuda=False)
        values, _ = hessian.eigenvalues(maxIter=5000, tol=1e-12, top_n=2)
        record[name] = {"eigenvalues": values}
        model.zero_grad()
    hessian = pyhessian.hessian(model, criterion, data=(x, y), cuda=False)
    samples = hessian.trace(maxIter=PROBES, tol=0.0)
    record["trace"] = float(np.mean(samples))
    record["trace_stderr"] = float(np.std(samples, ddof=1) / len(samples) ** 0.5)
    REFERENCE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
