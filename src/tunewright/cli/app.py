"""The command ``tunewright``, and the decorator that makes a command of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer._click.exceptions import ClickException
from typer._click.globals import get_current_context
from typer.core import TyperGroup

from tunewright._version import __version__
from tunewright.cli.console import NOTHING_KEPT, session
from tunewright.cli.start import begin
from tunewright.core.errors import UserError
from tunewright.core.options import Option
from tunewright.core.text import visible

DATA, TRAIN, EVALUATE, DEPLOY, PROJECT = PANELS = ("Data", "Train", "Evaluate", "Deploy", "Project")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Folder = Annotated[Path, typer.Option("--project", "-p", help="Project folder.", show_default="current folder")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        help="Database of tenants, keys and releases: postgresql://USER@HOST/DATABASE or sqlite:///FILE.",
        show_default="serve.database_url in the config",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Experimental: Ray cluster that does the work: local, auto or ray://HOST:PORT.",
        show_default="compute.cluster in the config",
    ),
]
Adapter = Annotated[
    str | None, typer.Argument(help="Adapter name, number or first characters.", show_default="the newest")
]
Force = Annotated[bool, typer.Option("--force", help="Train on fewer than 50 pairs, which is refused otherwise.")]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        help="Time limit for generating answers, estimated from the speed of those so far. Arms are left out by name: "
        "first those that decide nothing, then those with the most demonstrations.",
        show_default="no limit",
    ),
]

_option = partial(Parameter, kind=Parameter.POSITIONAL_OR_KEYWORD)
_SHARED = (
    _option("cluster", annotation=Cluster, default=None),
    _option("database_url", annotation=DatabaseUrl, default=None),
    _option("project", annotation=Folder, default=Path()),
    _option("json", annotation=Json, default=False),
)
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


class _InPanels(TyperGroup):
    """A group that lists its commands by panel, in the order of `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        panels = {name: getattr(command, "rich_help_panel", PROJECT) for name, command in self.commands.items()}
        return sorted(super().list_commands(ctx), key=lambda name: PANELS.index(panels[name]))

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _visible_arguments():
            return super().make_context(*args, **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            with session(as_json=False) as current:
                begin(current)
            ctx.exit()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _visible_arguments():
            return super().invoke(ctx)


@contextmanager
def _visible_arguments() -> Iterator[None]:
    """Escape control characters in usage errors: an argument may be the name of a foreign file."""
    try:
        yield
    except ClickException as error:
        error.message = visible(error.message)
        raise


app = typer.Typer(
    name="tunewright",
    cls=_InPanels,
    help="Fine-tune open-weight models for your domain, and prove that they beat prompting.\n\n"
    "Exit codes: 0 yes or done, 1 failed, 2 wrong usage or bad input, "
    "3 a measured no (don't ship, does not fit), 4 can't tell, 130 stopped by Ctrl-C.",
    epilog="`tunewright COMMAND --help` shows an example of each command. "
    "`tunewright --install-completion` makes the Tab key complete commands and options in this shell.",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        lines = [f"tunewright {__version__}"]
        for name in _PACKAGES:
            try:
                lines.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                lines.append(f"{name} not installed")
        typer.echo("\n".join(lines))
        raise typer.Exit


@app.callback()
def _root(
    _version_wanted: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions of tunewright and its main dependencies.",
        ),
    ] = False,
    _log_format: Annotated[
        Literal["text", "json"],
        typer.Option(
            "--log-format",
            envvar="TUNEWRIGHT_LOG_FORMAT",
            help="Form of messages, progress and errors on stderr: text, or one JSON object a line.",
        ),
    ] = "text",
) -> None:
    pass


def group(name: str, panel: str, text: str, *, within: typer.Typer = app) -> typer.Typer:
    """Return a new group of commands."""
    made = typer.Typer(help=text, no_args_is_help=True)
    within.add_typer(made, name=name, rich_help_panel=panel)
    return made


def command(
    within: typer.Typer,
    name: str,
    *,
    example: str,
    panel: str | None = None,
    kept: str = NOTHING_KEPT,
    status: bool = True,
    project: bool = True,
    database: bool = False,
    cluster: bool = False,
    loads: bool = False,
    json: bool = True,
    together: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    traced: bool = True,
    options: type[Any] | None = None,
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Return a decorator that makes a command of a function of a `Session`, which returns the exit code (None: 0).

    Args:
        example: a complete command line, shown in its help. A test parses it.
        panel: where the help of ``tunewright`` lists the command, if it is not in a group.
        kept: message about the state after a stopped run, and the way to resume it.
        status: report at the end whether reviewers have accepted the project's dataset version.
        project: add ``--project``; ``database``, ``cluster`` and ``json`` add their options likewise.
        loads: say on a terminal that torch and the base are loaded.
        together: returns True if a run with these options may be one of several processes.
        traced: a run of the command is one span of a trace; False for servers, whose requests are.
        options: a dataclass of `Option` fields, each of which becomes an option of its own.
    """
    wanted = {"cluster": cluster, "database_url": database, "project": project, "json": json}
    shared = [each for each in _SHARED if wanted[each.name]]

    def decorate(function: Callable[..., int | None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        if options is not None:
            place = [each.name for each in own].index("options")
            own[place : place + 1] = _options(options)

        @wraps(function)
        def run(**values: Any) -> None:
            as_json, folder = values.pop("json", False), values.pop("project", None)
            url, on = values.pop("database_url", None), values.pop("cluster", None)
            reviewed = folder if status else None
            context = get_current_context()
            with session(
                as_json,
                reviewed,
                together=together(values),
                kept=kept,
                log_json=context.find_root().params["_log_format"] == "json",
                span=" ".join(context.command_path.split()[1:]) if traced else None,
            ) as current:
                current.folder, current.database_url, current.cluster = folder or Path(), url, on
                if options is not None:
                    values["options"] = _filled(options, values)
                if loads:
                    current.reporter.begin_loading()
                code = function(current, **values)
                if code:
                    raise typer.Exit(code)

        del run.__wrapped__  # typer would read the signature of `function`
        run.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        # Help keeps the line ends of a docstring's later paragraphs, although they only wrap the source.
        text = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        within.command(name, rich_help_panel=panel, help=text, epilog=f"Example: {example}")(run)
        return run

    return decorate


def refuse_unused(action: str, options: Mapping[str, bool]) -> None:
    """Refuse options that an action, such as ``--estimate``, would ignore: names, and whether each was given."""
    if unused := [name for name, given in options.items() if given]:
        raise UserError(f"{action} does not use {', '.join(unused)}", fix="Leave it out.")


def _options(of: type[Any]) -> list[Parameter]:
    """Return a parameter for each field of an options class, including those of nested options classes."""
    hints = get_type_hints(of, include_extras=True)
    made = []
    for each in fields(of):
        if is_dataclass(each.default):
            made += _options(type(each.default))
            continue
        kind, about = get_args(hints[each.name])
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]] | None  # type: ignore[misc]
        shown = typer.Option(
            False if each.default is True else None if each.default == () else each.default,
            *_names(each.name, about),
            help=about.help,
            show_default=about.default or True,
            min=about.min,
            max=about.max,
            metavar=about.metavar,
        )
        made.append(_option(each.name, annotation=kind if about.parse is None else str | None, default=shown))
    return made


def _names(field: str, about: Option) -> tuple[str, ...]:
    """Return the names of a field's option on the command line."""
    if about.name is None:
        return (f"--{field.replace('_', '-')}",)
    return (about.name,) if isinstance(about.name, str) else about.name


def _filled(of: type[Any], values: dict[str, Any]) -> Any:
    """Return an options class's instance, with the values of its fields taken out of a command's values."""
    hints = get_type_hints(of, include_extras=True)
    filled = {}
    for each in fields(of):
        if is_dataclass(each.default):
            filled[each.name] = _filled(type(each.default), values)
            continue
        value, about = values.pop(each.name), get_args(hints[each.name])[1]
        if about.parse is not None and value is not None:
            value = about.parse(value, _names(each.name, about)[0])
        if each.default == ():
            value = tuple(value or ())
        filled[each.name] = not value if each.default is True else value
    return of(**filled)


def given_options(options: Any) -> list[str]:
    """Return the names of the options that were given, including options of nested classes."""
    hints = get_type_hints(type(options), include_extras=True)
    given = []
    for each in fields(options):
        value = getattr(options, each.name)
        if is_dataclass(value):
            given += given_options(value)
        elif value != each.default:
            given.append(_names(each.name, get_args(hints[each.name])[1])[0])
    return given
