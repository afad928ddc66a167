"""The Helm chart: rendered, valid for Kubernetes, with probes, ports, options and metrics that the server has."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from making.command_line import parsed
from making.deploy_files import DEPLOY, documents, options, ran, require_metrics, require_route, require_server, tool

pytestmark = pytest.mark.slow  # needs what `make test` does not install

CHART = DEPLOY / "chart"
EVERYTHING = (
    "training.enabled=true",
    "training.processes=2",
    "shell.enabled=true",
    "dashboard.enabled=true",
    "tracing.endpoint=http://collector:4318",
    "hub.tokenSecret.name=hub",
    "server.engine=vllm",
    "server.port=8080",
)
RAY = ("training.enabled=true", "training.ray.enabled=true", "hub.tokenSecret.name=hub")
KUBERNETES = ("1.30", "1.37")
RAY_JOB = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
"""Those fields of KubeRay's RayJobSpec (v1.7) that the chart sets."""


def _rendered(*values: str) -> list[dict[str, Any]]:
    given = [part for value in values for part in ("--set", value)]
    return documents(ran(tool("helm"), "template", "release", CHART, *given))


def _of(kind: str, rendered: list[dict[str, Any]], ending: str = "") -> dict[str, Any]:
    (found,) = [each for each in rendered if each["kind"] == kind and each["metadata"]["name"].endswith(ending)]
    return found


def _pods(rendered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    own = [each["spec"]["template"]["spec"] for each in rendered if each["kind"] in {"Deployment", "Job"}]
    clusters = [each["spec"]["rayClusterSpec"] for each in rendered if each["kind"] == "RayJob"]
    return own + [group["template"]["spec"] for cluster in clusters for group in _groups(cluster)]


def _groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The head of a Ray cluster, and its workers."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_helm_lint_accepts_the_chart() -> None:
    ran(tool("helm"), "lint", "--strict", CHART)


@pytest.mark.parametrize("kind", ["none", "hpa"])
def test_rendered_chart_is_valid_for_kubernetes(tmp_path: Path, kind: str) -> None:
    validate = tool("kubernetes-validate")
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(_rendered(*EVERYTHING, f"autoscaling.kind={kind}")))
    for version in KUBERNETES:
        ran(validate, "--strict", "--quiet", "-k", version, file)


@pytest.mark.parametrize("values", [(), EVERYTHING], ids=["defaults", "everything"])
def test_server_has_options_ports_and_probes_that_the_software_has(values: tuple[str, ...]) -> None:
    rendered = _rendered(*values)
    deployment = _of("Deployment", rendered, "-server")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = require_server(server["args"])
    assert {each["name"]: str(each["containerPort"]) for each in server["ports"]} == dict(
        zip(("http", "metrics"), ports, strict=True)
    )
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ports[1]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        require_route(server[probe]["httpGet"]["path"])
        assert server[probe]["httpGet"]["port"] == "http"
    assert server["startupProbe"]["httpGet"]["path"] == "/health"
    assert server["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_server_has_time_to_drain() -> None:
    from tunewright.config import GatewayConfig

    spec = _of("Deployment", _rendered(), "-server")["spec"]["template"]["spec"]
    delay = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > delay + GatewayConfig().drain_timeout_s + 5


def test_every_pod_runs_without_rights_on_a_root_that_it_cannot_write() -> None:
    pods = _pods(_rendered(*EVERYTHING)) + _pods(_rendered(*RAY))
    assert len(pods) == 6
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_passwords_are_references_and_the_url_has_none() -> None:
    rendered = _rendered(*EVERYTHING) + _rendered(*RAY)
    assert not [each for each in rendered if each["kind"] == "Secret"]
    for pod in _pods(rendered):
        for variable in pod["containers"][0]["env"]:
            if re.search("PASSWORD|TOKEN", variable["name"]):
                assert set(variable["valueFrom"]) == {"secretKeyRef"}
                assert "value" not in variable


def test_selectors_match_their_pods_and_only_them() -> None:
    rendered = _rendered(*EVERYTHING)
    labels = {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"][
            "metadata"
        ]["labels"]
        for each in rendered
        if each["kind"] in {"Deployment", "Job"}
    }
    server = _of("Service", rendered)["spec"]["selector"]
    budget = _of("PodDisruptionBudget", rendered)["spec"]["selector"]["matchLabels"]
    policy = _of("NetworkPolicy", rendered, "-server")["spec"]["podSelector"]["matchLabels"]
    for selector in (server, budget, policy):
        matched = [name for name, of in labels.items() if selector.items() <= of.items()]
        assert matched == ["server"]
    work = _of("NetworkPolicy", rendered, "-work")["spec"]["podSelector"]
    assert work["matchExpressions"][0]["values"] == ["training", "shell"]
    assert set(labels) == {"server", "training", "shell"}


def test_metrics_are_open_to_the_named_peers_only() -> None:
    for peers, allowed in ((None, [["monitoring"]]), ("networkPolicy.monitoring=null", [])):
        rendered = _rendered(*([] if peers is None else [peers]))
        rules = _of("NetworkPolicy", rendered, "-server")["spec"]["ingress"]
        assert all(rule["from"] for rule in rules)
        metrics = [rule["from"] for rule in rules if rule["ports"][0]["port"] == "metrics"]
        names = [
            [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in each]
            for each in metrics
        ]
        assert names == allowed


@pytest.mark.parametrize(
    ("processes", "start"), [(1, ["tunewright"]), (2, ["tunewright.training.launch", "tunewright"])]
)
def test_training_starts_train_and_stops_after_bad_input(processes: int, start: list[str]) -> None:
    job = _of("Job", _rendered("training.enabled=true", f"training.processes={processes}"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = container.get("command", ["tini", "--", "tunewright"])
    modules = [module for flag, module in pairwise(command) if flag in ("-m", "--")]
    assert [module for module in modules if module != "python"] == start
    assert all(find_spec(module) for module in start)
    assert parsed([command[-1], *container["args"]]) == ("train",)
    ignored, failed = job["spec"]["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3, 4]}


def test_ray_job_trains_on_several_machines_with_a_token() -> None:
    """Fields as the reference of KubeRay's API has them: its schema is not installed here."""
    rendered = _rendered(*RAY, "training.ray.workers=3")
    assert not [each for each in rendered if each["kind"] == "Job"]
    job = _of("RayJob", rendered)
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert set(spec) <= RAY_JOB
    assert parsed(spec["entrypoint"]) == ("train",)
    assert options(spec["entrypoint"].split())["--cluster"] == "auto"
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token", "secretName": "tunewright-ray"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) <= {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    for each in _groups(cluster):
        (container,) = each["template"]["spec"]["containers"]
        project = [mount for mount in container["volumeMounts"] if mount["name"] == "project"]
        assert project == [{"name": "project", "mountPath": "/project", "subPath": ""}]
        assert each["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "ray"


def test_only_ray_and_its_operator_reach_ray() -> None:
    rendered = _rendered(*RAY)
    policy = _of("NetworkPolicy", rendered, "-ray")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    for group in _groups(_of("RayJob", rendered)["spec"]["rayClusterSpec"]):
        assert labels.items() <= group["template"]["metadata"]["labels"].items()
    among, operator = policy["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert operator["from"]


def test_ray_version_is_that_of_the_extra() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    version = _of("RayJob", _rendered(*RAY))["spec"]["rayClusterSpec"]["rayVersion"]
    assert project["ray"] == [f"ray[client]=={version}"]


def test_autoscalers_ask_for_metrics_that_exist() -> None:
    hpa = _of("HorizontalPodAutoscaler", _rendered("autoscaling.kind=hpa"))
    assert require_metrics(hpa["spec"]["metrics"][0]["pods"]["metric"]["name"]) == 1
    keda = _rendered("autoscaling.kind=keda")
    triggers = _of("ScaledObject", keda)["spec"]["triggers"]
    assert [require_metrics(trigger["metadata"]["query"]) for trigger in triggers] == [1, 1]
    assert "replicas" not in _of("Deployment", keda, "-server")["spec"]


def test_environment_variables_are_read_by_the_software() -> None:
    source = "".join(path.read_text() for path in (DEPLOY.parent / "src" / "tunewright").rglob("*.py"))
    libraries = {"PGPASSWORD", "HF_TOKEN", "OTEL_RESOURCE_ATTRIBUTES", "RAY_USAGE_STATS_ENABLED"}
    """Read by libpq, huggingface_hub, OpenTelemetry's SDK and Ray."""
    for pod in _pods(_rendered(*EVERYTHING)) + _pods(_rendered(*RAY)):
        for variable in pod["containers"][0]["env"]:
            assert variable["name"] in libraries or f'"{variable["name"]}"' in source


def test_unknown_value_is_refused() -> None:
    helm = tool("helm")
    for wrong in ("server.replica=3", "server.engine=tgi", "autoscaling.kind=both"):
        done = subprocess.run(
            [helm, "template", "release", str(CHART), "--set", wrong], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0, wrong
        assert "values don't meet the specifications" in done.stderr
