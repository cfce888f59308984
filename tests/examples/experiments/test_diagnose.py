"""What HERO's metrics look like: the record against the page, and by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from examples.experiments import diagnose
from examples.experiments.common import digits as quickstart

ROOT = Path(__file__).parents[3]

RECORD = json.loads((ROOT / "examples/results/diagnose/diagnose.json").read_text())


def test_the_page_has_the_table_of_the_record():
    page = (ROOT / "docs" / "curvature.md").read_text()
    assert diagnose.table(RECORD["cases"]) in page
    assert {name: case["h"] for name, case in RECORD["cases"].items()} == diagnose.CASES


def test_the_record_bears_out_what_the_page_says():
    epochs = {
        name: {reading: np.array(x) for reading, x in case["epochs"].items()}
        for name, case in RECORD["cases"].items()
    }
    nothing, work, too_much = (epochs[name] for name in diagnose.CASES)
    share = {name: x["rise"] / x["loss"] for name, x in epochs.items()}
    assert share["nothing"][:8].max() < 0.03
    assert 0.1 < share["its work"].min() < share["its work"].max() < 0.45
    assert too_much["loss"][-1] > 2.2
    assert share["too much"][-1] > 0.9
    assert np.allclose(nothing["step"], 0.01, atol=0.002)
    assert np.allclose(work["step"], 0.35, atol=0.05)
    assert nothing["gradients"].max() < 1.8 < 3 < work["gradients"][-1]
    assert too_much["hessian_norm"][-1] < work["hessian_norm"][-1]
    assert work["hessian_norm"][2:].max() < nothing["hessian_norm"][2:].min()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["its work"])
def test_a_run_writes_what_it_measured(case, monkeypatch, tmp_path):
    """The readings of the last epoch, from gradients taken one by one."""
    h = diagnose.CASES[case]
    monkeypatch.setattr(diagnose, "CASES", {case: h})
    record = diagnose.main(["--epochs", "1", "--quiet", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "diagnose.json").read_text())
    assert written["cases"] == record["cases"]
    assert (tmp_path / "diagnose.png").stat().st_size > 10_000
    assert {len(x) for x in record["cases"][case]["epochs"].values()} == {1}

    data = quickstart.load_data(0.4, seed=0)
    method = quickstart.Method(
        diagnose.digits.hero_value_and_grad, {"h": h, "gamma": diagnose.GAMMA}
    )
    program = quickstart.make_program(method, len(data.train_labels) // 128)
    state = program.init(0)
    for indices in next(quickstart.batches(len(data.train_labels), 1, 0)):
        state, _ = program.step(state, data, indices)
    batch = state.batch_stats, data.train_images, data.train_labels
    loss = lambda params: quickstart.loss_fn(params, *batch)[0]
    W, unravel = ravel_pytree(state.params)
    g = ravel_pytree(jax.grad(loss)(state.params))[0]
    z = ravel_pytree(
        jax.tree.map(
            lambda w, g: (
                w**2 / np.linalg.norm(w) * g / np.linalg.norm(g) if np.any(w) else 0 * w
            ),
            state.params,
            unravel(g),
        )
    )[0]
    U = unravel(W + h * z)
    dL = ravel_pytree(jax.grad(loss)(U))[0]
    expected = {
        "loss": float(loss(state.params)),
        "rise": float(loss(U) - loss(state.params)),
        "step": h * np.linalg.norm(z) / np.linalg.norm(W),
        "gradients": np.linalg.norm(dL) / np.linalg.norm(g),
        "hessian_norm": np.linalg.norm(dL - g) / h,
    }
    found = {name: x[0] for name, x in record["cases"][case]["epochs"].items()}
    assert 0 < found.pop("share") < 10
    # Other programs for the same float32 formulas, of a network with rectifiers.
    assert found == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--label-noise", "1.5"]])
def test_bad_arguments_end_the_command(arguments, capsys):
    with pytest.raises(SystemExit):
        diagnose.main(arguments)
    assert arguments[0] in capsys.readouterr().err
