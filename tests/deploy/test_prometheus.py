"""The dashboard's queries and the alerts, by a real Prometheus over a real server under load."""

import asyncio
import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import yaml
from dashboard_queries import DASHBOARD, numbers, panel_queries
from live_server import serving
from mixed_load import drive
from prometheus_client.parser import text_string_to_metric_families
from prometheus_process import ALERTS, Prometheus
from tiny_engine import tiny_engine

from kvarn.config import SpeculativeConfig
from kvarn.engine import AsyncLLM, EngineStats
from kvarn.server.metrics import EngineNumbers, exposition

QUERIES = list(panel_queries())
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@pytest.fixture(scope="module")
def prometheus():
    """A Prometheus that has seen a server at work."""
    guessing = SpeculativeConfig(k=4)
    engine = tiny_engine(backend="cpu", dtype="float16", max_num_seqs=4, num_blocks=256, speculative=guessing)
    llm = AsyncLLM(engine)
    with serving(llm, served_model_names=("served",)) as url:
        address = url.removeprefix("http://")
        with Prometheus(address) as running:
            running.wait_for_scrapes(2)
            drive(address, seconds=3)
            running.wait_for_scrapes(8)
            running.wait_for_rules()
            yield running
    asyncio.run(llm.close())


@needs_prometheus
@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel} {query.legend}".strip())
def test_a_panel_finds_its_numbers(prometheus, query):
    assert numbers(prometheus.query(query.runnable))


@needs_prometheus
def test_every_alert_evaluates(prometheus):
    rules = {rule["name"]: (rule["health"], rule.get("lastError")) for rule in prometheus.rules()}
    assert set(rules) == {rule["alert"] for rule in alerts()}
    assert set(rules.values()) == {("ok", None)}


@needs_prometheus
def test_a_query_that_is_wrong_is_told(prometheus):
    with pytest.raises(ValueError, match="parse error"):
        prometheus.query("sum(rate(kvarn:engine_steps_total))) by")


@needs_promtool
@pytest.mark.parametrize("arguments", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]])
def test_alerts_are_sound_and_fire_when_they_should(arguments):
    ended = subprocess.run(["promtool", *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def alerts():
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_every_alert_is_seen_to_fire():
    tests = ALERTS.with_name("alerts.test.yml").read_text()
    fired = set(re.findall(r'alertname="(\w+)"', tests))
    assert fired == {rule["alert"] for rule in alerts()}


def test_every_alert_says_what_to_do():
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_page_tells_every_alert():
    page = (ALERTS.parents[2] / "docs" / "deploy.md").read_text()
    told = dict(re.findall(r"^\| (Kvarn\w+) \| .* \| (\w+) \|$", page, re.MULTILINE))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in alerts()}


def test_only_metrics_that_there_are_are_asked_for():
    engine = EngineNumbers("any", EngineStats(accepted_by_position=(1,)))
    families = text_string_to_metric_families(exposition([engine]).decode())
    known = {sample.name for family in families for sample in family.samples}
    expressions = [query.expression for query in QUERIES] + [rule["expr"] for rule in alerts()]
    asked = {name for text in expressions for name in re.findall(r"kvarn:[a-z0-9_]+", text)}
    assert asked <= known


def test_panels_do_not_lie_on_one_another():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = sorted(
        (y, x) for p in panels for g in [p["gridPos"]]
        for y in range(g["y"], g["y"] + g["h"]) for x in range(g["x"], g["x"] + g["w"])
    )  # fmt: skip
    assert all(cell != following for cell, following in pairwise(taken))
    assert max(x for _, x in taken) < 24
