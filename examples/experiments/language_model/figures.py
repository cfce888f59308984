"""The picture of losses before and after quantization."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

MARKERS = {"float": "o", "4 bit, tensor": "v", "3 bit, tensor": "s"}


def plot(results: dict[str, dict[str, Any]], num_seeds: int) -> Figure:
    """Draw the losses with floats, 4 and 3 bits: a panel for each optimizer.

    The panels have axes of their own, but one scale, so that lengths compare.
    """
    figure = Figure(figsize=(1.4 + 1.6 * len(results), 4.4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (optimizer, methods) in zip(panels, results.items(), strict=True):
        for x, result in enumerate(methods.values()):
            losses = {name: result["bits_per_character"][name] for name in MARKERS}
            means = [y["mean"] for y in losses.values()]
            axes.plot([x, x], [min(means), max(means)], color=f"C{x}", alpha=0.4)
            for name, y in losses.items():
                style: Any = {"fmt": MARKERS[name], "color": f"C{x}"}
                style["markerfacecolor"] = f"C{x}" if name == "float" else "white"
                error = y["stderr"] or 0.0
                axes.errorbar(x, y["mean"], error, markersize=7, capsize=4, **style)
        axes.set_xticks(range(len(methods)), [*methods])
        axes.tick_params("x", rotation=35)
        axes.set(title=optimizer, xlim=(-0.6, len(methods) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    limits = [axes.get_ylim() for axes in panels]
    span = max(high - low for low, high in limits)
    for axes, (low, high) in zip(panels, limits, strict=True):
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    panels[0].set_ylabel("bits per character of the test text")
    handles = []
    for name, marker in MARKERS.items():
        style = {"marker": marker, "color": "gray", "ls": "", "label": name}
        style["markerfacecolor"] = "gray" if name == "float" else "white"
        handles.append(Line2D([], [], markersize=7, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    many = f"mean ± standard error, {num_seeds} seeds"
    seeds = "one seed" if num_seeds == 1 else many
    figure.suptitle(f"Transformer on Python's help topics, {seeds}")
    return figure
