"""Steps, evaluation and runs on several devices against one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.image_classification import __main__ as command
from examples.image_classification import devices as devices_of
from examples.image_classification import evaluate, input_pipeline, loop, train
from examples.image_classification import run as run_module
from examples.image_classification.config import Config
from examples.image_classification.run import Options, run
from examples.image_classification.stopping import Stop
from tests.examples.image_classification.small import Small, make_model

# Flax begins with statistics in float32, also where they become float64.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")

IN_A_HURRY = True
"""What is compiled here runs for some steps only."""

CONFIG = Config(
    dataset="digits",
    augmentation="crop_flip",
    model="resnet8",
    train_size=96,
    test_size=60,
    batch_size=32,
    epochs=2,
    label_noise=0.2,
    h=0.7,
    gamma=0.3,
    perturbation="normalized",
)


def setting(parallel="jit", count=1, synchronized=True, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    pipeline = input_pipeline.create(config, devices=devices_of.choose(parallel, count))
    model = Small(pipeline.devices.axis_name if synchronized else None)
    return config, pipeline, model, train.make_program(config, model, pipeline)


def after_an_epoch(*way, **fields):
    """Return state and outputs of three steps."""
    _, pipeline, _, program = setting(*way, **fields)
    state, outputs = program.init(), []
    for item in pipeline.epoch(0):
        state, values = program.step(state, item)
        outputs.append(values)
    return pipeline.devices.fetch((state, outputs))


def assert_close(actual, expected):
    """Sums in another order in float64; the outputs are in float32."""
    for one, two, tolerance in zip(actual, expected, (1e-9, 1e-5), strict=True):
        jax.tree.map(
            lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, rtol=t, atol=t),
            one,
            two,
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "grad_l1", "hero"])
def test_devices_share_a_batch_out_and_nothing_else_changes(method):
    expected = after_an_epoch(method=method)
    assert expected[0].step == 3
    assert_close(after_an_epoch("pmap", 4, method=method), expected)
    if method != "grad_l1":
        assert_close(after_an_epoch("jit", 4, method=method), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_m_sharpness_does_not_depend_on_the_devices():
    """Parts of 8 images: a device's share, and half of it."""
    fields = {"method": "hero", "examples_per_perturbation": 8, "synchronized": False}
    expected = after_an_epoch(**fields)
    for way in [("pmap", 2), ("pmap", 4)]:
        assert_close(after_an_epoch(*way, **fields), expected)
    whole, _ = after_an_epoch(method="hero")
    difference = optax.tree.sub(whole.params, expected[0].params)
    assert optax.tree.norm(difference) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_product_over_some_images_does_not_depend_on_the_devices():
    fields = {"method": "hero", "hvp_examples": 8, "penalty_every": 2}
    expected = after_an_epoch(**fields)
    for way in [("jit", 4), ("pmap", 4)]:
        assert_close(after_an_epoch(*way, **fields), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_statistics_may_be_those_of_each_device():
    """SGD perturbs nothing: parts of 8 images differ in their BatchNorm only."""
    expected = after_an_epoch(method="sgd", examples_per_perturbation=8)
    actual = after_an_epoch("pmap", 4, synchronized=False, method="sgd")
    assert_close(actual, expected)
    whole, _ = after_an_epoch(method="sgd")
    difference = optax.tree.sub(whole.batch_stats, expected[0].batch_stats)
    assert optax.tree.norm(difference) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_curvature_is_that_of_the_whole_batch_for_every_method():
    fields = {"curvature_batches": 2, "examples_per_perturbation": 8}
    results = []
    for way in [("jit", 1), ("jit", 4), ("pmap", 4)]:
        config, pipeline, model, program = setting(*way, **fields)
        results.append(
            evaluate.make_measure(config, model, pipeline)(
                evaluate.variables_of(program.init())
            )
        )
    for result in results[1:]:
        for name, value in result.items():
            np.testing.assert_allclose(value, results[0][name], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_an_epoch_in_one_loop_is_its_steps(parallel):
    expected, outputs = after_an_epoch(parallel, 4, method="sgd")
    _, pipeline, _, program = setting(parallel, 4, method="sgd")
    together = program.epoch(program.init(), next(pipeline.epoch(0)))
    state, values = pipeline.devices.fetch(together)
    np.testing.assert_allclose(values, np.stack(outputs), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state,
        expected,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("parallel", "count"), [("jit", 8), ("pmap", 8)])
def test_evaluation_counts_every_image_once(parallel, count):
    """The batches of 500 become 504, and the last one of 597 has places left over."""
    config = dataclasses.replace(CONFIG, test_size=597)
    results = []
    for way in (("jit", 1), (parallel, count)):
        pipeline = input_pipeline.create(config, devices=devices_of.choose(*way))
        init = Small().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
        (result,) = evaluate.make_evaluate(Small(), pipeline)([init])
        results.append(result)
    assert results[0].accuracy == results[1].accuracy
    np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_all_devices_have_the_state_and_nothing_is_compiled_twice(parallel):
    _, pipeline, _, program = setting(parallel, 4, method="sgd")
    traced, batch = [], pipeline.batch
    pipeline.batch = lambda *args: traced.append(None) or batch(*args)
    state = program.init()
    for item in itertools.chain(pipeline.epoch(0), pipeline.epoch(1)):
        state, _ = program.step(state, item)
    assert len(traced) == 1
    for leaf in jax.tree.leaves(state):
        assert len(leaf.addressable_shards) == 4


def test_what_several_devices_compute_is_said():
    for fields, parallel, text in [
        ({}, "jit", "one perturbation for every 32, BatchNorm over 32"),
        (
            {"synchronized_batch_norm": False},
            "pmap",
            "one perturbation for every 32, BatchNorm over 16",
        ),
        (
            {"examples_per_perturbation": 4},
            "pmap",
            "one perturbation for every 4, BatchNorm over 4",
        ),
    ]:
        config = dataclasses.replace(CONFIG, **fields)
        said = run_module._in_words(config, Options(parallel=parallel), 2)
        assert said == f"2 devices by {parallel}: 32 images at once, {text}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "synchronized"),
    [
        ({}, True),
        ({"synchronized_batch_norm": False}, False),
        ({"examples_per_perturbation": 8}, False),
        ({"examples_per_perturbation": 32}, True),
    ],
)
def test_which_networks_normalize_over_all_devices(
    fields, synchronized, tmp_path, monkeypatch
):
    """The one that is trained, if so configured; the one that is measured, always."""
    config = dataclasses.replace(CONFIG, **fields)
    made = {"step": [], "measure": []}
    make_program, make_measure = loop.make_program, evaluate.make_measure

    def note(name, make):
        def noted(config, model, pipeline):
            made[name].append(model.axis_name)
            return make(config, model, pipeline)

        return noted

    monkeypatch.setattr(loop, "make_program", note("step", make_program))
    monkeypatch.setattr(evaluate, "make_measure", note("measure", make_measure))
    for parallel, axis in (("pmap", "data"), ("jit", None)):
        devices = devices_of.choose(parallel, 4)
        pipeline = input_pipeline.create(config, devices=devices)
        out = tmp_path / parallel
        out.mkdir()
        training = loop.Training(config, pipeline, out, 1, True, Stop())
        training.close()
        assert made["step"].pop() == (axis if synchronized else None)
        assert made["measure"].pop() == axis


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(tmp_path, monkeypatch):
    """The state that four devices saved is the one that two begin with, bit for bit."""
    saved, begun = [], []
    save, begin = loop.Training._save, loop.Training._begin

    def note_save(self, step, state, *rest):
        saved.append((step, self._devices.fetch(state)))
        save(self, step, state, *rest)
        if step == 3:
            raise KeyboardInterrupt  # after the first epoch

    def note_begin(self):
        result = begin(self)
        state = self._devices.fetch(result[0])
        begun.append((int(state.step), state))
        return result

    monkeypatch.setattr(loop, "make_model", make_model)
    monkeypatch.setattr(loop.Training, "_save", note_save)
    monkeypatch.setattr(loop.Training, "_begin", note_begin)
    options = Options(out=tmp_path, parallel="pmap", devices=4, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, options)
    record = run(CONFIG, dataclasses.replace(options, parallel="jit", devices=2))
    jax.tree.map(np.testing.assert_array_equal, begun[1], saved[0])
    assert [row["step"] for row in record["epochs"]] == [3, 6]
    assert record["environment"]["devices"] == 2
    assert record["environment"]["parallel"] == "jit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--devices", "3"],
            "3 devices cannot share out micro-batches of 64 images: choose another "
            "batch_size or --devices.",
        ),
        (["--devices", "9"], "devices must be at most 8, the number of cpu devices, g"),
        (
            [
                "--parallel",
                "pmap",
                "--devices",
                "4",
                "--examples-per-perturbation",
                "32",
            ],
            "examples_per_perturbation must divide the 16 images of a device, or be "
            "all 64, got 32: use fewer --devices.",
        ),
        (
            ["--devices", "2", "--examples-per-perturbation", "32"],
            "examples_per_perturbation=32 needs every device by itself: use --parallel "
            "pmap.",
        ),
        (
            ["--devices", "4", "--hvp-examples", "2"],
            "hvp_examples must be a multiple of the 4 devices, got 2.",
        ),
        (
            ["--penalty-layers", "Conv9", "--train-size", "64"],
            "penalty_layers must be found in the path of a weight tensor, got 'Conv9'.",
        ),
        (
            ["--no-synchronized-batch-norm", "--devices", "2"],
            "synchronized_batch_norm=False needs every device by itself: use",
        ),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    arguments = ["digits", "--batch-size", "64", "--out", str(tmp_path), *arguments]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_parts_must_divide_the_micro_batch():
    with pytest.raises(ValueError, match="must divide the micro-batch of 32 images, g"):
        dataclasses.replace(CONFIG, examples_per_perturbation=5)
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        Options(devices=0)
