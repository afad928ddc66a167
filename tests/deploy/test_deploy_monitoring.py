"""Dashboard and alerts: every metric and label that they ask for is on the server's page of metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from deploy_files import DASHBOARD, DEPLOY, metric_labels, ran, require_metrics, tool

pytestmark = pytest.mark.slow  # needs what `make test` does not install

BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
RULES = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())["groups"][0]["rules"]
_NOT_SHOWN = {"tunewright_ready"}


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_asks_for_metrics_and_labels_that_exist(query: str) -> None:
    assert require_metrics(query) >= 1


def test_dashboard_shows_every_metric_of_the_server() -> None:
    for name in metric_labels():
        if name.startswith("tunewright_") and not name.endswith(("_sum", "_count")):
            assert any(name in query for query in QUERIES), name


def test_dashboard_variables_are_labels_of_their_metric() -> None:
    asked = [each["definition"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    for each in asked:
        metric, label = each.removeprefix("label_values(").removesuffix(")").split(", ")
        assert label in metric_labels()[metric]
    assert len(asked) == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_asks_for_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert require_metrics(rule["expr"]) >= 1 or rule["expr"].startswith("up{")


def test_promtool_reads_rules_and_config() -> None:
    promtool = tool("promtool")
    ran(promtool, "check", "rules", DEPLOY / "monitoring" / "rules.yml")
    ran(promtool, "check", "config", "--syntax-only", DEPLOY / "monitoring" / "prometheus.yml")
