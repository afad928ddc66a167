"""Child processes are whole groups that end with their parent, and leave their output; work in an event loop ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.core import processes
from tunewright.core.interrupts import run_async
from tunewright.core.processes import PIPE, end, run, start

PARENT = """
import sys, time
from tunewright.core.processes import PIPE, start
child = start([sys.executable, "-c", sys.argv[1]], stdout=PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = "import time\nfrom tunewright.core.processes import end_with_parent\nend_with_parent()\nprint(flush=True)\n"


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_run_returns_code_and_output(tmp_path: Path) -> None:
    code = "import os, sys\nprint(os.getcwd(), sys.stdin.read())\nsys.stderr.write(os.environ['WORD'])\nsys.exit(3)"
    ran = run([sys.executable, "-c", code], cwd=tmp_path, env={"WORD": "wörd", "PYTHONIOENCODING": "utf-8"})
    assert (ran.code, ran.stdout.split(), ran.stderr) == (3, [str(tmp_path)], "wörd")


def test_run_gives_input_that_the_process_may_leave_unread() -> None:
    assert run(["cat"], data=b"abc").stdout == "abc"
    assert run(["true"], data=b"a" * 1_000_000).code == 0


def test_run_ends_the_process_when_it_is_interrupted(tmp_path: Path) -> None:
    code = f"import os, time\nopen({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    interrupted = threading.Event()

    def interrupt() -> None:
        wait_until(lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text() != "")
        interrupted.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", code])
    assert interrupted.is_set()
    assert not alive(int((tmp_path / "id").read_text()))


def test_interrupted_notebook_cell_cancels_its_work() -> None:
    cancelled = threading.Event()
    main = threading.get_ident()

    async def work() -> None:
        try:
            while sys._current_frames()[main].f_code.co_name != "wait":
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)  # a signal between Python's look for one and its wait on a lock is seen after it
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            run_async(work())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(cell())
    loop.close()
    assert cancelled.wait(30)


def test_end_ends_descendants_and_closes_pipes() -> None:
    process = start(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    descendant = int(process.stdout.readline())
    end(process)
    assert process.returncode == processes.KILLED
    assert process.stdin.closed and process.stdout.closed
    wait_until(lambda: not alive(descendant))


def test_end_lets_a_process_stop_by_itself() -> None:
    process = start(["sh", "-c", "trap 'exit 7' TERM; echo; while :; do sleep 0.05; done"], stdout=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    end(process, patience=60)
    assert process.returncode == 7


def test_end_ends_a_process_on_the_users_terminal() -> None:
    process = start(["sleep", "600"], terminal=True)
    assert os.getpgid(process.pid) == os.getpgid(0)
    end(process)
    assert process.returncode == processes.KILLED


@pytest.mark.skipif(sys.platform != "linux", reason="a process that does not read its input outlives its parent")
@pytest.mark.parametrize("what", ["time.sleep(600)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
def test_child_ends_with_a_killed_parent_even_when_it_hangs(what: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD + what], stdout=PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    wait_until(lambda: not alive(child))
