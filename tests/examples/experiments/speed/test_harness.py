"""Records of what measures speed."""

import json

from examples.experiments.speed import harness


def test_records_have_an_origin(tmp_path, capsys):
    path = tmp_path / "record.json"
    record = harness.report([["a", "b"], ["1", "2"]], path, rows=[3])
    assert "| 1 | 2 |" in capsys.readouterr().out
    assert json.loads(path.read_text()) == record
    assert record["rows"] == [3]
    assert record["environment"]["jax"]
