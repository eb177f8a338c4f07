"""Every query of the Grafana dashboard and every alert, evaluated by a real Prometheus over a real server under load.

    python deploy/check_queries.py                                    starts `kvarn serve`, prints the table
    python deploy/check_queries.py --out docs/dashboard-queries.md    writes it
    python deploy/check_queries.py --server 127.0.0.1:8000            a server that runs already

Needs `prometheus` (Debian: apt-get install prometheus). Ends with 1 where a query is refused or says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dashboard_queries import PanelQuery, numbers, panel_queries
from mixed_load import drive
from prometheus_process import Prometheus

SCRAPES = 8
SHOWN_SERIES = 3
COMMON_LABELS = {"__name__", "instance", "job", "model_name"}
INTRO = """\
# What the dashboard asks, and what came out

Made by `{command}`: every query of `deploy/grafana/kvarn.json` and every alert of
`deploy/prometheus/alerts.yml`, evaluated by {prometheus} while `{serve}` had
{clients} clients that stream, ask for schemas, leave, and send what must be refused. Grafana's variables stand for
all models and instances, its rate interval for 30 s. The values show that a query finds its series; they are no
measurement of speed.
"""


@contextlib.contextmanager
def served(command: Sequence[str]) -> Iterator[str]:
    """A server that this command starts, as host:port; ended at the end."""
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"http://(\S+)", line)
            if found:
                yield found[1]
                return
        raise RuntimeError(f"{' '.join(command)} ended before it was ready")
    finally:
        process.terminate()
        process.wait(30)


def value_of(series: Sequence[dict[str, Any]]) -> str:
    """An instant vector in a cell of a table: the largest values, with the labels that tell them apart."""
    found = sorted((one for one in series if numbers([one])), key=lambda one: -numbers([one])[0])
    shown = []
    for one in found[:SHOWN_SERIES]:
        labels = [value for name, value in one["metric"].items() if name not in COMMON_LABELS]
        shown.append(" ".join([*labels, f"{numbers([one])[0]:.4g}"]))
    if len(found) > SHOWN_SERIES:
        shown.append(f"… ({len(found)} series)")
    return ", ".join(shown) or "nothing"


def table(prometheus: Prometheus, queries: Sequence[PanelQuery]) -> tuple[list[str], int]:
    """The lines of the table, and the number of queries that are wrong or find no number."""
    lines, wrong, row = [], 0, None
    for query in queries:
        if query.row != row:
            row = query.row
            lines += ["", f"## {row}", "", "| panel | query | value |", "|---|---|---|"]
        try:
            series = prometheus.query(query.runnable)
            value, fails = value_of(series), not numbers(series)
        except ValueError as error:
            value, fails = f"**refused: {error}**", True
        wrong += fails
        name = f"{query.panel}: {query.legend}" if query.legend and "{{" not in query.legend else query.panel
        expression = query.expression.replace("|", "\\|")
        lines.append(f"| {name} | `{expression}` | {value} |")
    return lines, wrong


def alert_table(prometheus: Prometheus) -> tuple[list[str], int]:
    """The same of the alerts."""
    prometheus.wait_for_rules()
    lines, wrong = ["", "## Alerts", "", "| alert | expression | evaluated | state |", "|---|---|---|---|"], 0
    for rule in prometheus.rules():
        expression = " ".join(rule["query"].split()).replace("|", "\\|")
        lines.append(f"| {rule['name']} | `{expression}` | {rule['health']} | {rule['state']} |")
        wrong += rule["health"] != "ok"
    return lines, wrong


def check(address: str, seconds: float, clients: int) -> tuple[list[str], int]:
    """Loads the server at host:port, then asks. Returns the tables' lines and how many entries of them are wrong."""
    with Prometheus(address) as prometheus:
        prometheus.wait_for_scrapes(2)  # a counter's rate begins with the first value that was scraped
        drive(address, seconds, clients)
        prometheus.wait_for_scrapes(SCRAPES)
        panels, wrong = table(prometheus, list(panel_queries()))
        alerts, more = alert_table(prometheus)
    return panels + alerts, wrong + more


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what to serve")
    parser.add_argument("--server", help="host:port of one that runs, instead of starting one")
    parser.add_argument("--seconds", type=float, default=20, help="of load")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, help="Markdown file to write; default: print")
    options = parser.parse_args()
    arguments = ["serve", options.model, "--speculative", "method=ngram,k=4"]
    start = served([sys.executable, "-m", "kvarn", *arguments])
    with contextlib.nullcontext(options.server) if options.server else start as address:
        lines, wrong = check(address, options.seconds, options.clients)
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    said = (version.stdout or version.stderr).split(" (branch")[0].replace("prometheus, version", "Prometheus")
    intro = INTRO.format(
        command=f"python deploy/check_queries.py --out {options.out}" if options.out else "deploy/check_queries.py",
        prometheus=said,
        serve=options.server or "kvarn " + " ".join([*arguments[:1], Path(options.model).name, *arguments[2:]]),
        clients=options.clients,
    )
    text = intro + "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    if wrong:
        sys.exit(f"{wrong} of the queries and alerts are wrong or say nothing")


if __name__ == "__main__":
    main()
