"""Training with Slurm, SkyPilot and containers: the scripts are sound, and their commands and options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from making.command_line import parsed
from making.deploy_files import DEPLOY, ROOT, ran, tool

pytestmark = pytest.mark.slow  # needs what `make test` does not install

SBATCH = DEPLOY / "slurm" / "train.sbatch"
RAY = DEPLOY / "ray-containers.sh"
SKY = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text())


def test_slurm_script_passes_bash_and_shellcheck() -> None:
    ran("bash", "-n", SBATCH)
    ran(tool("shellcheck"), SBATCH)


@pytest.mark.parametrize(("gpus", "launcher"), [("1", "tunewright"), ("2", "torchrun")])
def test_slurm_script_starts_train_that_parses(tmp_path: Path, gpus: str, launcher: str) -> None:
    words = _submitted(tmp_path, gpus, 'printf "%s\\n" "$@" > "$OUT"')
    (name,) = [word for word in words if word in {"tunewright", "torchrun"}][:1]
    assert name == launcher
    # The launcher's own options end where the module begins.
    assert parsed(words[len(words) - 1 - words[::-1].index("tunewright") :]) == ("train",)
    assert words[-2:] == ["--project", str(tmp_path)]


def test_slurm_script_queues_again_when_its_time_is_over(tmp_path: Path) -> None:
    # The script's own process gets the signal, as with Slurm's --signal=B:TERM, and the step ends as a training does.
    # The step blocks its signal until it waits for it: one that comes between the two would not end a sleep.
    (tmp_path / "step.py").write_text(
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.sigwait({signal.SIGTERM})\n"
        "sys.exit(130)\n"
    )
    stopped = f"exec {sys.executable} {tmp_path}/step.py"
    assert _submitted(tmp_path, "1", stopped) == ["requeue", "77"]


def test_slurm_script_fails_with_the_trainings_code(tmp_path: Path) -> None:
    assert _submitted(tmp_path, "1", "exit 2", code=2) == []


def _submitted(folder: Path, gpus: str, srun: str, code: int = 0) -> list[str]:
    """Run the script with stand-ins of Slurm's commands, and return their output."""
    out = folder / "out"
    for name, text in (("srun", srun), ("scontrol", 'printf "%s\\n" "$@" > "$OUT"')):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    variables = {
        "HOME": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OUT": str(out),
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_JOB_ID": "77",
    }
    done = subprocess.run(["bash", str(SBATCH), str(folder)], env=variables, check=False, timeout=120)
    assert done.returncode == code
    return out.read_text().splitlines() if out.exists() else []


def test_skypilot_task_installs_extras_that_exist_and_starts_train() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\.\[([\w,-]+)\]'", SKY["setup"])
    assert set(named.split(",")) <= extras.keys()
    assert "constraints.txt" in SKY["setup"]
    commands = re.findall(r"tunewright train .*", SKY["run"])
    assert len(commands) == 2
    for command in commands:
        assert parsed(command) == ("train",)
        assert command.split()[-1] in SKY["file_mounts"]
    for script in (SKY["setup"], SKY["run"]):
        ran("bash", "-n", "-c", script)


def test_ray_containers_script_passes_bash_and_shellcheck() -> None:
    ran("bash", "-n", RAY)
    ran(tool("shellcheck"), RAY)


def test_ray_containers_have_the_rights_of_the_charts_pods_and_keep_the_token_off_command_lines(tmp_path: Path) -> None:
    commands = _contained(tmp_path, "up", str(tmp_path), "2")
    started = [command for command in commands if command[0] == "run"]
    assert [command[command.index("--name") + 1] for command in started] == ["ray-head", "ray-worker-1", "ray-worker-2"]
    for command in started:
        assert {"--read-only", "no-new-privileges", f"{tmp_path}:/project", "RAY_AUTH_MODE=token"} <= set(command)
        assert command[command.index("--cap-drop") + 1] == "ALL"
        assert "RAY_AUTH_TOKEN" in command and not any("secret" in word for word in command)
        assert command[command.index("tini") :][2:6] == ["--", "ray", "start", "--block"]
    assert all(command[-4:-2] == ["--address", "10.0.0.9:6379"] for command in started[1:])


def test_ray_containers_run_a_command_on_the_head(tmp_path: Path) -> None:
    (command,) = _contained(tmp_path, "run", "train", "--cluster", "auto")
    words = command[command.index("ray-head") + 1 :]
    assert words == ["tunewright", "train", "--cluster", "auto"]
    assert parsed(words) == ("train",)


def _contained(folder: Path, *arguments: str) -> list[list[str]]:
    """Run the script with a stand-in of podman, and return the stand-in's command lines."""
    out, podman = folder / "podman.log", folder / "podman"
    podman.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\037" "$@" >> "$OUT"; echo >> "$OUT"\n'
        'if [ "$1" = inspect ]; then echo 10.0.0.9; elif [ "$1" = logs ]; then echo Ray runtime started.; fi\n'
    )
    podman.chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(out), "RAY_AUTH_TOKEN": "secret"}
    subprocess.run(["bash", str(RAY), *arguments], env=variables, check=True, timeout=60, stdin=subprocess.DEVNULL)
    return [line.split("\037")[:-1] for line in out.read_text().splitlines()]
