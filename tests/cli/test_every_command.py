"""Rules of every command: help with an example that parses, `--json`, exit codes, one error for bad input."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from making.command_line import parsed, tunewright
from tunewright._version import __version__
from tunewright.cli import commands
from tunewright.cli.app import PANELS


def _leaves(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _leaves(below, *names, name)
    else:
        yield names, command


ROOT: Any = typer.main.get_command(commands())
LEAVES = dict(_leaves(ROOT))


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_example_in_help_parses_as_a_call_of_its_command(names: tuple[str, ...]) -> None:
    epilog = LEAVES[names].epilog
    assert epilog.startswith("Example: tunewright ")
    assert parsed(epilog.removeprefix("Example: ")) == names


WITHOUT_PROJECT = {
    ("config", "schema"),
    ("demo",),
    ("doctor",),
    ("engine", "install"),
    ("engine", "show"),
    ("init",),
    ("studio",),  # one of its pages makes a project
}


@pytest.mark.parametrize("names", sorted(LEAVES.keys() - WITHOUT_PROJECT), ids=" ".join)
def test_example_is_one_json_error_in_a_folder_without_a_project(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = LEAVES[names].epilog.removeprefix("Example: tunewright ")
    ran = tunewright(*shlex.split(re.split(r" [|>] ", example)[0]), "--json")
    assert ran.code == 2
    assert ran.document.keys() == {"error"}
    assert ran.document["error"].keys() == {"what", "where", "fix"}
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_unknown_option_is_wrong_usage(names: tuple[str, ...]) -> None:
    ran = tunewright(*names, "--no-such-option")
    assert (ran.code, ran.stdout) == (2, "")
    assert "--no-such-option" in ran.stderr


def test_root_help_lists_every_command_in_one_panel_in_order() -> None:
    shown = tunewright("--help").stdout
    places = [shown.index(f"─ {panel} ") for panel in PANELS]
    assert places == sorted(places)
    assert "─ Commands ─" not in shown
    for name in ROOT.commands:
        assert len(re.findall(rf"^│ {name} ", shown, re.M)) == 1, name


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_help_is_an_imperative_sentence_without_wrapped_source_lines(names: tuple[str, ...]) -> None:
    first, *others = LEAVES[names].help.split("\n\n")
    assert re.match(r"[A-Z]\w+,? ", first)
    assert not re.match(r"(What|Whether|How|Who|The|A|An) ", first)
    assert not any("\n" in part for part in (first, *others))


def test_help_describes_every_option_and_argument() -> None:
    bare = [
        f"{' '.join(names)}: {parameter.name}"
        for names, command in LEAVES.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert bare == []


def test_version_names_the_main_dependencies_without_importing_torch() -> None:
    code = (
        "import sys\nsys.argv = ['tunewright', '--version']\nfrom tunewright.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"tunewright {__version__}"
    assert [line.split()[0] for line in lines[1:]] == ["torch", "transformers", "peft", "trl", "accelerate"]
    assert all(re.fullmatch(r"\w+ \d[\w.+]*", line) for line in lines)


def _complete(words: str, tmp_path: Path) -> list[str]:
    """Return what bash is offered where the line ends with the last of these words."""
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    asked = {"_TUNEWRIGHT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    code = "import sys; sys.argv = ['tunewright']; from tunewright.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def test_completion_offers_commands_options_and_choices(tmp_path: Path) -> None:
    assert _complete("tunewright data tr", tmp_path) == ["trained-by"]
    assert _complete("tunewright serve --self", tmp_path) == ["--self-test"]
    assert _complete("tunewright serve --engine v", tmp_path) == ["vllm"]


def test_completion_script_is_shown_for_the_shell_in_use() -> None:
    # typer asks the process table for the shell; named outright, the script is bash's in any environment.
    code = "import sys; sys.argv = ['tunewright']; from tunewright.cli import main; main()"
    asked = {"_TUNEWRIGHT_COMPLETE": "source_bash"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert "_TUNEWRIGHT_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default -F" in done.stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("advise X --minutes 3", "--minutes"),
        ("advise X --no-pilot", "--no-pilot"),
        ("advise --no-pilot --cluster local", "--cluster"),
        ("crossval --folds 1", "--folds"),
        ("data check a.csv b.csv --fix c.csv", "--fix"),
        ("data check a.csv --fix c.csv --redact", "--redact"),
        ("data check a.csv --leave-out 2", "--leave-out"),
        ("data from-documents a.md --estimate --out x", "--out"),
        ("data generate a.jsonl --estimate --out x", "--out"),
        ("data review --status --apply", "--status --apply"),
        ("data review --status --redraw", "--redraw"),
        ("data review --status --reviewer ann", "--reviewer"),
        ("data review --apply --reviewer ann", "--reviewer"),
        ("data review --import x.csv --suspects", "--suspects"),
        ("data review --export x.csv --conflicts", "--conflicts"),
        ("data review --export x.csv --message m", "--message"),
        ("data review --adapter base", "--suspects"),
        ("deploy courts tiny --force", "--because"),
        ("deploy courts tiny --because x", "--force"),
        ("deploy courts tiny --canary 110%", "--canary"),
        ("evaluate --estimate --minutes 3", "--minutes"),
        ("export hub --public", "--push"),
        ("human-eval --results --export x.csv", "--results --export"),
        ("human-eval --results --items 9", "--items"),
        ("human-eval --import x.csv --items 9", "--items"),
        ("human-eval --reference", "--export"),
        ("human-eval --keep-preferences --against x", "--against"),
        ("human-eval", "--export and --import"),
        ("judge --estimate --keep-preferences", "--keep-preferences"),
        ("serve --self-test --port 0 --metrics-host ::1 --no-auth --constrain", "--port, --metrics-host, --no-auth, "),
        ("studio --demo --reviewer ann", "--reviewer"),
        ("tenant add acme --requests 0", "--requests"),
        ("tenant key rotate tw_0 --overlap soon", "--overlap"),
        ("tenant usage --since yesterday", "--since"),
        ("tenant usage --csv", "--csv"),  # with --json
        ("train --minutes 3", "--sweep"),
        ("train --write", "--sweep"),
        ("train --sweep --seeds 3", "--curve"),
        ("train --sweep --curve", "--sweep/--curve"),
    ],
)
def test_option_that_a_command_would_ignore_or_cannot_use_is_refused_by_name(
    line: str, named: str, tmp_path: Path
) -> None:
    ran = tunewright(*shlex.split(line), "-p", tmp_path, "--json")
    assert ran.code == 2
    assert named in (str(ran.document["error"]) if ran.stdout else " ".join(ran.stderr.split()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("init {} --data x", "x: No such file"),
        ("init {} --task sql", "--data"),
        ("init {} --sheet x", "--data"),
        ("init {} --example legal-citations --data x --output y", "--output"),
        ("init {} --example bfcl", "--data"),
        ("init {} --example legal-citations --data x", "--data"),
        ("init {} --example legal-citations --name x", "--name"),
        ("init {} --example recipes", "legal-citations"),
    ],
)
def test_init_without_an_example_names_what_to_do(line: str, named: str, tmp_path: Path) -> None:
    ran = tunewright(*shlex.split(line.format(tmp_path / "p")))
    assert (ran.code, named in " ".join(ran.stderr.replace("│", " ").split())) == (2, True), ran.stderr
    assert list(tmp_path.iterdir()) == []
