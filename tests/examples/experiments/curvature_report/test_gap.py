"""The generalization gap of a metrics file."""

import math
import statistics
from pathlib import Path

import pytest

from examples.experiments.curvature_report.gap import generalization_gap

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [(0.5, 0.5), (0.75, 0.5), (1.0, 0.5), (1.0, 0.625)]
    lines = [f"{i},{a},{b}" for i, (a, b) in enumerate(rows, 1)]
    path.write_text("\n".join(["epoch,train_accuracy,test_accuracy", *lines]) + "\n")
    return path


def test_gap_of_the_last_epochs(metrics):
    gap = generalization_gap(metrics, last=2)
    assert gap.by_epoch == [0.0, 0.25, 0.5, 0.375]
    assert gap.mean == 0.4375
    assert gap.deviation == statistics.stdev([0.5, 0.375])
    assert generalization_gap(metrics).mean == 0.28125  # 50 or fewer
    assert math.isnan(generalization_gap(metrics, last=1).deviation)


def test_other_columns(metrics):
    gap = generalization_gap(metrics, last=1, train="epoch")
    assert gap.mean == 4 - 0.625


def test_label_noise_is_that_of_a_test_set_with_the_same_noise(metrics):
    # 40 % redrawn over 4 classes: a right answer stays right with 0.6 + 0.1, and a
    # wrong one becomes right with 0.1.
    gap = generalization_gap(metrics, 1, label_noise=0.4, num_classes=4)
    expected = 1.0 - (0.625 * 0.7 + 0.375 * 0.1)
    assert math.isclose(gap.mean, expected)
    with pytest.raises(ValueError, match="needs accuracies as fractions"):
        generalization_gap(metrics, label_noise=0.4, test="epoch")
    with pytest.raises(ValueError, match=r"label_noise must be 0 to 1, got 1\.5"):
        generalization_gap(metrics, label_noise=1.5)


def test_files_that_are_not_metrics(metrics, tmp_path):
    with pytest.raises(ValueError, match=r"no column 'loss'; it has \['epoch'"):
        generalization_gap(metrics, train="loss")
    with pytest.raises(ValueError, match="last must be at least 1, got 0"):
        generalization_gap(metrics, last=0)
    with pytest.raises(OSError, match="nowhere"):
        generalization_gap(tmp_path / "nowhere.csv")
    metrics.write_text("train_accuracy,test_accuracy\n0.5,0.5\n0.5,\n")
    with pytest.raises(ValueError, match=r"line 3 of .* test_accuracy=''"):
        generalization_gap(metrics)
    metrics.write_text("train_accuracy,test_accuracy\n")
    with pytest.raises(ValueError, match="has no rows"):
        generalization_gap(metrics)
    metrics.write_text("")
    with pytest.raises(ValueError, match="has no column"):
        generalization_gap(metrics)
