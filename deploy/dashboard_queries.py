"""The queries of the dashboard, and the alerts, as Prometheus is to evaluate them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "kvarn.json"
VARIABLES = {"$model": ".*", "$instance": ".*", "$__rate_interval": "30s"}
"""What Grafana would put in place of its variables."""


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of a panel."""

    row: str
    panel: str
    legend: str
    expression: str

    @property
    def runnable(self) -> str:
        """The expression without Grafana's variables. Raises ValueError for one that is not known."""
        text = self.expression
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        if "$" in text:
            raise ValueError(f"unknown variable in {self.expression!r}")
        return text


def panel_queries(dashboard: Path = DASHBOARD) -> Iterator[PanelQuery]:
    """Those of a Grafana dashboard, in its order."""
    row = ""
    for panel in json.loads(dashboard.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        for target in panel.get("targets", ()):
            legend = target["legendFormat"].removeprefix("__auto")
            yield PanelQuery(row, panel["title"], legend, target["expr"])


def numbers(series: Sequence[dict[str, Any]]) -> list[float]:
    """The values of an instant vector that are numbers: a quantile of nothing is none."""
    values = [float(one["value"][1]) for one in series]
    return [value for value in values if math.isfinite(value)]
