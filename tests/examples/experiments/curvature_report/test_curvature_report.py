"""The report on curvature, of small networks, against matrices written out."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from examples.experiments.common import digits, networks
from examples.experiments.curvature_report import __main__ as curvature_report
from examples.experiments.curvature_report.measure import Settings, generalization_gap
from examples.experiments.speed import curvature as curvature_cost
from hero_jax import landscape, quant
from tests.problems import numpy_direction, slices

SETTINGS = Settings(
    h=0.5,
    bits=3,
    batch_size=30,
    surface_images=20,
    probes=200,
    grid=21,
    gap_epochs=2,
    quiet=True,
)


class Tiny(nn.Module):
    """A network whose Hessian can be written out."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(jnp.tanh(x))


def tiny(seed, metrics=None, scale=1.0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(30, 2, 2, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, size=30))
    variables = Tiny().init(jax.random.key(seed), images, train=False)
    params = jax.tree.map(lambda x: scale * x, variables["params"])
    return networks.Network(
        f"net{seed}",
        Tiny(),
        params,
        variables["batch_stats"],
        (images, labels),
        (images[:20], labels[:20]),
        0.4,
        metrics,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on two networks, of which one has metrics."""
    out = tmp_path_factory.mktemp("report")
    metrics = out / "metrics.csv"
    metrics.write_text("train_accuracy,test_accuracy\n0.5,0.5\n0.9,0.5\n")
    chosen = [tiny(0, metrics), tiny(1, scale=3.0)]
    return chosen, curvature_report.report(chosen, SETTINGS, out), out


@pytest.mark.slow
def test_numbers_are_those_of_the_hessian_written_out(report):
    chosen, record, _ = report
    for network, found in zip(chosen, record["networks"], strict=True):
        check_network(network, found)


def check_network(network, found):
    flat, unravel = ravel_pytree(network.params)
    loss_fn = networks.make_loss(network.model, "running")
    loss = jax.jit(lambda w: loss_fn(unravel(w), network.batch_stats, *network.train))
    gradient_fn = jax.jit(jax.grad(loss))
    H, g = np.asarray(jax.hessian(loss)(flat)), np.asarray(gradient_fn(flat))
    W, c = np.asarray(flat), SETTINGS.loss_increase
    values, vectors = np.linalg.eigh(H)
    positions = slices(network.params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    close(found["loss"], loss(flat))
    close(found["gradient_norm"], np.linalg.norm(g))
    close(found["top_eigenvalue"], values[-1])
    close(found["lowest_eigenvalue"], values[0])
    trace = found["trace"]
    assert abs(trace["value"] - values.sum()) < 5 * trace["stderr"] + 1e-3
    logits = loss_fn.outputs_fn(network.params, network.batch_stats, *network.test)
    accuracy = np.mean(np.argmax(logits, -1) == np.asarray(network.test[1]))
    close(found["test_accuracy"], accuracy)

    moving = [i for i in positions if W[i].any() and g[i].any()]
    z = numpy_direction("layerwise", W, g, moving)
    close(found["hessian_norm"], np.linalg.norm(H @ z))
    difference = np.asarray(gradient_fn(flat + SETTINGS.h * z)) - g
    close(found["hessian_norm_h"], np.linalg.norm(difference) / SETTINGS.h)

    moved = ravel_pytree(quant.fake_quantize(network.params, SETTINGS.bits))[0]
    d, change = np.asarray(moved) - W, found["quantization"]
    close(change["first_order"], g @ d)
    close(change["second_order"], d @ H @ d / 2)
    close(change["measured"], loss(flat + d) - loss(flat))

    theorem, v = found["theorem_3"], values[-1]
    norm, total = np.linalg.norm(g), np.abs(g).sum()
    n = np.count_nonzero(W)
    close(theorem["l2_bound"], norm / v * (np.sqrt(1 + 2 * v * c / norm**2) - 1))
    close(
        theorem["linf_bound"],
        total / (n * v) * (np.sqrt(1 + 2 * n * v * c / total**2) - 1),
    )
    # the smallest of many steps, either way along the eigenvector
    grid = np.linspace(0.0, 20.0, 20001)
    rises = jax.jit(jax.vmap(lambda t: loss(flat + t * vectors[:, -1])))
    first = [
        grid[np.argmax(np.asarray(rises(sign * grid)) >= loss(flat) + c)]
        for sign in (1.0, -1.0)
    ]
    measured = theorem["measured"]["top eigenvector"]
    np.testing.assert_allclose(measured["l2"], min(x for x in first if x), atol=5e-3)
    largest = np.abs(vectors[:, -1]).max()
    np.testing.assert_allclose(measured["linf"], measured["l2"] * largest, rtol=1e-3)


@pytest.mark.slow
def test_files_are_complete(report):
    _, record, out = report
    assert json.loads((out / "report.json").read_text()) == json.loads(
        json.dumps(record)
    )
    words = (out / "report.md").read_text()
    assert "](contours.png)" in words
    assert (out / "contours.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_areas_are_those_of_a_finer_grid(report):
    chosen, record, _ = report
    for network, found in zip(chosen, record["networks"], strict=True):
        assert found["area_is_closed"]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
        plane = [landscape.random_direction(key, network.params) for key in keys]
        args = (network.batch_stats, *(x[:20] for x in network.train))
        loss_fn = networks.make_loss(network.model, "running")
        for far in 0.25 * 1.5 ** np.arange(10):
            axis = np.linspace(-far, far, 81)
            surface = landscape.loss_surface(
                loss_fn, network.params, plane, (axis, axis), *args
            )
            expected = landscape.area_within((axis, axis), surface, 0.1)
            if expected.is_closed:
                break
        assert expected.is_closed
        np.testing.assert_allclose(found["area"], expected.area, rtol=0.05)


@pytest.mark.slow
def test_the_gap_is_over_the_last_epochs_of_the_metrics(report):
    _, record, _ = report
    first, second = record["networks"]
    # 0.7 - (0.6 * 0.5 + 0.4 / 4) on average
    np.testing.assert_allclose(first["gap"]["mean"], 0.3)
    assert "gap" not in second


def test_the_gap_is_that_to_a_test_set_with_the_same_label_noise():
    # 40 % redrawn over 4 classes: a right answer stays right with 0.6 + 0.1, and a
    # wrong one becomes right with 0.1.
    metrics = {"train_accuracy": np.array([1.0]), "test_accuracy": np.array([0.625])}
    (gap,) = generalization_gap(metrics, 0.4, 4)
    np.testing.assert_allclose(gap, 1.0 - (0.625 * 0.7 + 0.375 * 0.1))


@pytest.mark.slow
def test_batch_statistics_are_those_of_the_images_at_hand():
    network = tiny(0)
    args = (network.params, network.batch_stats, *network.train)
    batch = networks.make_loss(network.model, "batch")(*args)
    _, new = network.model.apply(
        {"params": network.params, "batch_stats": network.batch_stats},
        network.train[0],
        train=True,
        mutable=["batch_stats"],
    )
    # momentum 0.99: a hundred times the step of the running statistics
    own = jax.tree.map(
        lambda old, new: old + 100.0 * (new - old),
        network.batch_stats,
        new["batch_stats"],
    )
    running = networks.make_loss(network.model, "running")
    assert abs(batch - running(*args)) > 1e-3
    np.testing.assert_allclose(
        batch, running(network.params, own, *network.train), rtol=1e-3
    )


@pytest.mark.slow
def test_networks_of_the_quick_start_are_trained_and_read_again(tmp_path):
    (path,) = networks.train(["SGD"], 2, 0.4, tmp_path, quiet=True, metrics=True)
    network = networks.of_digits(path, 0.4)
    data = digits.load_data(0.4, 0)
    state = digits.TrainState(network.params, network.batch_stats, None)
    last = (tmp_path / "sgd_seed0.csv").read_text().splitlines()[-1].split(",")
    accuracy = digits.evaluate(state, data, 32)
    np.testing.assert_allclose(float(last[2]), accuracy, rtol=1e-6)
    fast = networks.make_accuracy(network.model, "running")
    np.testing.assert_allclose(
        fast(network.params, network.batch_stats, *network.test), accuracy, atol=2e-3
    )
    np.testing.assert_array_equal(network.train[1], data.train_labels)
    assert network.metrics == path.with_suffix(".csv")


@pytest.mark.slow
def test_runs_of_the_recipe_are_read_with_their_data(tmp_path, monkeypatch):
    from examples.image_classification import loop, run, train
    from examples.image_classification.config import Config
    from tests.examples.image_classification import small

    for module in (loop, train, networks):
        monkeypatch.setattr(module, "make_model", small.make_model)
    config = Config(
        dataset="digits",
        train_size=200,
        test_size=100,
        label_noise=0.5,
        augmentation="none",
        method="sgd",
        epochs=1,
        batch_size=64,
        bits=(4,),
        curvature_batches=1,
    )
    folder = tmp_path / "digits" / "seed_0"
    record = run.run(config, run.Options(out=folder, quiet=True, devices=1))
    network = networks.of_run(folder, None, 100)
    assert network.name == "digits/seed_0"
    assert network.label_noise == 0.5
    accuracy = networks.make_accuracy(network.model, "running")
    found = accuracy(network.params, network.batch_stats, *network.test)
    np.testing.assert_allclose(found, record["test_accuracy"], rtol=1e-6)
    assert network.train[0].shape == (100, 8, 8, 1)
    assert network.metrics == folder / "metrics.csv"
    loss = networks.make_loss(network.model, "running")
    assert np.isfinite(loss(network.params, network.batch_stats, *network.train))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "--bits must be 2 to 8, got 9"),
        (["--h", "0"], "--h must be above 0, got 0.0"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        curvature_report.main([*arguments, f"--out={tmp_path}"])
    assert message in capsys.readouterr().err


def test_networks_that_cannot_be_read_are_named(tmp_path):
    for path, message in (
        ("nowhere.safetensors", "nowhere"),
        (tmp_path, "config.toml"),
    ):
        with pytest.raises(SystemExit, match=message):
            curvature_report.main([str(path), f"--out={tmp_path}"])


@pytest.mark.slow
def test_costs_are_counted_in_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature_cost.models, "create", lambda *_, **__: Tiny())
    monkeypatch.setattr(curvature_cost, "STEPS", (10,))
    out = tmp_path / "cost.json"
    options = ["--images=20", "--size=2", "--batch-size=8", f"--out={out}"]
    record = curvature_cost.main(options)
    rows = json.loads(out.read_text())["rows"]
    assert rows == record["rows"]
    assert rows["Hessian-vector product"]["products"] == 1
    assert rows["trace, 8 probes, deflation 8"]["products"] == 16
    assert all(row["gradients"] > 0.0 for row in rows.values())
