"""Commands, options, messages and files that docs/ mentions exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
import yaml
from messages import own_words

from tunewright.cli import commands
from tunewright.config import Config

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?[)\s]")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    name: {each.alias or key for key, each in fields.items()}
    for name, field in Config.model_fields.items()
    if (fields := getattr(field.annotation, "model_fields", None)) is not None
}


@cache
def _command_line() -> Any:
    return typer.main.get_command(commands())


def _shown_commands(page: str) -> Iterator[str]:
    """Yield every command of tunewright in a page's shell blocks and code spans."""
    for language, block in FENCE.findall(page):
        if language in ("sh", "bash"):
            yield from re.findall(r"^(?:\w+=\$\()?(tunewright .*)", block, re.MULTILINE)
        if language == "console":
            yield from re.findall(r"^\$ (tunewright .*)", block, re.MULTILINE)
    yield from re.findall(r"`(tunewright [^`]+)`", FENCE.sub("", page))


def _unknown(shown: str) -> str | None:
    """Return the first word of a shown command that the command line does not have."""
    words = shlex.split(shown.rstrip(")"), comments=True)[1:]
    ends = [place for place, word in enumerate(words) if word in ("|", "||", ">", "&&")]
    words = words[: ends[0]] if ends else words
    command = _command_line()
    while hasattr(command, "commands") and words and not words[0].startswith(("-", "…")):
        if (command := command.get_command(None, words[0])) is None:
            return words[0]
        words.pop(0)
    options = {"--help", *(option for each in command.params for option in (*each.opts, *each.secondary_opts))}
    return next((word for word in words if word.startswith("--") and word not in options), None)


def test_documented_commands_and_options_exist() -> None:
    shown = [(page.name, command) for page in PAGES for command in _shown_commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 150
    assert [(name, command, word) for name, command in shown if (word := _unknown(command))] == []


def test_unknown_option_of_a_documented_command_is_found() -> None:
    assert _unknown("tunewright data add pairs.jsonl --no-such-option") == "--no-such-option"
    assert _unknown("tunewright data no-such-command") == "no-such-command"


def test_error_index_quotes_messages_of_the_source() -> None:
    page = (ROOT / "docs" / "how-to" / "errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert len(quoted) > 20
    assert [message for message in quoted if message[1:] not in source] == []  # its first letter may be a capital there


def test_pages_that_the_source_names_exist() -> None:
    named = {
        (str(file.relative_to(ROOT)), page)
        for folder in ("src", "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/[\w/-]+(?:\.md)?(?=[^\w/-])", file.read_text(encoding="utf-8"))
        if page.endswith(".md") or page.startswith("docs/decisions/")
    }
    assert len(named) > 15
    assert sorted((file, page) for file, page in named if not list(ROOT.glob(f"{page}*"))) == []


@cache
def _anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    words = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings)
    return frozenset(re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in words)


def _broken_links(page: Path, text: str) -> Iterator[str]:
    """Yield each relative link to a file or heading that is not there."""
    for target, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            yield f"{page.name}: {target}#{anchor}"


def test_relative_links_lead_to_files_and_headings_of_the_repository() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
    assert [link for page in pages for link in _broken_links(page, page.read_text(encoding="utf-8"))] == []
    assert sum(len(LINK.findall(page.read_text(encoding="utf-8"))) for page in pages) > 400
    for broken in ("[a](no-such-page.md)", "[a](README.md#no-such-heading)", "[a](#no-such-heading)"):
        assert len(list(_broken_links(ROOT / "README.md", broken))) == 1, broken


def test_readme_of_the_package_index_has_no_link_to_a_file_of_the_repository() -> None:
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"][
        "fancy-pypi-readme"
    ]
    text = "".join(
        part["text"] if "text" in part else (ROOT / part["path"]).read_text().split(part["end-before"])[0]
        for part in hook["fragments"]
    )
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    assert "[![" not in text and re.findall(r"\]\((?!https?:).*", text) == []
    assert "Without torch" in text and "demo --whole`*" not in text and "a reverse proxy with TLS" in text


def _keys_of(page: str) -> Iterator[str]:
    """Yield every key of the config that a page names in a code span, or sets in a block of YAML."""
    yield from re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)(?=[`:. =])", FENCE.sub("", page))
    for language, block in FENCE.findall(page):
        if language == "yaml" and isinstance(document := yaml.safe_load(block), dict):
            for name, section in document.items():
                yield from (f"{name}.{key}" for key in section) if name in SECTIONS and section else ()


def test_documented_keys_of_the_config_exist() -> None:
    # A decision may name what it removed, and `data.add` is a method.
    current = [page for page in PAGES if page.parent.name != "decisions" and page.name != "python.md"]
    named = [(page.name, key) for page in current for key in _keys_of(page.read_text(encoding="utf-8"))]
    assert len(named) > 150
    fields = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}
    files = (".json", ".jsonl", ".csv", ".py", ".yaml", ".md")
    assert [(name, key) for name, key in named if key not in fields and not key.endswith(files)] == []


@cache
def _messages() -> frozenset[str]:
    """Return the longest piece of each text of the source, without its first letter, which may be a capital there."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for text in re.findall(r'f?"([^"\n]{9,})"', file.read_text(encoding="utf-8")):
            longest = max(own_words(text).splitlines(), key=len, default="").strip()
            if longest.count(" ") >= 2:
                found.add(longest[1:])
    return frozenset(found)


def _quoted_messages(page: str) -> Iterator[str]:
    for language, block in FENCE.findall(page):
        if language in ("text", "console"):
            yield from re.findall(
                r"^((?:Error|Warning): .*?)(?=^\$ |^(?:Error|Warning): |\Z)", block, re.MULTILINE | re.DOTALL
            )


def test_quoted_errors_and_warnings_are_messages_of_the_source() -> None:
    quoted = [(page.name, text) for page in PAGES for text in _quoted_messages(page.read_text(encoding="utf-8"))]
    assert len(quoted) > 25
    assert [(name, text) for name, text in quoted if not _is_message(text)] == []


def _is_message(quoted: str) -> bool:
    """Return whether a text of the source begins within the first 120 characters, where the place may stand."""
    text = " ".join(quoted.split())
    return any(0 <= text.find(message) < 120 for message in _messages())


def test_invented_error_is_no_message_of_the_source() -> None:
    assert not _is_message("Error: train.lora_r: a rank is a thing that nobody likes to see here\nDo without.\n")


def test_site_loads_nothing_from_another_host() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert (
            re.findall(r"!\[[^\]]*\]\(https?:|<(?:img|script|link|iframe)[^>]*https?:|^```mermaid", text, re.MULTILINE)
            == []
        ), page
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "\n  font: false\n" in settings and "http" not in re.sub(r"#.*", "", settings)
    for sheet in (ROOT / "docs" / "stylesheets").glob("*.css"):
        assert "http" not in sheet.read_text(encoding="utf-8")
