"""The picture of losses before and after quantization."""

from typing import Any

from matplotlib.figure import Figure

ROUNDED = "4 bit, tensor"


def plot(results: dict[str, dict[str, Any]], num_seeds: int) -> Figure:
    """Draw, for each optimizer and gradient, the loss with floats and with 4 bits."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, methods in enumerate(results.values()):
        for j, (method, result) in enumerate(methods.items()):
            x = i + 0.22 * (j - 1)
            found = result["bits_per_character"]
            means = [found[name]["mean"] for name in ("float", ROUNDED)]
            axes.plot([x, x], means, color=f"C{j}", lw=1.5, alpha=0.6)
            for name, marker, face in (
                ("float", "o", f"C{j}"),
                (ROUNDED, "v", "white"),
            ):
                axes.errorbar(
                    x,
                    found[name]["mean"],
                    found[name]["stderr"] or 0.0,
                    fmt=marker,
                    color=f"C{j}",
                    markerfacecolor=face,
                    markersize=7,
                    capsize=3,
                    label=f"{method}, {name}" if i == 0 else None,
                )
    axes.set_xticks(range(len(results)), [*results])
    axes.set(ylabel="bits per character of the test text")
    axes.set_title(f"Transformer on Python's help topics, {num_seeds} seed(s)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=3)
    return figure
