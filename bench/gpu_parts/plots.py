"""Plots of the curves that were measured, one PNG each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvarn import figures

MIB = 1 << 20
Points = Sequence[dict[str, Any]]
COLOURS = ("#1f5fa8", "#d1662a", "#7a7a7a", "#3a8f5c", "#8a5aa8")
MARKERS = "osD^v"


def draw(curves: dict[str, list[dict[str, Any]]], folder: Path, machine: str) -> list[Path]:
    """Writes a plot for each kind of curve there is; returns the files."""
    drawn = []
    for name, plot in (("attention_prefill", _attention), ("decode", _decode), ("streams", _streams)):
        if points := curves.get(name):
            path = folder / f"{name.replace('_prefill', '')}.png"
            figures.save(plot(points, machine), path)
            drawn.append(path)
    return drawn


def _named(points: Points, key: str) -> list[str]:
    """The names in the order they came."""
    return list(dict.fromkeys(point[key] for point in points))


def _logarithmic(panel: Any, places: Sequence[int]) -> None:
    """Both axes, the x axis with a tick at each place, in plain numbers."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted(set(places))
    panel.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    panel.grid(alpha=0.25)


def _by_model(points: Points, draw: Callable[[Any, Points], None], size: tuple[float, float], title: str) -> Any:
    """A panel for each model, with its points drawn. size: of a panel, in inches."""
    models = _named(points, "model")
    figure, panels = figures.pyplot().subplots(1, len(models), figsize=(size[0] * len(models), size[1]), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        panel.set_title(model, fontsize=9)
        draw(panel, [point for point in points if point["model"] == model])
    return _titled(figure, title)


def _titled(figure: Any, title: str) -> Any:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def _attention(points: Points, machine: str) -> Any:
    """Time and memory over N, both logarithmic: a slope of 2 is N²."""
    with_memory = any(point["peak_bytes"] for point in points)
    figure, panels = figures.pyplot().subplots(1, 2 if with_memory else 1, figsize=(9, 3.8), squeeze=False)
    quantities = [("seconds", 1e3, "ms"), ("peak_bytes", 1 / MIB, "MiB beyond the inputs")]
    for panel, (key, scale, label) in zip(panels[0], quantities, strict=False):
        for number, way in enumerate(_named(points, "way")):
            own = [point for point in points if point["way"] == way and point[key]]
            panel.plot([p["tokens"] for p in own], [p[key] * scale for p in own], color=COLOURS[number],
                       marker=MARKERS[number], markersize=4, label=way, zorder=9 - number)  # fmt: skip
        _logarithmic(panel, [point["tokens"] for point in points])
        panel.set_xlabel("tokens of the prompt (N)")
        panel.set_ylabel(label)
    panels[0][0].legend(frameon=False)
    return _titled(figure, f"Attention of a prompt over its length, {machine}")


def _decode(points: Points, machine: str) -> Any:
    """Tokens a second by batch, a panel for each model; hollow and dashed without graphs, dotted: the card's limit."""
    figure = _by_model(points, _draw_decode, (4.6, 3.9), f"Decode, {machine}")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def _draw_decode(panel: Any, points: Points) -> None:
    for weights, colour in zip(_named(points, "weights"), COLOURS, strict=False):
        for graphs in (True, False):
            own = [point for point in points if (point["weights"], point["graphs"]) == (weights, graphs)]
            if own:
                panel.plot(
                    [p["batch"] for p in own], [p["batch"] / p["seconds"] for p in own], color=colour, marker="o",
                    markersize=4, markerfacecolor=colour if graphs else "white", linestyle="-" if graphs else "--",
                    label=weights + ("" if graphs else ", no graphs"),
                )  # fmt: skip
    first = points[0]["weights"]
    roof = [point for point in points if point["weights"] == first and point["graphs"]]
    panel.plot([p["batch"] for p in roof], [p["batch"] / p["floor_seconds"] for p in roof], color="black",
               linestyle=":", label=f"limit of the card, {first}")  # fmt: skip
    _logarithmic(panel, [point["batch"] for point in points])
    panel.set_xlabel("sequences in a step")
    panel.set_ylabel("tokens a second")


def _streams(points: Points, machine: str) -> Any:
    """Tokens a second of each engine, as bars in order."""
    return _by_model(points, _draw_streams, (4.8, 2.6), f"Throughput on the same weights, {machine}")


def _draw_streams(panel: Any, points: Points) -> None:
    names, rates = [point["engine"] for point in points], [point["rate"] for point in points]
    colours = [COLOURS[0] if name.startswith("kvarn") else COLOURS[2] for name in names]
    bars = panel.barh(names, rates, color=colours)
    panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.3)
    panel.set_title(f"{points[0]['model']}, {points[0]['count']} streams", fontsize=9)
    panel.set_xlabel("tokens a second")
