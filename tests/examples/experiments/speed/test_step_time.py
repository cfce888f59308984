"""The benchmark of a step: what it measures, and that methods are what they say."""

import json

import jax
import numpy as np
import pytest

from examples.experiments.speed import step_time


@pytest.mark.slow
def test_table_and_record_hold_the_methods_that_are_asked_for(tmp_path, capsys):
    options = ["--model=resnet8", "--size=8", "--batch=32", "--rounds=2"]
    asked = ["--method=HERO, every 4th step", f"--out={tmp_path / 'out.json'}"]
    step_time.main([*options, *asked])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines[4:]]
    assert rows == ["SGD", "HERO, every 4th step"]
    record = json.loads((tmp_path / "out.json").read_text())
    methods = record["networks"]["resnet8"]["methods"]
    assert [*methods] == rows
    for result in methods.values():
        assert len(result["seconds"]) == 2
        median = np.median(result["seconds"])
        np.testing.assert_allclose(result["images_per_second"], 32 / median)
        assert result["flops"] > 0
        assert result["temporary_bytes"] > 0
        assert result["collectives"] > 0
    # The branch with the penalty counts like one that is taken.
    assert methods[rows[1]]["flops"] > 3 * methods["SGD"]["flops"]


@pytest.mark.slow
def test_one_perturbation_a_device_needs_one_operation_across_devices():
    options = {"size": 8, "batch": 16, "way": "pmap local"}
    results = step_time.measure("resnet8", ["SGD"], 1, **options)
    if jax.__version_info__ >= (0, 8):  # which joins gradient, statistics and accuracy
        assert results["SGD"]["collectives"] == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch=3", "--batch must be a multiple of the 8 devices, got 3."),
        ("--batch=0", "--batch: must be at least 1, got 0"),
        ("--model=resnet9", "invalid choice: 'resnet9'"),
        ("--method=HERA", "invalid choice: 'HERA'"),
    ],
)
def test_bad_options_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        step_time.main([option])
    assert message in capsys.readouterr().err


def test_options_that_do_not_go_together_are_named(capsys):
    with pytest.raises(SystemExit):
        step_time.main(["--dtype=bfloat16", "--method=HERO, finite difference"])
    assert "hvp must be 'exact' with dtype='bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "network",
    [
        "resnet20",
        pytest.param("transformer", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("vgg19_bn", marks=pytest.mark.slow),
    ],
)
def test_last_layers_are_some_of_them(network):
    from examples.image_classification.config import Config
    from examples.image_classification.train import make_penalty_mask

    pattern = step_time.NETWORKS[network][-1]
    program, _ = step_time.prepare(network, "HERO, last layers", 32, 8)
    params = program.shapes().params
    mask = make_penalty_mask(Config(penalty_layers=pattern))(params)
    weights = [x.ndim >= 2 for x in jax.tree.leaves(params)]
    assert 0 < sum(jax.tree.leaves(mask)) < sum(weights) / 2
    assert (
        len({path.split("/")[0] for path in _chosen(mask)})
        == {
            "resnet20": 4,
            "transformer": 4,
            "mobilenet_v2": 6,
            "vgg19_bn": 5,
        }[network]
    )


def _chosen(mask):
    for path, chosen in jax.tree_util.tree_leaves_with_path(mask):
        if chosen:
            yield jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.slow
def test_no_convolution_is_computed_twice():
    """ResNet20 has 19 of 3x3: three each per gradient, six per product, on CPUs.

    Images are not differentiated: that saves one per gradient, four per product.
    """

    def count(name):
        program, item = step_time.prepare("resnet20", name, 32, 8)
        traced = program.step.trace(program.shapes(), item)
        lowered = traced.lower(lowering_platforms=("cpu",))
        return lowered.as_text().count("stablehlo.convolution")

    gradient, product = 3 * 19 - 1, 6 * 19 - 4
    assert count("SGD") == gradient
    assert count("HERO") == 2 * gradient + product
    assert count("HERO, finite difference") == 3 * gradient
