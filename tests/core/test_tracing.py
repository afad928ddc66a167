"""The standard variables of OpenTelemetry, and what happens without its packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from making.otlp_collector import collector, traced
from tunewright.core import tracing
from tunewright.core.errors import UserError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_nothing_is_traced_or_imported_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert tracing.start() is None
    with tracing.span("work") as span:
        span.set({"rows": 1})
        assert tracing.headers() == tracing.ids() == {}
    assert tracing.endpoint() is None
    code = (
        "import sys; from tunewright.cli import commands; from typer.testing import CliRunner; "
        "CliRunner().invoke(commands(), ['config', 'schema']); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), (ENDPOINT, "")]
)
def test_variable_turns_traces_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    assert not tracing.wanted()
    assert tracing.start() is None
    assert tracing.endpoint() is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
    ],
)
def test_unsupported_exporter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=value) as refused:
        tracing.start()
    assert refused.value.where == variable


def test_service_name_and_attributes_come_from_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "legal")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with traced(monkeypatch) as found, tracing.span("work"):
        assert tracing.endpoint() == f"{found.url}/v1/traces"
    resource = found.one("work").resource
    assert resource["service.name"] == "legal"
    assert resource["deployment.environment.name"] == "test"


def test_endpoint_of_traces_is_taken_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{found.url}/custom")
        tracing.start()
        with tracing.span("work"):
            assert tracing.endpoint() == f"{found.url}/custom"
        tracing.stop()
    assert found.routes == ["/custom"]


def test_missing_packages_are_a_warning_and_the_command_works(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.startswith('opentelemetry'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    variables = {**os.environ, "PYTHONPATH": path, ENDPOINT: "http://127.0.0.1:1"}
    command = [sys.executable, "-m", "tunewright", "init", str(tmp_path / "project")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip install 'tunewright[otel]'") == 1
