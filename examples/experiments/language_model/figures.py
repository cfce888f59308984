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
            found = [result["bits_per_character"][name] for name in MARKERS]
            means = [y["mean"] for y in found]
            axes.plot([x, x], [min(means), max(means)], color=f"C{x}", alpha=0.4)
            for y, (name, marker) in zip(found, MARKERS.items(), strict=True):
                axes.errorbar(
                    x,
                    y["mean"],
                    y["stderr"] or 0.0,
                    fmt=marker,
                    color=f"C{x}",
                    markerfacecolor=f"C{x}" if name == "float" else "white",
                    markersize=7,
                    capsize=4,
                )
        axes.set_xticks(range(len(methods)), [*methods])
        axes.tick_params("x", rotation=35)
        axes.set(title=optimizer, xlim=(-0.6, len(methods) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    limits = [axes.get_ylim() for axes in panels]
    span = max(high - low for low, high in limits)
    for axes, (low, high) in zip(panels, limits, strict=True):
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    panels[0].set_ylabel("bits per character of the test text")
    handles = [
        Line2D(
            *([], []),
            marker=marker,
            color="gray",
            ls="",
            markersize=7,
            markerfacecolor="gray" if name == "float" else "white",
            label=name,
        )
        for name, marker in MARKERS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    seeds = (
        "one seed" if num_seeds == 1 else f"mean ± standard error, {num_seeds} seeds"
    )
    figure.suptitle(f"Transformer on Python's help topics, {seeds}")
    return figure
