"""Sweeps: each run against the ordinary one, what is compiled, kept and chosen."""

import dataclasses
import errno
import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.experiments.sweep import __main__ as sweep
from examples.experiments.sweep import grid, many_runs, search
from examples.experiments.sweep.grid import Grid, Run
from examples.experiments.sweep.many_runs import ManyRuns
from examples.experiments.sweep.search import Options
from examples.image_classification import __main__ as command
from examples.image_classification import config as configs
from examples.image_classification import input_pipeline, loop, train
from examples.image_classification.config import Config
from examples.image_classification.errors import RunError
from examples.image_classification.run import Options as RunOptions
from examples.image_classification.run import run
from examples.image_classification.stopping import Stopped
from examples.image_classification.train import Settings

EXAMPLES = Path(__file__).parents[4] / "examples"
CONFIG = Config(
    dataset="digits",
    augmentation="crop_flip",
    model="resnet8",
    label_noise=0.2,
    train_size=128,
    validation_size=60,
    batch_size=32,
    epochs=2,
    curvature_batches=1,
    bits=(4,),
)
GRID = Grid(
    h=(1.0, 3.0),
    gamma=(0.1, 0.5),
    learning_rate=(0.05,),
    weight_decay=(0.01,),
    strength=(0.0,),
    seeds=(0, 7),
)
ARGUMENTS = shlex.split(
    "digits --train-size 128 --validation-size 60 --batch-size 32 --epochs 1"
)


pytestmark = pytest.mark.usefixtures("small_network")
IN_A_HURRY = True
"""What is compiled here runs for some steps only."""


def options(out, **fields):
    return Options(**{"out": out, "quiet": True, **fields})


def as_read(record):
    """The record as JSON gives it back."""
    return json.loads(json.dumps(record))


def numbers(rows):
    """Rows by run, without how long they took and how they were run."""
    ignored = ("seconds", "together", "at_once")
    return {
        grid.run_of(row): {k: v for k, v in row.items() if k not in ignored}
        for row in rows
    }


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_run_of_a_sweep_is_the_ordinary_run_either_way(tmp_path):
    """In double precision; weights, order, crops and noise are those of the seed."""
    config = dataclasses.replace(CONFIG, epochs=1, accumulation=2)
    runs = [GRID.runs()[k] for k in (0, 3, 6)]
    turns = search.search(config, runs)
    fields = {"together": "vmap", "at_once": 2}  # the last chunk is filled up
    together = search.search(config, runs, Options(quiet=True, **fields))
    assert [row["at_once"] for row in turns] == [1] * 3
    assert [row["at_once"] for row in together] == [2] * 3
    one, two = numbers(turns), numbers(together)
    assert [*one] == [*two] == runs
    assert len({row["train_loss"] for row in turns}) == 3
    for key, row in one.items():
        assert row["accuracy_by_bits"] == two[key]["accuracy_by_bits"]
        for name in ("train_loss", "validation_loss"):
            # Eight steps of the same sums in double precision.
            np.testing.assert_allclose(row[name], two[key][name], rtol=1e-9)

    fields = runs[2].settings._asdict() | {"seed": runs[2].seed}
    ordinary = dataclasses.replace(config, **fields)
    expected = run(ordinary, RunOptions(out=tmp_path / "run", devices=1, quiet=True))
    row = one[runs[2]]
    assert row["accuracy_by_bits"] == expected["accuracy_by_bits"]
    np.testing.assert_allclose(
        [row["validation_loss"], row["train_loss"]],
        [expected["test_loss"], expected["epochs"][-1]["train_loss"]],
        rtol=1e-9,
    )


@pytest.fixture
def trained(monkeypatch):
    """The runs that would be trained; the more of everything, the better they are."""
    calls = []

    def train(_, runs, __):
        calls.extend(runs)
        sums = [sum(run.settings) / 100 + run.seed / 1000 for run in runs]
        return [many_runs.Result({"32": x, "4": x / 2}, 1.0, 1.0) for x in sums]

    monkeypatch.setattr(ManyRuns, "train", train)
    return calls


@pytest.mark.parametrize(
    ("method", "names"),
    [("first_order", ["h"]), ("grad_l1", ["strength"]), ("sgd", ["learning_rate"])],
)
def test_a_method_is_searched_in_its_own_settings(method, names, trained):
    config = dataclasses.replace(CONFIG, method=method)
    rates = (0.1, 0.2) if method == "sgd" else (0.1,)
    tried = Grid(
        h=(1.0, 3.0), gamma=(0.1, 0.2), strength=(0.1, 0.3), learning_rate=rates
    )
    rows = search.search(config, tried)
    assert [grid.run_of(row) for row in rows] == trained
    settings = {run.settings for run in trained}
    assert len(settings) == 2
    zero = Settings(0.0, 0.0, 0.1, 1e-4, 0.0)._asdict()
    for one in settings:
        one = one._asdict()
        assert [x for x in one if one[x] != zero[x]] in ([], names)


def test_certain_runs_are_trained_once_on_some_of_the_images(trained, monkeypatch):
    kept, sizes = [], []
    init = ManyRuns.__init__

    def noted(self, config, pipeline, size, together):
        sizes.append((pipeline.num_test, size))
        init(self, config, pipeline, size, together)

    monkeypatch.setattr(ManyRuns, "__init__", noted)
    config = dataclasses.replace(CONFIG, validation_size=None)
    first = search.search(config, GRID.runs()[:2])
    fields = {"together": "vmap", "at_once": 4}
    rows = search.search(
        config, GRID, Options(quiet=True, **fields), first, lambda x: kept.append([*x])
    )
    assert trained == [grid.run_of(row) for row in rows] == GRID.runs()
    assert [len(x) for x in kept] == [5, 8]  # six are missing: three and three
    assert sizes == [(12, 1), (12, 3)]  # a tenth of the training images
    assert search.search(config, GRID, rows=rows) == rows
    assert len(sizes) == 2


def test_an_h_that_follows_the_loss_begins_where_the_run_says():
    """H itself is an argument of the program, and with share = 0 it stays."""
    many = ManyRuns(CONFIG, search.load(CONFIG, Options())[1], 1, "one_by_one")
    settings = Settings(0.01, 0.0, 0.1, 1e-4, 0.0)
    ends = {}
    for share in (0.0, 0.3):
        run = grid.Run(settings._replace(share=share), 0)
        item, joined = many._item([run], 0), many._join([run.settings])
        state, outputs = many.step(many._start(item, joined), item, joined)
        assert outputs[-1] == np.float32(0.01)
        ends[share] = float(state.h)
    assert ends[0.0] == np.float32(0.01)
    assert ends[0.3] != ends[0.0]


def test_shares_are_searched_where_h_follows_the_loss():
    base, _, grid_, _ = sweep.parse(["cifar10_resnet20_first_order"])
    assert base.share == 0.3
    assert [(x.h, x.share) for x in grid_.of_method("first_order").settings()] == [
        (0.0, 0.15),  # SGD, once
        *((base.h, share) for share in (0.15, 0.3, 0.45, 0.6)),
    ]
    other = ["--perturbation", "adaptive", "--h", "0.01", "--share"]
    with pytest.raises(ValueError, match="share must be 0 with perturbation='adapt"):
        sweep.parse([*other, "0.3"])
    _, _, fixed, _ = sweep.parse(["cifar10_resnet20_first_order", *other, "0"])
    assert (fixed.h, fixed.share) == ((0.01,), (0.0,))
    with pytest.raises(ValueError, match=r"h must be at most 0\.01 with a share"):
        sweep.parse(["cifar10_resnet20_first_order", "--h", "0.04"])


def test_where_h_begins_is_no_end_of_the_grid():
    tried = Grid(h=(0.0, 0.001), gamma=(0.0,), share=(0.15, 0.3, 0.6))
    row = {"h": 0.001, "gamma": 0.0, "share": 0.3, "strength": 0.0}
    row |= {"learning_rate": 0.1, "weight_decay": 1e-4}
    assert grid.at_edge(tried, row) == {}
    assert grid.at_edge(tried, row | {"share": 0.6}) == {"share": "largest"}


@pytest.mark.slow
def test_the_penalty_of_grad_l1_has_the_strength_of_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, method="grad_l1", epochs=1)
    tried = dataclasses.replace(GRID, strength=(0.0, 0.05), seeds=(0,))
    rows = search.sweep(config, tried, options(tmp_path / "grad_l1"))["runs"]
    plain = dataclasses.replace(config, method="sgd")
    (sgd,) = search.sweep(plain, tried, options(tmp_path / "sgd"))["runs"]
    losses = [row["validation_loss"] for row in rows]
    # The same sums, but for the product times zero.
    np.testing.assert_allclose(losses[0], sgd["validation_loss"], rtol=1e-4)
    assert abs(losses[1] / losses[0] - 1.0) > 1e-3


@pytest.mark.slow
def test_nothing_is_traced_or_compiled_after_the_first_runs():
    events = []
    config = dataclasses.replace(CONFIG, epochs=1)
    many = ManyRuns(config, input_pipeline.create(config), 3, "vmap")
    runs = GRID.runs()
    chunks = [runs[k : k + many.size] for k in range(0, len(runs), many.size)]
    many.train(chunks[0], lambda _: None)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name)
    )
    try:
        for chunk in chunks[1:]:
            assert many_runs.Result() not in many.train(chunk, lambda _: None)
        during = [name for name in events if "trace" in name or "compile" in name]
        assert during == []
        jax.jit(lambda x: x + 1)(np.float32(0.0))
        assert len(events) > len(during)  # there would have been any
    finally:
        jax.monitoring.clear_event_listeners()
    assert many.step._cache_size() == many._start._cache_size() == 1


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_result(trained, tmp_path, monkeypatch):
    whole = search.sweep(CONFIG, GRID, options(tmp_path / "whole"))
    killed = options(tmp_path / "killed", together="vmap", at_once=3)
    path, train = tmp_path / "killed" / "sweep.json", ManyRuns.train
    trained.clear()

    def interrupted(*arguments):
        if len(trained) == 6:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ManyRuns, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search.sweep(CONFIG, GRID, killed)
    assert len(json.loads(path.read_text())["runs"]) == 6
    record = search.sweep(CONFIG, GRID, killed)
    assert trained == GRID.runs()
    assert numbers(record["runs"]) == numbers(whole["runs"])
    assert (record["settings"], record["best"]) == (whole["settings"], whole["best"])
    assert json.loads(path.read_text()) == as_read(record)

    again = search.sweep(CONFIG, GRID, killed)  # nothing is left to do
    assert as_read(again) == as_read(record)
    trained.clear()
    more = dataclasses.replace(GRID, h=(2.0, *GRID.h))
    assert len(search.sweep(CONFIG, more, killed)["settings"]) == 6
    assert {run.settings.h for run in trained} == {2.0}
    other = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(loop.RunError, match=r"another config \(epochs was 2, now 3\)"):
        search.sweep(other, GRID, killed)
    path.write_text(path.read_text().replace('"data": ', '"data": 1'))
    with pytest.raises(loop.RunError, match="the data are not those of"):
        search.sweep(CONFIG, GRID, killed)


@pytest.mark.usefixtures("trained")
def test_a_sweep_stops_between_runs(tmp_path):
    with pytest.raises(Stopped, match="stopped after 1 of 8 runs"):
        search.sweep(CONFIG, GRID, options(tmp_path, minutes=0.0))
    assert len(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == 1


@pytest.mark.slow
def test_runs_that_diverge_are_marked_and_never_win(tmp_path):
    """And leave the others of their program alone."""
    wild = dataclasses.replace(GRID, h=(1.0,), gamma=(1e30, 0.1))
    record = search.sweep(CONFIG, wild, options(tmp_path / "wild", together="vmap"))

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "wild" / "sweep.json").read_text()
    assert json.loads(text, parse_constant=refuse) == as_read(record)  # strict JSON
    bad, good = record["settings"]
    assert (bad["diverged"], bad["score"], bad["accuracy_by_bits"]) == (2, None, None)
    assert record["best"] == good
    assert good["gamma"] == 0.1
    assert record["runs"][0]["validation_loss"] is None
    assert (tmp_path / "wild" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    tame = dataclasses.replace(wild, gamma=(0.1,))
    alone = search.sweep(CONFIG, tame, options(tmp_path / "tame"))
    expected = numbers(alone["runs"])
    for row in record["runs"]:
        if row["gamma"] == 0.1:
            # Rounding in single precision through eight steps.
            loss = expected[grid.run_of(row)]["validation_loss"]
            np.testing.assert_allclose(row["validation_loss"], loss, rtol=1e-3)


@pytest.mark.slow
def test_a_run_whose_last_update_overflows_has_diverged():
    """All that its only step returns is of the weights before."""
    config = dataclasses.replace(CONFIG, train_size=32, epochs=1)
    many = ManyRuns(config, input_pipeline.create(config), 1, "one_by_one")
    losses = []
    settings = Settings(h=1.0, gamma=0.1, learning_rate=3e38, weight_decay=1e10)
    assert many.train([Run(settings, 0)], losses.extend) == [many_runs.Result()]
    assert np.isfinite(losses).all()
    assert len(losses) == 1


def test_a_sweep_of_which_all_diverges_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ManyRuns, "train", lambda _, runs, __: [many_runs.Result()] * len(runs)
    )
    arguments = [*ARGUMENTS, "--h", "1", "--gamma", "1e30", "--seeds", "0"]
    assert sweep.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "every setting diverged" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] is None
    assert (tmp_path / "sweep.png").exists()


def rows_of(accuracies, h):
    """Rows of a setting from (full, 4 bit) of seeds 0 and 7."""
    settings = Settings(h, 0.1, 0.1, 1e-4)._asdict()
    return [
        settings
        | {
            "seed": seed,
            "accuracy_by_bits": x and dict(zip(("32", "4"), x, strict=True)),
        }
        for seed, x in zip((0, 7), accuracies, strict=True)
    ]


def test_the_best_setting_has_the_highest_mean_over_precisions_and_seeds():
    rows = [
        *rows_of([(0.9, 0.9), (0.8, 0.6)], h=1.0),  # 0.8
        *rows_of([(0.99, 0.4), (0.99, 0.5)], h=2.0),  # better in full, worse in both
        *rows_of([(1.0, 1.0), None], h=3.0),  # one of the seeds diverged
        *rows_of([(1.0, 1.0), (1.0, 1.0)], h=4.0)[:1],  # not finished
    ]
    tried = Grid(h=(1.0, 2.0, 3.0, 4.0), gamma=(0.1,), strength=(0.0,), seeds=(0, 7))
    summaries = grid.summarize(tried, rows)
    assert [x["h"] for x in summaries] == [1.0, 2.0, 3.0]
    assert [x["diverged"] for x in summaries] == [0, 0, 1]
    best = grid.best(summaries)
    assert best["h"] == 1.0
    assert best["accuracy_by_bits"]["4"]["mean"] == pytest.approx(0.75)
    # Of 0.9 and 0.7, by hand: deviation 0.1414, by the root of two.
    assert best["score"] == pytest.approx({"mean": 0.8, "standard_error": 0.1})
    one = grid.summarize(dataclasses.replace(tried, seeds=(0,)), rows)
    assert one[0]["score"] == {"mean": 0.9, "standard_error": None}


def summary_of(score, **settings):
    score = None if score is None else {"mean": score, "standard_error": None}
    zero = Settings(0.0, 0.0, 0.1, 1e-4)._asdict()
    accuracy = score and {"32": score, "4": score}
    return zero | settings | {"score": score, "accuracy_by_bits": accuracy}


def test_values_at_the_ends_of_the_grid_are_flagged():
    """But for zero, which nothing lies below, what has one value, gamma of no h."""
    tried = Grid(h=(2.0, 0.0, 1.0), gamma=(0.1, 0.5, 1.0), learning_rate=(0.2, 0.1))
    for settings, expected in (
        ({"h": 1.0, "gamma": 0.5, "learning_rate": 0.1}, {"learning_rate": "smallest"}),
        ({"h": 2.0, "gamma": 0.5, "learning_rate": 0.2}, {}),
        ({"h": 0.0, "gamma": 0.1, "learning_rate": 0.2}, {}),
        ({"h": 1.0, "gamma": 0.1, "learning_rate": 0.2}, {"gamma": "smallest"}),
        ({"h": 1.0, "gamma": 1.0, "learning_rate": 0.2}, {"gamma": "largest"}),
    ):
        if settings["learning_rate"] == 0.2:
            expected = expected | {"learning_rate": "largest"}
        if settings["h"] == 2.0:
            expected = expected | {"h": "largest"}
        assert grid.at_edge(tried, summary_of(0.5, **settings)) == expected


@pytest.mark.parametrize("method", ["hero", "first_order", "grad_l1"])
def test_the_default_grid_has_a_row_of_sgd_and_one_without_penalty(method):
    tried = Grid().of_method(method)
    settings = tried.settings()
    assert len({*settings}) == len(settings)
    name = grid.OF_METHOD[method][0]
    (plain,) = (x for x in settings if not getattr(x, name))
    assert plain == Settings(0.0, 0.0, 0.1, 1e-4)
    if method == "hero":
        assert len(settings) == (len(tried.h) - 1) * len(tried.gamma) + 1
        assert {x.h for x in settings if not x.gamma} == {*tried.h}
    rows = [summary_of(0.6, **x._asdict()) for x in settings]
    rows[settings.index(plain)] = summary_of(0.3, **plain._asdict())
    assert grid.plain(method, rows)["score"]["mean"] == 0.3
    assert grid.plain("sgd", rows) is None


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_row_of_sgd_is_sgd(tmp_path):
    """With h = 0 one gamma stands for all; in double precision."""
    config = dataclasses.replace(CONFIG, epochs=1)
    tried = dataclasses.replace(GRID, h=(0.0, 1.0), gamma=(0.5, 0.0), seeds=(0,))
    record = search.sweep(config, tried, options(tmp_path / "hero"))
    found = {(x["h"], x["gamma"]): x for x in record["runs"]}
    assert sorted(found) == [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5)]
    assert (tmp_path / "hero" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = {}
    for method, h in (("sgd", 0.0), ("first_order", 1.0)):
        other = dataclasses.replace(config, method=method)
        given = dataclasses.replace(tried, h=(h,), gamma=(0.0,))
        (rows[h],) = search.sweep(other, given, options(tmp_path / method))["runs"]
        # The same sums, but for the product times zero.
        for name in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(found[h, 0.0][name], rows[h][name], rtol=1e-9)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("hero", "hero, perturbation adaptive, reduction mean: h 3, gamma 0.1, with"),
        ("first_order", "first_order, perturbation adaptive: h 3, with"),
        ("grad_l1", "grad_l1: strength 0.1, with"),
    ],
)
def test_the_best_setting_is_told_with_all_that_it_depends_on(
    method, told, tmp_path, capsys, trained
):
    text = "--perturbation adaptive --reduction mean --h 0 1 3 --gamma 0 0.1 --seeds 0"
    arguments = [*ARGUMENTS, "--method", method, *text.split(), "--strength", "0"]
    assert sweep.main([*arguments, "0.1", "--out", str(tmp_path)]) == 0
    assert trained
    lines = capsys.readouterr().out.splitlines()
    lines = lines[next(k for k, x in enumerate(lines) if x.startswith("best of")) :]
    assert lines[0].startswith(f"best of {told}")
    assert lines[1] == "SGD reaches 0.1 %."
    record = json.loads((tmp_path / "sweep.json").read_text())
    searched = [name for name in grid.OF_METHOD[method] if name != "share"]
    assert record["at_edge"] == dict.fromkeys(searched, "largest")
    for line, name in zip(lines[2:], searched, strict=False):
        best = record["best"][name]
        assert line.startswith(f"{name} {best:g} is the largest that was tried: ")


@pytest.mark.usefixtures("trained")
def test_no_room_for_the_picture_does_not_matter(tmp_path, capsys, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "sweep.png")

    monkeypatch.setattr(search.heat_maps, "plot", no_room)
    arguments = [*ARGUMENTS, "--h", "1", "--gamma", "0.1", "--out", str(tmp_path)]
    assert sweep.main(arguments) == 0
    printed = capsys.readouterr()
    assert "picture is not written: [Errno 28] No space left" in printed.err
    assert printed.out.splitlines()[-1].startswith("python -m examples")


@pytest.mark.parametrize("damaged", ["{}", '{"runs": 1}', '{"runs": [1]}'])
def test_a_damaged_record_is_named(damaged, tmp_path):
    (tmp_path / "config.toml").write_text(configs.dumps(CONFIG))
    (tmp_path / "sweep.json").write_text(damaged)
    with pytest.raises(RunError, match=r"sweep.json is damaged .*: delete it"):
        search.sweep(CONFIG, GRID, options(tmp_path))


def test_test_images_are_not_used(tmp_path):
    """Others in their place change nothing of what is trained on and tested on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(80) % 10
    arrays = {"x_train": images, "y_train": labels}
    arrays |= {"x_test": images[:20], "y_test": labels[:20]}
    others = {"x_test": images[50:59] // 2, "y_test": 0 * labels[:9]}
    seen = []
    for content in (arrays, arrays | others):
        np.savez(tmp_path / "data.npz", **content)
        config = dataclasses.replace(CONFIG, train_size=None, validation_size=None)
        where = Options(dataset_path=str(tmp_path / "data.npz"))
        config, pipeline = search.load(config, where)
        assert (config.validation_size, pipeline.num_test) == (8, 8)
        seen.append([next(pipeline.epoch(0)), *pipeline.test_items()])
        seen[-1].append(np.array(pipeline.facts.mean))
    jax.tree.map(np.testing.assert_array_equal, *seen)


@pytest.mark.usefixtures("trained")
def test_the_command_names_the_best_run_on_all_images(tmp_path, capsys, monkeypatch):
    text = "--label-noise 0 --no-synchronized-batch-norm --h 1 3 --gamma 0.2"
    rates = ["--learning-rate", "0.02", "0.1", "--weight-decay", "1e-3"]
    arguments = [*ARGUMENTS, *text.split(), *rates, "--seeds", "1", "--bits", "4"]
    arguments += ["--dataset-path", "digits", "--reduction", "mean"]
    monkeypatch.chdir(tmp_path)
    assert sweep.main(arguments) == 0
    record = json.loads(Path("runs/digits/sweep/sweep.json").read_text())
    assert len(record["runs"]) == 4
    lines = capsys.readouterr().out.splitlines()
    titles = [title.strip() for title in lines[0].split("|")[1:-1]]
    assert titles == ["h", "gamma", "learning_rate", "float", "4 bit", "mean"]
    last = shlex.split(lines[-1])
    assert last[:3] == ["python", "-m", "examples.image_classification"]
    config, final = command.parse(last[3:])
    digits, _ = command.parse(["digits"])
    assert final.dataset_path == "digits"
    setting = "h_3_gamma_0.2_learning_rate_0.1"
    assert final.out == Path("runs/digits/sweep") / setting
    assert config == dataclasses.replace(
        digits,
        train_size=128,
        batch_size=32,
        epochs=1,
        label_noise=0.0,
        reduction="mean",
        synchronized_batch_norm=False,
        h=3.0,
        gamma=0.2,
        learning_rate=0.1,
        weight_decay=1e-3,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--h", "1", "-2"], "h must be at least 0, got -2.0."),
        (["--gamma", "1", "1"], "gamma must be one or more values that differ, got"),
        (["--seeds"], "seeds must be one or more values that differ, got ()"),
        (["--at-once", "0"], "at_once must be at least 1, got 0."),
    ],
)
def test_bad_grids_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["digits", *arguments])
    assert message in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--augmentation", "resized_crop"], 1, "augmentation must be 'none' or 'crop"),
        (["--learning-rate", "inf"], 2, "learning_rate must be a finite number, got"),
        (["--out", "/dev/null/x"], 1, "out must be a folder that can be written to"),
        (["--validation-size", "1000"], 1, "validation_size must be at most 999"),
        (["--penalty-layers", "Conv9"], 1, "penalty_layers must be found in the path"),
        (["--model", "vgg19_bn"], 1, "vgg19_bn does not fit the data: images"),
    ],
)
def test_errors_are_one_line(arguments, status, message, tmp_path, capsys, monkeypatch):
    if "--model" in arguments:
        monkeypatch.setattr(many_runs, "make_model", train.make_model)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert sweep.main(["digits", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_guide_shows_the_best_setting_of_the_sweep_on_digits():
    record = json.loads((EXAMPLES / "results/sweep_digits/sweep.json").read_text())
    guide = " ".join((EXAMPLES.parent / "docs/training.md").read_text().split())
    best = record["best"]
    assert best == grid.best(record["settings"])
    assert f"h = {best['h']:g}, gamma = {best['gamma']:g}" in guide
    for value in (*best["accuracy_by_bits"].values(), best["score"]):
        assert grid.percent(value) in guide
    told = record["environment"]["command"]  # before the folders were moved
    told = told.replace("image_classification.sweep", "experiments.sweep")
    assert told in guide


def test_adamw_has_the_learning_rates_of_the_grid():
    words = ["digits", "--optimizer", "adamw"]
    _, config, tried, _ = sweep.parse([*words, "--learning-rate", "0.001", "0.003"])
    assert config.optimizer == "adamw"
    assert tried.learning_rate == (0.001, 0.003)
    with pytest.raises(ValueError, match=r"learning_rate must be at most 0\.02"):
        sweep.parse(words)
