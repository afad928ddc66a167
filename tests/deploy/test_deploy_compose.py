"""compose.yaml: its commands, targets, files and metrics exist, and its secrets come from outside."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from making.deploy_files import (
    DASHBOARD,
    DEPLOY,
    TOOLS,
    metric_labels,
    ran,
    require_metrics,
    require_server,
    stages,
    tool,
)

pytestmark = pytest.mark.slow  # needs what `make test` does not install

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NEEDED = {"TUNEWRIGHT_DB_PASSWORD": "one", "GRAFANA_PASSWORD": "two", "TUNEWRIGHT_PROJECT": str(DEPLOY)}


@pytest.mark.parametrize("name", ["gateway", "vllm"])
def test_server_listens_on_the_ports_that_are_published_and_scraped(name: str) -> None:
    port, metrics = require_server(SERVICES[name]["command"])
    assert [each.rpartition(":")[2] for each in SERVICES[name]["ports"]] == [port]
    scraped = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())["scrape_configs"][0]
    (found,) = scraped["dns_sd_configs"]
    assert name in found["names"]
    assert str(found["port"]) == metrics


@pytest.mark.parametrize("name", SERVICES)
def test_built_service_names_a_target_of_the_containerfile(name: str) -> None:
    if (built := SERVICES[name].get("build")) is None:
        pytest.skip("its image is another project's")
    assert built["target"] in stages()
    assert SERVICES[name]["image"] == f"tunewright-{built['target']}"


def test_mounted_files_exist() -> None:
    sources = [
        volume.partition(":")[0] for each in SERVICES.values() for volume in each["volumes"] if isinstance(volume, str)
    ]
    local = [source for source in sources if source.startswith(".")]
    assert len(local) == 4
    assert all((DEPLOY / source).exists() for source in local)


def test_server_database_is_the_one_that_starts() -> None:
    made = SERVICES["postgres"]["environment"]
    url = f"--database-url=postgresql://{made['POSTGRES_USER']}@postgres/{made['POSTGRES_DB']}"
    assert url in SERVICES["gateway"]["command"]
    assert url in SERVICES["vllm"]["command"]
    assert SERVICES["gateway"]["environment"]["PGPASSWORD"] == made["POSTGRES_PASSWORD"]


def test_secret_comes_from_the_environment() -> None:
    named = [(name, value) for each in SERVICES.values() for name, value in each.get("environment", {}).items()]
    secret = [value for name, value in named if any(word in name for word in ("PASSWORD", "TOKEN", "SECRET", "KEY"))]
    assert len(secret) == 11
    assert all(value.startswith("${") for value in secret)


def test_compose_file_matches_the_schema_of_compose() -> None:
    schema = TOOLS / "compose-spec.json"
    if not schema.exists():
        pytest.skip("the schema is not installed: `make build/deploy/.installed` has it")
    rules = json.loads(schema.read_text())
    rules["properties"]["name"] = {"type": "string"}  # the specification's, and newer than this copy of the schema
    jsonschema.Draft201909Validator(rules).validate(COMPOSE)


def test_docker_compose_reads_it_and_names_what_is_not_set() -> None:
    command = [tool("docker-compose"), "-f", str(DEPLOY / "compose.yaml"), "--profile", "*", "config", "--quiet"]
    plain = {name: value for name, value in os.environ.items() if name not in NEEDED}
    assert subprocess.run(command, env={**plain, **NEEDED}, check=False).returncode == 0
    for name in NEEDED:
        given = {other: value for other, value in NEEDED.items() if other != name}
        done = subprocess.run(command, env={**plain, **given}, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert name in done.stderr


def test_git_ignores_the_file_of_passwords() -> None:
    assert "/deploy/.env" in (DEPLOY.parent / ".gitignore").read_text().splitlines()


BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
RULES = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())["groups"][0]["rules"]


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
