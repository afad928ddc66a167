"""The command-line reference: a page for each panel of ``tunewright --help``, from the commands themselves."""

from __future__ import annotations

import enum
import re
import shlex
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from reference_sources import COMMANDS, MODULES

_OTHER = "Commands"
_EXAMPLE = re.compile(r"\s*^Examples?:\s*(.+)\Z", re.MULTILINE | re.DOTALL)
CODES = {
    "0": "Yes, or done.",
    "1": "Failed.",
    "2": "Wrong usage or bad input.",
    "3": "A measured no: don't ship, don't tune, does not fit.",
    "4": "Can't tell.",
    "130": "Stopped by Ctrl-C or SIGTERM.",
    "141": "The reader of a pipe closed it.",
}


@dataclass(frozen=True)
class Entry:
    """A command with its name in full and the panel that lists it."""

    name: str
    panel: str
    command: Any

    @property
    def help(self) -> str:
        """Return the description without its example."""
        return _EXAMPLE.sub("", self.command.help or "").strip()

    @property
    def summary(self) -> str:
        """Return the description's first sentence."""
        return re.split(r"(?<=\.)\s", self.help, maxsplit=1)[0]

    @property
    def examples(self) -> list[str]:
        """Return the command lines that the help gives as examples; without any, the shortest valid call."""
        found = _EXAMPLE.search(self.command.help or "") or _EXAMPLE.search(self.command.epilog or "")
        text = found[1] if found else self.command.epilog or ""
        lines = [line.strip().strip("`").removeprefix("$ ") for line in text.splitlines()]
        return [line for line in lines if line.startswith("tunewright")] or [self.shortest]

    @property
    def shortest(self) -> str:
        """Return the call with required arguments alone."""
        needed = [p for p in self.command.params if p.required and not p.hidden]
        words = [metavar(p) if is_argument(p) else f"{p.opts[0]} {metavar(p)}" for p in needed]
        return " ".join([f"tunewright {self.name}", *words])

    @property
    def anchor(self) -> str:
        """Return the heading's identifier on its page."""
        return f"tunewright {self.name}".replace(" ", "-")

    @property
    def page(self) -> str:
        """Return the file name of the panel's page."""
        return f"{self.panel.lower().replace(' ', '-')}.md"


def entries() -> list[Entry]:
    """Return every command that the help lists, in its order."""
    return list(_walk(COMMANDS, "", _OTHER))


def pages() -> dict[str, str]:
    """Return the reference's pages by their path in the site."""
    commands = entries()
    panels = list(dict.fromkeys(entry.panel for entry in commands))
    written = {"reference/cli/index.md": _index(commands, panels)}
    for panel in panels:
        group = [entry for entry in commands if entry.panel == panel]
        title = "Commands" if panel == _OTHER else f"{panel} commands"
        written[f"reference/cli/{group[0].page}"] = f"# {title}\n\n" + "\n".join(map(_section, group))
    return written


def _panel(command: Any) -> str:
    own = getattr(command, "rich_help_panel", None)
    return own if isinstance(own, str) else ""


def _module(command: Any) -> int:
    """Return the place of a command's module in the order of the help; groups come after all commands."""
    if hasattr(command, "commands"):
        return len(MODULES) + min(map(_module, command.commands.values()))
    return MODULES.index(command.callback.__module__.rpartition(".")[2])


def _walk(command: Any, name: str, panel: str) -> Iterator[Entry]:
    panel = _panel(command) or panel
    if command.hidden:
        return
    if hasattr(command, "commands"):
        children = [command.commands[child] for child in command.list_commands(None)]
        panels = list(dict.fromkeys(map(_panel, children)))
        # Typer lists groups last, and commands in the order in which their modules were imported.
        for child in sorted(children, key=lambda each: (panels.index(_panel(each)), _module(each))):
            yield from _walk(child, f"{name} {child.name}".strip(), panel)
    else:
        yield Entry(name, panel, command)


def _index(commands: list[Entry], panels: list[str]) -> str:
    out = ["# Command line\n", COMMANDS.help.partition("\n")[0], ""]
    for panel in panels:
        out += [f"\n## {panel}\n", "| command | purpose |", "| --- | --- |"]
        out += [
            f"| [`{entry.name}`]({entry.page}#{entry.anchor}) | {cell(entry.summary)} |"
            for entry in commands
            if entry.panel == panel
        ]
    out += ["\n## Exit codes\n", "| code | meaning |", "| --- | --- |"]
    out += [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]
    out += [
        "\n## Options of every command\n",
        "- `--json` prints one JSON document on stdout and nothing else. Progress and warnings go to stderr.",
        "- `--project`, `-p` names the project's folder; the default is the current folder.",
        "- `--help` prints the command's options and an example.\n",
    ]
    return "\n".join(out)


def _section(entry: Entry) -> str:
    out = [f"## `tunewright {entry.name}`\n", entry.help, ""]
    out += ["```bash", *entry.examples, "```\n"]
    shown = [p for p in entry.command.params if not getattr(p, "hidden", False)]
    arguments, options = [p for p in shown if is_argument(p)], [p for p in shown if not is_argument(p)]
    if arguments:
        out += ["| argument | meaning |", "| --- | --- |"]
        out += [f"| `{metavar(p)}`{_many(p)} | {cell(_meaning(p))} |" for p in arguments]
        out += [""]
    if options:
        out += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        out += [f"| {names(p)} | {value(p)} | {default(p)} | {cell(_meaning(p))} |" for p in options]
        out += [""]
    return "\n".join(out)


def is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _many(parameter: Any) -> str:
    optional = "" if parameter.required else " (optional)"
    return f" …{optional}" if parameter.nargs != 1 else optional


def _meaning(parameter: Any) -> str:
    return parameter.help or ""


def metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    return str(parameter.name).upper() if is_argument(parameter) else _type(parameter.type_descriptor.annotation)


def value(option: Any) -> str:
    if option.is_flag:
        return "flag"
    choices = _choices(option.type_descriptor.annotation)
    shown = ", ".join(f"`{each}`" for each in choices) if choices else f"`{metavar(option)}`"
    return f"{shown}, repeatable" if option.multiple else shown


def default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return cell(option.show_default)
    if option.default in (None, "", (), []) or (option.is_flag and not option.default):
        return ""
    default = option.default
    return f"`{default.value if isinstance(default, enum.Enum) else default}`"


def _choices(annotation: Any) -> list[str]:
    """Return the words that an option takes, where it takes only some."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _type(annotation: Any) -> str:
    if get_origin(annotation) in {Union, types.UnionType, list, tuple}:
        parts = [part for part in get_args(annotation) if part not in {type(None), ...}]
        return _type(parts[0])
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names.get(annotation, getattr(annotation, "__name__", "TEXT").upper())


def cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def words(example: str) -> list[str]:
    """Return an example's arguments, as a shell would split them."""
    return shlex.split(example, comments=True)[1:]
