"""The generated reference: nothing is missing from it, and every example in it is valid."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import reference
import reference_cli
import reference_config
import reference_documents
import reference_http
import reference_python
import typer
from pydantic import BaseModel
from reference_sources import COMMANDS, DOCUMENTS, GROUPS, MODULES, OPTIONS, ROUTES, Config

from tunewright.advisor.signals import Signals

ENTRIES = reference_cli.entries()
KEYS = reference_config.keys()


def test_committed_pages_are_those_of_the_code() -> None:
    pages = reference.pages()
    stored = {path: (reference.DOCS / path).read_text(encoding="utf-8") for path in pages}
    stale = [path for path, text in pages.items() if text != stored[path]]
    assert not stale, "Run `make reference`."
    panels = {f"reference/cli/{file.name}" for file in (reference.DOCS / "reference" / "cli").iterdir()}
    assert panels == {path for path in pages if path.startswith("reference/cli/")}


@pytest.mark.slow
def test_order_of_commands_does_not_depend_on_the_order_of_imports() -> None:
    modules = ", ".join(f"tunewright.cli.{name}" for name in MODULES[::-1])
    code = f"import {modules}, reference_cli\nfor each in reference_cli.entries(): print(each.name)"
    folder = Path(reference_cli.__file__).parent
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == [each.name for each in ENTRIES]


def test_reference_documents_every_command() -> None:
    """Typer's own help of a group is the independent list of its commands."""
    from typer.testing import CliRunner

    from tunewright.cli import commands

    runner, app = CliRunner(), commands()
    documented = {entry.name for entry in ENTRIES}
    page = "\n".join(reference_cli.pages().values())
    seen = set()
    for group in ["", *(name for name in COMMANDS.commands if hasattr(COMMANDS.commands[name], "commands"))]:
        shown = runner.invoke(app, [*group.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
        for name in re.findall(r"^│ ([a-z][a-z-]+) ", shown, re.MULTILINE):
            full = f"{group} {name}".strip()
            seen.add(full)
            below = any(each.startswith(f"{full} ") for each in documented)
            assert full in documented or below, full
            assert below or f"## `tunewright {full}`" in page, full
    assert {"train", "data add", "tenant list"} <= seen


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_command_example_names_its_command_and_valid_options(entry: reference_cli.Entry) -> None:
    known = {name for p in entry.command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for example in entry.examples:
        words = reference_cli.words(example)
        assert words[: len(entry.name.split())] == entry.name.split(), example
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known, example


def test_python_page_describes_every_field_of_an_options_class() -> None:
    (page,) = reference_python.pages().values()
    for field in (each for options in OPTIONS for each in dataclasses.fields(options) if each.name != "mapping"):
        assert f"| `{field.name}` | " in page, field.name
    assert "| `presidio` | spaCy model that also finds names and places. | patterns only |" in page


def test_python_page_has_every_verb_of_a_project_by_the_name_that_is_called() -> None:
    (page,) = reference_python.pages().values()
    for group, of in GROUPS.items():
        for name, each in reference_python.methods(of):
            if not isinstance(each, property) and "deprecated" not in (each.__doc__ or "").lower():
                assert f"### `{group}.{name}()`\n" in page, name
    assert 'open(root: str | Path = ".", reporter: Reporter | None = None) -> Project' in page.replace("'", '"')
    assert "- `evaluation`: number, ID, folder or evidence file (None: the newest)." in page


def test_stability_page_names_everything_that_is_marked_as_experimental() -> None:
    page = (reference.DOCS / "reference" / "stability.md").read_text(encoding="utf-8")
    part = page.partition("## Experimental")[2].partition("## ")[0]
    marked = {each.name for each in ENTRIES if "Experimental" in each.help} | {
        reference_cli.names(each).strip("`")
        for entry in ENTRIES
        for each in entry.command.params
        if "Experimental" in (each.help or "")
    }
    marked |= {key.name for key in KEYS if "Experimental" in key.meaning}
    named = {name.removeprefix("deploy ") for name in re.findall(r"`([^`]+)`", part.partition("| --- |")[2])} - {"sft"}
    assert named == marked


def test_stability_page_has_the_schemas_that_are_read() -> None:
    page = (reference.DOCS / "reference" / "stability.md").read_text(encoding="utf-8")
    models: dict[str, type[BaseModel]] = {
        "evidence": DOCUMENTS["evidence"][0],
        "advice-ID": DOCUMENTS["advice"][0],
        "advice/ID": Signals,
    }
    for name, model in models.items():
        (row,) = re.findall(rf"^\| `\S*{name}\S*` \| (\d) \| (.*) \|$", page, re.MULTILINE)
        field = model.model_fields["schema_version"]
        assert [row[0], *map(int, re.findall(r"\d", row[1]))] == [str(field.default), *get_args(field.annotation)]


def test_reference_describes_every_config_key() -> None:
    (page,) = reference_config.pages().values()
    for key in KEYS:
        assert key.meaning, key.name
        assert f"### `{key.name}`" in page


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_config_example_is_valid_and_sets_its_key(key: reference_config.Key) -> None:
    Config.model_validate(reference_config.plain(key.example))
    value: object = key.example
    for part in key.path:
        if isinstance(value, dict):
            assert part in value, key.name
            value = value[part]
    assert value not in (None, "", [], {}), key.name


def test_examples_name_existing_keys_only() -> None:
    assert set(reference_config.EXAMPLES) <= {key.name for key in KEYS}


def test_config_source_is_split_from_the_meaning() -> None:
    rate = next(key for key in KEYS if key.name == "train.learning_rate")
    assert rate.source.startswith("QLoRA, Dettmers et al. 2023")
    assert "Dettmers" not in rate.meaning


def test_http_page_lists_every_route_and_the_refusal_of_an_unknown_field() -> None:
    (page,) = reference_http.pages().values()
    for route in ROUTES:
        assert f"`{route}`" in page
    assert '"code": "unsupported_parameter"' in page
    assert "| `unknown_route` | 404, 405 | {http.method}" in page


def test_http_page_pairs_each_error_code_with_its_own_message() -> None:
    errors = {code: (status, message) for code, status, message in reference_http.refusals()}
    assert errors["body_timeout"][0] == "408" and " s" in errors["body_timeout"][1]
    assert errors["body_too_large"][0] == "413" and "bytes" in errors["body_too_large"][1]
    assert errors["queue_timeout"][0] == "503"
    assert errors["invalid_api_key"][0] == "401" and errors["rate_limit_exceeded"][0] == "429"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_published_schema_is_a_valid_json_schema(name: str) -> None:
    model, _place = DOCUMENTS[name]
    jsonschema.Draft202012Validator.check_schema(reference_documents.schema(model))


def test_config_schema_accepts_the_file_that_init_writes(tmp_path: Path) -> None:
    import yaml
    from typer.testing import CliRunner

    from tunewright.cli import commands

    app: typer.Typer = commands()
    assert CliRunner().invoke(app, ["init", str(tmp_path / "p"), "--example", "legal-citations"]).exit_code == 0
    written = yaml.safe_load((tmp_path / "p" / "tunewright.yaml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in written.items() if value is not None}
    jsonschema.validate(sections, reference_documents.schema(Config))
