"""The command on mixed precision, of small networks, against doing it by hand."""

import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

from examples.experiments.common import networks
from examples.experiments.mixed_precision import __main__ as mixed_precision
from examples.experiments.mixed_precision import report
from hero_jax import quant
from tests.problems import slices

EXAMPLES = Path(__file__).parents[4] / "examples"

ARGUMENTS = [
    *("--choices", "2", "3", "5", "--images", "60", "--batch-size", "40"),
    *("--probes", "300", "--steps", "12", "--allocations", "12", "--quiet"),
]


class Tiny(nn.Module):
    """A network whose Hessian can be written out."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name="first")(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dense(5, name="second")(jnp.tanh(x))
        return nn.Dense(3, name="last")(jnp.tanh(x))


def logits(network, params, images):
    variables = {"params": params, "batch_stats": network.batch_stats}
    return network.model.apply(variables, images, train=False)


def tiny(path):
    """A network that has learnt a little, by its name's seed."""
    return trained(int(path.stem[-1]))._replace(name=path.stem)


@functools.cache
def trained(seed):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(110, 2, 2, 1)), jnp.float32)
    labels = jnp.asarray((images[:, 0, 0, 0] > 0) + (images[:, 1, 1, 0] > 0), int)
    variables = Tiny().init(jax.random.key(0), images, train=False)
    network = networks.Network(
        "",
        Tiny(),
        variables["params"],
        variables["batch_stats"],
        (images[:60], labels[:60]),
        (images[60:], labels[60:]),
        0.0,
        None,
    )

    def loss(params):
        out = logits(network, params, images[:60])
        return optax.softmax_cross_entropy_with_integer_labels(out, labels[:60]).mean()

    params = network.params
    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - g, p, jax.grad(loss)(p)))
    for _ in range(100):
        params = step(params)
    return network._replace(params=params)


def run_command(out, *names):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "of_digits", lambda path, _: tiny(path))
        return mixed_precision.main([*names, "--out", str(out), *ARGUMENTS])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The record of three networks, two of which differ in the seed alone."""
    out = tmp_path_factory.mktemp("mixed")
    names = ("a_seed0.x", "a_seed1.x", "b_seed0.x")
    return run_command(out, *names, "--no-activations"), out


def accuracy_of(network, params):
    images, labels = network.test
    right = logits(network, params, images).argmax(-1) == labels
    return 100.0 * float(right.mean())


@pytest.mark.slow
def test_accuracies_are_those_of_quantize(run):
    record, _ = run
    assert {k: len(v) for k, v in record["networks"].items()} == {"a": 2, "b": 1}
    network, found = tiny(Path("a_seed1")), record["networks"]["a"][1]
    accuracy = found["accuracy"]
    assert accuracy["float"] == pytest.approx(accuracy_of(network, network.params))
    assert accuracy["float"] > 60.0
    for bits in (2, 3, 5):
        rounded = quant.fake_quantize(network.params, bits)
        assert accuracy["uniform"][str(bits)] == pytest.approx(
            accuracy_of(network, rounded)
        )
    budgets = record["settings"]["budgets"]
    for measure in ("HAWQ", "pairwise", "greedy"):
        row = found["allocations"][measure]
        for budget, a, percent in zip(budgets, row, accuracy[measure], strict=True):
            bits = dict(zip(found["layers"], a["bits"], strict=True))
            rounded = quant.fake_quantize(network.params, bits)
            assert percent == pytest.approx(accuracy_of(network, rounded))
            assert a["average_bits"] <= budget


@pytest.mark.slow
def test_curvature_of_layers_is_that_of_the_dense_hessian(run):
    record, _ = run
    network, found = tiny(Path("b_seed0")), record["networks"]["b"][0]
    flat, unravel = ravel_pytree(network.params)
    images, labels = network.train

    def loss(w):
        out = logits(network, unravel(w), images)
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    H = np.asarray(jax.hessian(loss)(flat), np.float64)
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(network.params)
    ]
    for path, i in zip(paths, slices(network.params), strict=True):
        if not path.endswith("kernel"):
            continue
        layer = found["layers"][path]
        block = H[i, i]
        assert layer["size"] == len(block)
        top = np.linalg.eigvalsh(block)[-1]
        assert layer["eigenvalue"] == pytest.approx(top, rel=1e-3)
        error = abs(layer["average_trace"] - np.trace(block) / len(block))
        assert error < 4.0 * layer["average_trace_stderr"]
        d = quant.fake_quantize(network.params, 2)
        d = np.asarray(ravel_pytree(d)[0] - flat, np.float64)[i]
        form = d @ block @ d / 2
        assert layer["sensitivity"]["quadratic"][0] == pytest.approx(form, rel=1e-3)


@pytest.mark.slow
def test_rank_correlations_are_of_losses_measured(run):
    record, _ = run
    network, found = tiny(Path("a_seed0")), record["networks"]["a"][0]
    random = found["random"]
    averages = []
    for columns, lost in zip(random["bits"], random["accuracy_lost"], strict=True):
        bits = dict(zip(found["layers"], columns, strict=True))
        rounded = quant.fake_quantize(network.params, bits)
        expected = found["accuracy"]["float"] - accuracy_of(network, rounded)
        assert lost == pytest.approx(expected, abs=1e-4)
        weights = [layer["size"] for layer in found["layers"].values()]
        averages.append(np.average(columns, weights=weights))
    assert np.ptp(averages) < 1.0
    assert abs(np.mean(averages) - 3.5) < 0.5
    expected = spearmanr(random["predicted"]["measured"], random["accuracy_lost"])
    found_rank = found["rank_correlation"]["measured"]["allocations"]
    assert found_rank == pytest.approx(expected.statistic)


@pytest.mark.slow
def test_the_file_is_what_the_report_says(run):
    record, out = run
    for found in (r for records in record["networks"].values() for r in records):
        file = found["file"]
        path = out / file["name"]
        assert path.stat().st_size == file["bytes"]
        tree = quant.dequantize(quant.load(path))
        network = tiny(Path(found["name"]))
        assert file["accuracy"] == pytest.approx(accuracy_of(network, tree["params"]))
        assert file["average_bits"] <= 3.5
    words = (out / "report.md").read_text()
    assert "(pareto.png)" in words
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert f"{file['bytes']:,}" in words
    assert json.loads((out / "mixed_precision.json").read_text())["networks"]


@pytest.mark.slow
def test_activations_are_rounded_as_by_hand(tmp_path):
    record = run_command(tmp_path, "b_seed0.x")
    network, found = tiny(Path("b_seed0")), record["networks"]["b"][0]
    images, _ = network.train
    ranges = found["activations"]["layers"]
    assert ranges["first"]["low"] == pytest.approx(float(images.min()))
    assert ranges["first"]["high"] == pytest.approx(float(images.max()))
    assert {path: r["size"] for path, r in ranges.items()} == {
        "first": 4,
        "second": 6,
        "last": 5,
    }
    rows = found["activations"]["accuracy, float weights"]
    assert rows["float"] == pytest.approx(found["accuracy"]["float"])
    fn = quant.quantize_activations(
        lambda p, images: logits(network, p, images),
        {
            path: quant.ActivationRange(*map(np.float32, (r["low"], r["high"])), 1)
            for path, r in ranges.items()
        },
        3,
    )
    images, labels = network.test
    right = jax.jit(fn)(network.params, images).argmax(-1) == labels
    assert rows["uniform"]["3"] == pytest.approx(100.0 * float(right.mean()))
    words = (tmp_path / "report.md").read_text()
    (line,) = re.findall(r"b, float weights.*?(\| uniform .*?)\n", words, re.S)
    assert f" {rows['uniform']['3']:.1f} " in line


@pytest.mark.slow
def test_networks_of_one_name_keep_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "of_digits", lambda path, _: tiny(path))
    same = [tmp_path / "x" / "a_seed0", tmp_path / "y" / "a_seed0"]
    options = mixed_precision.parse([*map(str, same), "--out", str(tmp_path)])
    names = [network.name for network in networks.load_or_train(options, ())]
    assert names == [*map(str, same)]


RESULTS = {
    "SGD": ("digits", "sgd"),
    "HERO": ("digits", "hero"),
    "ResNet20 by SGD": ("cifar10_resnet20", "resnet20_sgd"),
    "ResNet20 by HERO": ("cifar10_resnet20", "resnet20_hero"),
}
"""Names in the guide to committed results and networks."""


def committed(label):
    folder, group = RESULTS[label]
    path = EXAMPLES / "results/mixed_precision" / folder / "mixed_precision.json"
    record = json.loads(path.read_text())
    return record["settings"]["budgets"], record["networks"][group]


def test_the_guide_says_what_the_results_say():
    guide = (EXAMPLES.parent / "docs/mixed_precision.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in guide.splitlines()
        if line.startswith("| ")
    ]
    accuracies = 0
    for name, *cells in rows:
        label, _, measure = name.partition(", ")
        if label not in RESULTS or not measure:
            continue
        budgets, found = committed(label)
        for budget, cell in zip((2.0, 2.5, 3.0, 3.5, 4.0), cells, strict=False):
            if measure == "uniform":
                each = [r["accuracy"]["uniform"].get(f"{budget:g}") for r in found]
            else:
                at = budgets.index(budget)
                each = [r["accuracy"][measure][at] for r in found]
            assert cell == ("" if None in each else report._pm(each))
            accuracies += 1
    ranks = 0
    for name, *cells in rows:
        if name not in mixed_precision.MEASURES or "±" not in cells[0]:
            continue
        for label, cell in zip(RESULTS, cells, strict=True):
            _, found = committed(label)
            each = [r["rank_correlation"].get(name) for r in found]
            if None in each:  # HAWQ-V2's traces of ResNet20 were not accurate
                assert not cell
                continue
            assert cell == report._pm([rank["allocations"] for rank in each], 2)
            ranks += 1
    assert accuracies == (4 * 8 - 2) * 5
    assert ranks == 4 * 6 - 2


@pytest.fixture(scope="module")
def measured():
    """A network, and what its layers are like."""
    options = mixed_precision.parse(ARGUMENTS)
    network = tiny(Path("a_seed0"))
    return network, mixed_precision.measure(network, options)


def choose(measured, *more):
    options = mixed_precision.parse([*ARGUMENTS, "--measure", "measured", *more])
    return mixed_precision.choose(*measured, options)


@pytest.mark.slow
def test_within_points_of_the_float_accuracy(measured):
    chosen = choose(measured, "--within", "3")
    network, rows = measured
    train = network._replace(test=network.train)
    in_float = accuracy_of(train, network.params)

    def lost(bits):
        return in_float - accuracy_of(train, quant.fake_quantize(network.params, bits))

    assert lost(chosen.bits) <= 3.0 + 1e-3
    smaller = [a for a in rows.frontiers["measured"] if a.bytes < chosen.bytes]
    assert smaller
    assert lost(smaller[-1].bits) > 3.0  # the next smaller one loses more
    assert choose(measured, "--within", "100").average_bits == 2.0


@pytest.mark.slow
def test_a_budget_of_bytes_is_used_up(measured):
    frontier = measured[1].frontiers["measured"]
    for budget in (int(frontier[1].bytes), int(frontier[-1].bytes) - 1):
        chosen = choose(measured, "--bytes", str(budget))
        assert chosen.bytes <= budget
        within = [a.sensitivity for a in frontier if a.bytes <= budget]
        assert chosen.sensitivity == min(within)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--choices", "1", "4"], "--choices must be two or more of 2 to 8"),
        (["--choices", "4"], "--choices must be two or more of 2 to 8"),
        (["--average-bits", "9"], "--average-bits must be 2 to 5, as --choices are"),
        (["--within", "-1"], "--within must be at least 0, got -1"),
        (["--within", "1", "--measure", "pairwise"], "which pairwise does not have"),
        (["--bytes", "9", "--measure", "pairwise"], "which pairwise does not have"),
        (["--bytes", "100", "--within", "1"], "not allowed with argument"),
        (["--probes", "1"], "--probes: must be at least 2"),
        (["--images", "0"], "--images: must be at least 1"),
    ],
)
def test_misuse_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        mixed_precision.parse([*ARGUMENTS, *arguments])
    assert message in capsys.readouterr().err
