"""Measured sensitivities against quantizing and evaluating by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import mixed_precision, quant
from tests import problems

CHOICES = (2, 3, 5)


def loss_of(dense, bits):
    """Return the loss with some layers quantized and the others left as they are."""
    mask = jax.tree.map(lambda _: False, dense.params)
    for i in (0, 1):
        mask["hidden"][i]["kernel"] = f"hidden/{i}/kernel" in bits
    mask["out"]["kernel"] = "out/kernel" in bits
    moved = quant.fake_quantize(dense.params, bits, mask=mask) if bits else dense.params
    return float(problems.mlp_loss(moved, *dense.args))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_measured_is_the_loss_with_one_layer_quantized(dense, errors, batch_size):
    told = []
    found = mixed_precision.measured(
        problems.mlp_loss,
        dense.params,
        errors,
        *dense.args,
        batch_size=batch_size,
        progress=lambda done, total: told.append((done, total)),
    )
    for path, row in found.layers.items():
        expected = [loss_of(dense, {path: b}) - loss_of(dense, {}) for b in CHOICES]
        np.testing.assert_allclose(row, expected, rtol=1e-9)
    assert told == [(k, 10) for k in range(1, 11)]  # losses, the float one among them


def greedy_by_hand(dense, sizes):
    """Walk down from five bits, one layer at a time."""
    now = dict.fromkeys(sizes, 5)
    way = [(dict(now), loss_of(dense, now))]
    while any(bits != 2 for bits in now.values()):
        options = []
        for path, bits in now.items():
            if bits == 2:
                continue
            lower = CHOICES[CHOICES.index(bits) - 1]
            then = now | {path: lower}
            risen = loss_of(dense, then) - way[-1][1]
            saved = sizes[path].bytes[bits] - sizes[path].bytes[lower]
            price = risen / saved if risen > 0 else risen
            options.append((risen > 0, price, then))
        _, _, now = min(options, key=lambda x: x[:2])
        way.append((dict(now), loss_of(dense, now)))
    return way[::-1]


@pytest.mark.parametrize("unit_bytes", [None, (1, 100, 10_000), (10_000, 100, 1)])
def test_greedy_takes_the_cheapest_step_of_all(dense, errors, unit_bytes):
    """A price is one per byte: where sizes differ, so does the way."""
    if unit_bytes is not None:  # and whatever the order of the choices
        errors = mixed_precision.weight_errors(dense.params, CHOICES[::-1])
    sizes = mixed_precision.layer_sizes(dense.params, CHOICES)
    if unit_bytes is not None:
        sizes = {
            path: mixed_precision.LayerSize(size.weights, {2: k, 3: 2 * k, 5: 3 * k})
            for (path, size), k in zip(sizes.items(), unit_bytes, strict=True)
        }
    told = []
    frontier = mixed_precision.greedy_frontier(
        problems.mlp_loss,
        dense.params,
        errors,
        sizes,
        *dense.args,
        batch_size=4,
        progress=lambda done, total: told.append((done, total)),
    )
    expected = greedy_by_hand(dense, sizes)
    assert [a.bits for a in frontier] == [bits for bits, _ in expected]
    np.testing.assert_allclose(
        frontier.sensitivity,
        [loss - loss_of(dense, {}) for _, loss in expected],
        rtol=1e-9,
        atol=1e-12,
    )
    assert np.all(np.diff(frontier.bytes) > 0)
    assert told == [(k, 6) for k in range(1, 7)]
    chosen = frontier.within(4.0)
    best = [a for a in frontier if a.average_bits <= 4.0]
    assert chosen == min(best, key=lambda a: a.sensitivity)


def test_greedy_leaves_losses_that_are_not_finite_to_the_end(dense, errors):
    """Fewer bits in the first layer than three make NaN: those steps come last."""
    whole = dense.params["hidden"][0]["kernel"]
    far = np.abs(np.asarray(errors.layers["hidden/0/kernel"][0])).max()

    def loss_fn(params, x, y):
        moved = jnp.abs(params["hidden"][0]["kernel"] - whole).max()
        loss = problems.mlp_loss(params, x, y)
        return jnp.where(moved > 0.99 * far, jnp.nan, loss)

    sizes = mixed_precision.layer_sizes(dense.params, CHOICES)
    frontier = mixed_precision.greedy_frontier(
        loss_fn, dense.params, errors, sizes, *dense.args
    )
    first = [a.bits["hidden/0/kernel"] for a in frontier]
    assert first[0] == 2
    assert 2 not in first[1:]
    assert np.isnan(frontier.sensitivity[0])
    assert np.isfinite(frontier.sensitivity[1:]).all()


def test_one_program_for_all_steps(dense, errors):
    calls = []

    def counted(params, x, y):
        calls.append(1)
        return problems.mlp_loss(params, x, y)

    sizes = mixed_precision.layer_sizes(dense.params, CHOICES)
    arguments = (counted, dense.params, errors, sizes, *dense.args)
    mixed_precision.greedy_frontier(*arguments)
    traced = len(calls)
    mixed_precision.greedy_frontier(*arguments)
    assert len(calls) == traced <= 2
