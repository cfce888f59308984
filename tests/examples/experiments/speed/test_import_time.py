"""What an import costs is found and added up."""

from examples.experiments.speed import import_time
from examples.experiments.speed.import_time import Cost


def test_costs_add_up_by_package_but_for_ones_own():
    costs = [Cost("scipy.optimize", 1.0), Cost("hero_jax.quant", 2.0)]
    costs += [Cost("scipy", 4.0), Cost("hero_jax", 0.5)]
    assert import_time.by_package(costs) == [
        Cost("scipy", 5.0),
        Cost("hero_jax.quant", 2.0),
        Cost("hero_jax", 0.5),
    ]


def test_only_what_comes_in_addition_counts(monkeypatch):
    monkeypatch.setattr(import_time, "BASE", "import json")
    monkeypatch.setattr(import_time, "OWN", "import json.decoder, wave")
    names = [cost.name for cost in import_time.added()]
    assert "wave" in names
    assert not any(name.startswith("json") for name in names)


def test_slow_import_is_slower(monkeypatch, capsys):
    monkeypatch.setattr(import_time, "BASE", "import time; time.sleep(0.1)")
    monkeypatch.setattr(import_time, "OWN", "import time; time.sleep(0.3)")
    assert import_time.main(["--rounds", "3"]) > 2
    assert "time.sleep(0.3)`" in capsys.readouterr().out
