"""The pages' words for things that files and messages of the program call by other names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel

from tunewright.config import Config
from tunewright.data.versions import Manifest, short

ROLES = {"system": "Instructions", "user": "Input", "assistant": "Answer", "tool": "Tool result"}
"""Roles of a conversation, in the words of people who review its pairs."""
TURN = re.compile(rf"^({'|'.join(ROLES)}): ", re.MULTILINE)
"""A role at the beginning of a line."""

SETTINGS = {
    "base_model": "Base model",
    "data.sources": "Files that the whole pipeline adds, one a line",
    "data.system_prompt": "System prompt",
    "data.split_by": "Rows that stay in one split",
    "data.val_size": "Share of dev rows",
    "data.test_size": "Share of test rows",
    "train.preset": "Preset",
    "train.epochs": "Epochs",
    "train.learning_rate": "Learning rate",
    "evaluate.metric": "Metric",
    "evaluate.margin": "Smallest gain that is worth shipping",
    "judge.base_url": "Address of the judge's API",
    "judge.model": "Judge's model",
    "judge.api_key_env": "Variable with the judge's API key",
}
"""Keys of the config on the page Settings, with their labels."""

_PAGES = {
    "data review": ("/review", "Review"),
    "data suspects": ("/review/suspects", "Review"),
    "data leakage": ("/data/leakage", "Leakage"),
    "data": ("/data", "Data"),
    "train": ("/train", "Train"),
    "advise": ("/", "Project"),
    "evaluate": ("/evaluate", "Evaluate"),
    "run": ("/evaluate", "Evaluate"),
    "human-eval": ("/compare", "Compare"),
    "deploy": ("/deploy", "Deploy"),
    "promote": ("/deploy", "Deploy"),
    "rollback": ("/deploy", "Deploy"),
    "serve": ("/deploy", "Deploy"),
    "tenant": ("/tenants", "Tenants"),
}
"""The page that does a command's work: its path and name. More words of a command come first."""
_COMMAND = re.compile(r"\btunewright ([a-z][a-z-]*(?: [a-z][a-z-]*)?)")
by_commands = re.compile(r"`(tunewright [^`]+)`").split
"""Return the pieces of a text: every second one is a command. Other quotes stay, as part of what people typed."""
_OPTION = re.compile(r"(?<![\w-])--[a-z]")
_KEYS = [
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    for key in field.annotation.model_fields
]
_SETTING = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, _KEYS))})(?![\w(])")
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z`])")


@dataclass(frozen=True)
class Advice:
    """A text in three parts: sentences for everybody, sentences with a setting, and sentences with a command."""

    plain: str
    page: tuple[str, str] | None
    """The page that does the same as the first command: its path and its name."""
    terminal: str
    """Sentences with a command or an option."""
    setting: str = ""
    """Sentences with a key of ``tunewright.yaml``."""
    field: str = ""
    """The first such key that the page Settings has."""


def version_name(version: Manifest) -> str:
    """Return a dataset version's name on a page, "version 2"; versions of earlier releases have a digest only."""
    return f"version {version.numbers.version if version.numbers else short(version.digest)}"


def advice(fix: str | None) -> Advice:
    """Return what to do about a refusal; commands stand last, behind the page that does the same."""
    return _parted(_SENTENCE.split(fix or ""), 0)


def note(message: str) -> Advice:
    """Return a message in the same parts; its first sentence stays first, because it states the problem."""
    return _parted(_SENTENCE.split(message), 1)


def _parted(sentences: list[str], kept: int) -> Advice:
    parts: dict[str, list[str]] = {"plain": [], "setting": [], "terminal": []}
    for number, each in enumerate(sentences):
        part = "plain"
        if number >= kept:
            in_terminal = _COMMAND.search(each) or _OPTION.search(each)
            part = "terminal" if in_terminal else "setting" if _SETTING.search(each) else "plain"
        parts[part].append(each)
    plain, setting, terminal = map(" ".join, parts.values())
    # An advice for the terminal can name a key too.
    field = next((key for key in _SETTING.findall(f"{setting} {terminal}") if key in SETTINGS), "")
    return Advice(plain, _page_of(terminal), terminal, setting, field)


def _page_of(text: str) -> tuple[str, str] | None:
    for words in _COMMAND.findall(text):
        for name in (words, words.partition(" ")[0]):
            if name in _PAGES:
                return _PAGES[name]
    return None
