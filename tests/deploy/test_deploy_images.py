"""The Containerfile: what it starts, installs and opens exists, and it keeps no rights and no secrets."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version

import pytest

from making.command_line import parsed
from making.deploy_files import DEPLOY, ROOT, ran, require_route, require_server, stages, tool

pytestmark = pytest.mark.slow  # needs what `make test` does not install

IMAGES = ("trainer-cpu", "trainer-cuda", "gateway", "vllm-cpu", "vllm-cuda")
SERVERS = ("gateway", "vllm-cpu", "vllm-cuda")
STAGES = stages()
TEXT = (DEPLOY / "Containerfile").read_text()


def _last(stage: str, instruction: str) -> str:
    return [rest for name, rest in STAGES[stage] if name == instruction][-1]


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_as_a_numbered_user_without_rights(image: str) -> None:
    assert STAGES[image][-1] == ("USER", "10001:10001")


@pytest.mark.parametrize("image", IMAGES)
def test_image_starts_a_command_that_exists(image: str) -> None:
    entry = json.loads(_last(image, "ENTRYPOINT"))
    assert entry == ["tini", "--", "vllm-entrypoint" if image.startswith("vllm") else "tunewright"]
    assert parsed(["tunewright", *json.loads(_last(image, "CMD"))]) in {("serve",), ("train",)}


@pytest.mark.parametrize("image", SERVERS)
def test_server_image_opens_the_ports_that_it_serves_on_and_asks_for_readiness(image: str) -> None:
    ports = require_server(json.loads(_last(image, "CMD")))
    assert tuple(_last(image, "EXPOSE").split()) == ports
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", _last(image, "HEALTHCHECK"))[0]
    assert port == ports[0]
    require_route(path)


@pytest.mark.parametrize("image", IMAGES)
def test_image_copies_only_environments_and_no_build_tools_of_python(image: str) -> None:
    own = [rest for name, rest in STAGES[image] if name == "COPY"]
    copied = [rest.split()[-1] for rest in own]
    assert copied == [
        *(
            ["/usr/local/bin/vllm-entrypoint", "/opt/tunewright", "/opt/vllm"]
            if "vllm" in image
            else ["/opt/tunewright"]
        )
    ]
    assert not any("pip install" in rest for name, rest in STAGES[image] if name == "RUN")


def test_extras_that_images_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lists = re.findall(r"\.whl\)\[([\w,-]+)\]", TEXT)
    assert len(lists) == 5
    for extras in lists:
        assert set(extras.split(",")) <= project.keys()


def test_pins_are_those_that_the_tests_ran_with() -> None:
    assert re.findall(r"^ARG TORCH=(\S+)$", TEXT, re.M) == [version("torch").partition("+")[0]]
    (base,) = re.findall(r"^ARG EXAMPLE_BASE=(\S+)$", TEXT, re.M)
    assert base in (ROOT / "Makefile").read_text()
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert re.findall(r"\bbuild==\S+", TEXT)[0] in constraints
    (image,) = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.M)
    assert re.fullmatch(r"[\w./-]+:3\.11\.\d+-slim-trixie", image)


def test_engine_is_installed_by_commands_that_exist() -> None:
    scripts = (TEXT, (DEPLOY / "vllm-entrypoint.sh").read_text())
    commands = [line for text in scripts for line in re.findall(r"tunewright engine install [^\\&>\n]+", text)]
    assert len(commands) == 3
    for command in commands:
        assert parsed(command.replace('"$VLLM_BUILD"', "cuda")) == ("engine", "install")


def test_no_image_has_a_secret_in_an_argument_or_a_variable() -> None:
    for stage in STAGES.values():
        for name, rest in stage:
            if name in {"ARG", "ENV"}:
                assert not re.search(r"(?i)password|token|secret|key", rest), rest


def test_containerfile_passes_hadolint() -> None:
    ran(tool("hadolint"), DEPLOY / "Containerfile")


def test_entrypoint_passes_shellcheck() -> None:
    ran(tool("shellcheck"), DEPLOY / "vllm-entrypoint.sh")
