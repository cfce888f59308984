"""Pictures: what is on the axes is what the numbers say."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import curvature, landscape, plot

figure = pytest.importorskip("matplotlib.figure")

X, Y = np.linspace(-1.0, 2.0, 31), np.linspace(-2.0, 2.0, 41)
BOWL = 5.0 + X[:, None] ** 2 + Y[None, :] ** 2 / 4
"""Lowest at (0, 0), which is not the middle; wider along the second direction."""


@pytest.fixture
def ax():
    return figure.Figure().subplots()


def test_a_line_begins_at_zero_where_the_weights_are(ax):
    drawn = plot.line(jnp.asarray(X), jnp.asarray(5.0 + 3.0 * X), ax, label="net")
    assert drawn is ax
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xdata(), X, rtol=1e-6)
    np.testing.assert_allclose(line.get_ydata(), 3.0 * X, atol=1e-5)
    assert line.get_label() == "net"
    assert ax.get_xlabel() == "step along d (multiples of d)"
    assert ax.get_ylabel() == "loss above that of W"


def test_a_surface_has_its_red_line_where_the_loss_is_higher_by_so_much(ax):
    assert plot.surface((X, Y), BOWL, ax, increase=0.25) is ax
    filled, red = ax.collections
    (ring,) = (p.vertices for p in red.get_paths())
    # an ellipse: half axes 0.5 along the first direction, 1 along the second
    np.testing.assert_allclose((2.0 * ring[:, 0]) ** 2 + ring[:, 1] ** 2, 1, atol=0.02)
    np.testing.assert_allclose(np.abs(ring).max(0), [0.5, 1.0], atol=0.01)
    assert [*filled.levels[:5]] == [0.03125, 0.0625, 0.125, 0.25, 0.5]
    (cross,) = ax.lines
    assert cross.get_xydata().tolist() == [[0.0, 0.0]]
    assert ax.get_xlabel() == "step along d (multiples of d)"
    assert ax.get_ylabel() == "step along e (multiples of e)"
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "loss above that of W"


def test_surfaces_may_share_levels_and_one_bar(ax):
    plot.surface((X, Y), BOWL, ax, increase=None, levels=[1, 2], colorbar=False)
    (filled,) = ax.collections
    assert [*filled.levels] == [1, 2]
    assert ax.figure.axes == [ax]


def test_points_that_are_not_finite_are_left_white(ax):
    losses = BOWL.copy()
    losses[-1, -1] = np.inf
    losses[-1, 0] = np.nan
    plot.surface((X, Y), losses, ax)
    ax.figure.canvas.draw()
    assert len(ax.collections) == 2


def test_the_weights_must_be_on_the_grid(ax):
    with pytest.raises(ValueError, match="coordinates must have 0 among them"):
        plot.line(X + 0.05, BOWL[:, 0], ax)
    with pytest.raises(ValueError, match="coordinates must have 0 among them"):
        plot.surface((X, Y + 0.05), BOWL, ax)


def test_a_spectrum_has_the_mass_of_the_eigenvalues_where_they_are(ax):
    eigenvalues = jnp.repeat(jnp.array([0.0, 1.0, 4.0]), jnp.array([5, 4, 1]))
    loss_fn = lambda w: jnp.sum(eigenvalues * w**2) / 2
    W = jnp.ones(10)
    density = curvature.spectral_density(loss_fn, W, num_samples=50, steps=3)
    top = curvature.top_eigenvalues(loss_fn, W)
    assert plot.spectrum(density, top.values, ax, color="C3") is ax
    curve, dotted = ax.lines
    x, y = curve.get_data()
    assert curve.get_color() == "C3"
    for value, share in ((0.0, 0.5), (1.0, 0.4), (4.0, 0.1)):
        near = np.abs(x - value) < 0.2
        at = np.average(x[near], weights=y[near])
        np.testing.assert_allclose(at, value, atol=0.01)
        mass = np.trapezoid(y[near], x[near])
        np.testing.assert_allclose(mass, share, atol=0.1)  # 50 probes
    np.testing.assert_allclose(np.trapezoid(y, x), 1.0, rtol=1e-3)
    np.testing.assert_allclose(dotted.get_xdata(), 4.0, rtol=1e-5)
    (filled,) = ax.collections  # to the bottom, where nobody looks
    assert filled.get_paths()[0].vertices[:, 1].min() < 1e-6 * ax.get_ylim()[0]
    low, high = ax.get_ylim()
    assert 0.0 < low < 0.03 * y[near].max()  # the single eigenvalue is in view
    assert high > y.max()
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "share of eigenvalues per unit"


def test_one_eigenvalue_alone_can_be_drawn(ax):
    density = curvature.SpectralDensity(jnp.full((2, 1), 3.0), jnp.ones((2, 1)))
    x, y = plot.spectrum(density, ax=ax).lines[0].get_data()
    np.testing.assert_allclose(x[np.argmax(y)], 3.0, atol=0.01)


def test_results_of_loss_surface_are_drawn_in_one_call_on_a_figure_of_their_own():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    loss_fn = lambda w: jnp.sum(w**2)
    d = jnp.array([1.0, 0.0])
    losses = landscape.loss_surface(loss_fn, d, [d], [X])
    first, second = (plot.line(X, losses) for _ in range(2))
    assert first.figure is not second.figure
    np.testing.assert_allclose(first.lines[0].get_ydata(), (1 + X) ** 2 - 1, atol=1e-5)
    pyplot.close(first.figure)
    pyplot.close(second.figure)


def test_without_matplotlib_the_error_says_what_to_install():
    message = 'hero_jax.plot needs matplotlib: pip install "hero_jax[plot]".'
    program = (
        "import sys, hero_jax\n"
        "sys.modules['matplotlib'] = None\n"
        "try: hero_jax.plot.line([0.0, 1.0], [0.0, 1.0])\n"
        f"except ImportError as error: sys.exit(str(error) != {message!r})\n"
        "sys.exit('drawn')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
