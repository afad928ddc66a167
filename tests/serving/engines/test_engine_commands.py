"""``tunewright serve --engine …`` with two trained adapters: the tests of a release, and tenants."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

import tunewright
from making.command_line import tiny_project, without_state
from making.command_line import tunewright as command
from tunewright.adapters.registry import list_adapters
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.open_project import OpenProject
from tunewright.serving.gateway.server import serving
from tunewright.serving.options import EngineOptions, ServeOptions
from tunewright.serving.releases import ReleaseGate
from tunewright.serving.serve import open_state

pytestmark = pytest.mark.slow

KINDS = [pytest.param("llamacpp", id="llamacpp"), pytest.param("vllm", id="vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def project(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that were trained with other seeds, long enough to be sure of their answers: engines fall on
    different sides of near ties.
    """
    folder = tiny_project(tmp_path_factory.mktemp("vllm") / "project", small_base, count=80)
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 12"))
    assert command("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert command("train", "-p", folder).code == 0
    config.write_text(config.read_text() + "seed: 1\n")
    assert command("train", "-p", folder).code == 0
    assert len(list_adapters(folder / "adapters")) == 2
    return folder


def test_release_is_tested_at_each_address(project: Path, tmp_path: Path) -> None:
    with ExitStack() as held:
        services = [tunewright.open(project).serve_engine(EngineOptions(port=0)) for _ in range(2)]
        for service in services:
            held.callback(service.engine.stop)
        urls = [held.enter_context(serving(service.app)) for service in services]
        gateway = without_state(project, tmp_path / "project")
        config = (gateway / "tunewright.yaml").read_text() + f"serve:\n  engines: {urls}\n"
        (gateway / "tunewright.yaml").unlink()  # a link
        (gateway / "tunewright.yaml").write_text(config)
        ran = command("serve", "--self-test", "--json", "-p", gateway)
        assert ran.code == 0, (ran.stdout, ran.stderr)
        assert (ran.document["verdict"], ran.document["engine"]) == ("isolated", "peft")
        assert all(f"{url}: isolated" in ran.stderr for url in urls)
        opened = OpenProject(ProjectFolder(gateway), LogReporter())
        adapter = list_adapters(project / "adapters")[0]
        with open_state(opened, make=True) as state:
            gate = ReleaseGate(opened, state, "red", adapter, None)
            test, passes = gate.require_isolation()
            check = gate.serving_check()
        assert (test.verdict, passes, test.adapters) == ("isolated", True, (adapter.digest,))
        assert ([figures.served for figures in check.figures], check.reasons) == (["adapter"], ())
        assert check.left_out is not None and "stored adapters only" in check.left_out


@pytest.mark.parametrize("kind", KINDS)
def test_serving_check_passes_for_a_trained_adapter(kind: Any, project: Path, tmp_path: Path) -> None:
    opened = OpenProject(ProjectFolder(without_state(project, tmp_path / "project")), LogReporter())
    adapter = list_adapters(project / "adapters")[0]
    with open_state(opened, make=True) as state:
        check = ReleaseGate(opened, state, "red", adapter, kind).serving_check()
    assert (check.engine, check.reasons) == (kind, ())
    served = [figures.served for figures in check.figures]
    if kind == "llamacpp":
        assert check.left_out is not None and "convert" in check.left_out
        assert served == ["adapter", "identity"]
    else:
        assert check.left_out is None
        assert served == ["adapter", "identity", "merged"]
    for figures in check.figures:
        assert figures.kl is not None
        assert figures.kl.value < 0.001
        assert figures.wrong.value == 0


@pytest.mark.parametrize("kind", KINDS)
def test_tenants_get_their_own_adapters_and_a_release_takes_effect_while_serving(
    kind: Any, project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    one, two = (adapter.name for adapter in list_adapters(folder / "adapters"))
    digests = {adapter.name: adapter.digest for adapter in list_adapters(folder / "adapters")}
    keys = {}
    for tenant, alias, adapter in (("acme", "red", one), ("globex", "blue", two)):
        _did("deploy", alias, adapter, "--force", "--because", "a test", "-p", folder)
        _did("tenant", "add", tenant, "--alias", alias, "-p", folder)
        keys[tenant] = _did("tenant", "key", "add", tenant, "-p", folder)["key"]
    opened = tunewright.open(folder)
    service = opened.serve(options=ServeOptions(port=0, engine=kind))
    with service.running() as url:
        acme, globex, nobody = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)
            for key in (keys["acme"], keys["globex"], "tw_0000000000_nothing")
        )
        with acme, globex, nobody:
            assert [model.id for model in acme.models.list()] == ["red"]
            assert [model.id for model in globex.models.list()] == ["blue"]
            assert (_asked(acme, "red")[0], _asked(globex, "blue")[0]) == (digests[one], digests[two])
            with pytest.raises(openai.NotFoundError) as forbidden:
                _asked(acme, "blue")
            with pytest.raises(openai.NotFoundError) as unknown:
                _asked(acme, "green")
            assert str(forbidden.value).replace("blue", "green") == str(unknown.value)
            with pytest.raises(openai.AuthenticationError):
                _asked(nobody, "red")

            of_two = _asked(globex, "blue")
            _did("deploy", "red", two, "--force", "--because", "a test", "-p", folder)
            until = time.monotonic() + 120
            while _asked(acme, "red")[0] != digests[two]:
                assert time.monotonic() < until
                time.sleep(0.2)
            assert _asked(acme, "red") == of_two, "the same adapter under another alias"


def _did(*arguments: str | Path) -> Any:
    ran = command(*arguments, "--json")
    assert ran.code == 0, (ran.stdout, ran.stderr)
    return ran.document


def _asked(client: openai.OpenAI, model: str) -> tuple[str, str]:
    """Return the answering adapter and its answer."""
    messages: Any = [{"role": "user", "content": "violet red teal 17"}]
    reply = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=12)
    return reply.headers["x-tunewright-adapter"], reply.parse().choices[0].message.content or ""
