"""`Prometheus`: the real one, from its package, on the loopback interface for as long as it is needed."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

ALERTS = Path(__file__).parent / "prometheus" / "alerts.yml"
CONFIG = """\
global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: kvarn
    static_configs: [{{targets: ["{target}"]}}]
"""
PATIENCE = 30.0
"""Seconds after which what no healthy machine needs is a failure."""


class Prometheus:
    """Scrapes one server twice a second and evaluates `ALERTS`. A context manager; its data goes with it."""

    def __init__(self, target: str) -> None:
        """target: host:port of the server. Raises FileNotFoundError where Prometheus is not installed."""
        self._target = target
        self._folder = TemporaryDirectory(prefix="kvarn-prometheus-")
        self.url = f"http://127.0.0.1:{_free_port()}"
        folder = Path(self._folder.name)
        config = folder / "prometheus.yml"
        config.write_text(CONFIG.format(rules=ALERTS, target=target))
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn",
                ],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self._wait(self._is_ready, "does not start")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._folder.cleanup()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression now: `metric` (labels) and `value` ([time, text]) of each series.

        Raises ValueError with Prometheus' words for an expression that is wrong.
        """
        found: list[dict[str, Any]] = self._get("/api/v1/query", query=expression)["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The alerts, each with `name`, `health` (ok once it was evaluated), `lastError` and `state`."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def wait_for_scrapes(self, number: int) -> None:
        """Returns when the server has been scraped so many times."""
        expression = 'count_over_time(up{job="kvarn"}[1h])'
        self._wait(lambda: any(float(s["value"][1]) >= number for s in self.query(expression)), "does not scrape")

    def wait_for_rules(self) -> None:
        """Returns when every alert has been evaluated."""
        self._wait(lambda: all(rule["health"] != "unknown" for rule in self.rules()), "does not evaluate its rules")

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"Prometheus ended: {self._log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=PATIENCE):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error).get("error", str(error))) from None

    def _wait(self, condition: Any, complaint: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Prometheus {complaint}: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
