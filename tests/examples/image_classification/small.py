"""A small network, and the command of the recipe that trains it in place of another."""

import contextlib
import sys

import flax.linen as nn
import jax.numpy as jnp

USERS = (
    "examples.image_classification.loop",
    "examples.experiments.sweep.many_runs",
    "examples.experiments.reproduction.surface",
    "examples.experiments.reproduction.work",
)
"""Modules that make a network of the recipe, if they are imported."""


class Small(nn.Module):
    """Smooth, so that only the order of sums can differ; float64 where there is."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        dtype = jnp.result_type(float)
        norm = nn.BatchNorm(
            not train, axis_name=self.axis_name, dtype=dtype, param_dtype=dtype
        )
        x = x.reshape(len(x), -1).astype(dtype)
        x = norm(nn.Dense(7, param_dtype=dtype)(x))
        return nn.Dense(10, param_dtype=dtype)(jnp.tanh(x))


def make_model(_, pipeline, synchronized):
    """Stand in for :func:`examples.image_classification.train.make_model`."""
    return Small(pipeline.devices.axis_name if synchronized else None)


@contextlib.contextmanager
def in_place():
    """Let every example make the small network."""
    users = [sys.modules[name] for name in USERS if name in sys.modules]
    before = [user.make_model for user in users]
    for user in users:
        user.make_model = make_model
    try:
        yield
    finally:
        for user, maker in zip(users, before, strict=True):
            user.make_model = maker


if __name__ == "__main__":
    from examples.image_classification import __main__, loop

    loop.make_model = make_model
    sys.exit(__main__.main())
