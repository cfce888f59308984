"""The benchmark of the convolutions, on small layers."""

import numpy as np
import pytest

from examples.experiments.speed import convolution
from hero_jax.models import conv_general_dilated


def test_functions_are_what_they_say():
    """A 1x1 kernel k of one channel: y = k x, so dx = k and dk is the sum of x."""
    timed = convolution.programs((1, 4, 1, 1, 1, 1, 1), conv_general_dilated)
    results = {name: np.asarray(run()) for name, (run, _) in timed.items()}
    for name, result in results.items():
        alone = results[name.removesuffix(", in a loop")]
        np.testing.assert_allclose(result, alone, rtol=1e-5)
    k = results["input gradient"][0, 0, 0, 0]
    np.testing.assert_allclose(results["input gradient"], np.full((1, 4, 4, 1), k))
    x = results["output"] / k
    np.testing.assert_allclose(results["weight gradient"].ravel(), [x.sum()], rtol=1e-5)


@pytest.mark.slow
def test_table(monkeypatch, capsys):
    monkeypatch.setattr(convolution, "LAYERS", {"tiny": (2, 8, 3, 4, 3, 2, 1)})
    convolution.main(["--rounds=1"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| tiny")]
    assert [line.split("|")[2].strip() for line in lines] == [
        what + where
        for what in ("output", "input gradient", "weight gradient")
        for where in ("", ", in a loop")
    ]


def test_unknown_layers_are_named(capsys):
    with pytest.raises(SystemExit):
        convolution.main(["--layer=transformer"])
    assert "invalid choice: 'transformer'" in capsys.readouterr().err
