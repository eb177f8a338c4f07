"""Figures as PNG files: what all plots of the commands share. matplotlib is imported when a plot is asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError

DPI = 140


def check(path: Path) -> None:
    """Raises ConfigError where no plot could be written to `path`: before the work, not after it."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot must name a .png file, not {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.absolute().parent}")
    pyplot()


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in the project's style. Raises ConfigError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'kvarn[plots]'") from None
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def svg(figure: Any) -> str:
    """A pyplot figure as an <svg> element for a page; the figure stays open."""
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvarn"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]


def save(figure: Any, path: Path) -> None:
    """Writes a pyplot figure and closes it. Raises ConfigError where the file cannot be written."""
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error.strerror}") from error
    finally:
        pyplot().close(figure)
