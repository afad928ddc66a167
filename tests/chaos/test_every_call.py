"""Every call that changes a file fails once, and after it each command leaves the old state or the new one.

Calls at the same place are alike: a random one of each place fails; before a release the last one too, and each one
if TUNEWRIGHT_CHAOS_EVERY is set. In CI the calls that fill one temporary file, or one file of a temporary folder, are
one place: without it the command is where it was.
"""

from __future__ import annotations

import errno
import os
import random
import re

import pytest
from faulty import SEED_VARIABLE, Action, Kind, counted, seed
from stages import CASES, Case, Stages

from making.forked import FOREVER, Fault

pytestmark = pytest.mark.chaos
pytest_plugins = ["chaos_fixtures"]

EVERY = "TUNEWRIGHT_CHAOS_EVERY"
LONG = ("train", "export-gguf", "remove")
"""Commands whose calls other commands make too, or that take seconds each time: they are for a release."""
KINDS = {
    "fsync": Kind.SYNC,
    "fdatasync": Kind.SYNC,
    **dict.fromkeys(("rename", "renameat", "link", "linkat"), Kind.RENAME),
    **dict.fromkeys(("mkdir", "mkdirat", "open", "fopen"), Kind.CREATE),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), Kind.REMOVE),
}
NUMBERS = {
    Kind.WRITE: (errno.ENOSPC, errno.EIO, errno.EROFS),
    Kind.SYNC: (errno.EIO, errno.ENOSPC),
    Kind.RENAME: (errno.ENOSPC, errno.EIO, errno.EROFS),
    Kind.CREATE: (errno.ENOSPC, errno.EIO, errno.EROFS),
    Kind.REMOVE: (errno.EIO, errno.EROFS),
}


def place(call: str) -> str:
    """Return a call without what differs from run to run: digests, numbers and endings of temporary names."""
    name, path = call.split(" ", 1)
    path = re.sub(r"(/\.[^/]*)\.[a-z0-9_]{8}(?=/|$)", r"\1.*", path)
    path = re.sub(r"/\.tmp\w+", "/.tmp*", path)
    return f"{name} {re.sub(r'[0-9]+', '#', re.sub(r'[0-9a-f]{2,}(?=[./-]|$)', '#', path))}"


def temporary(place: str) -> str:
    """Return the file that a call fills, of one that has a temporary name or is in a temporary folder."""
    path = place.split(" ", 1)[1]
    return re.sub(r"/\.([^/]*)\.\*$", r"/\1", path) if re.search(r"/\.[^/]*\.\*(/|$)", path) else place


def chosen(calls: list[str], draw: random.Random, *, last: bool, release: bool) -> list[int]:
    """Return the numbers of the calls that fail, from 1, in their order: one at each place, or the last of several."""
    if os.environ.get(EVERY):
        return list(range(1, len(calls) + 1))
    places: dict[str, list[int]] = {}
    for number, call in enumerate(calls, start=1):
        places.setdefault(place(call) if release else temporary(place(call)), []).append(number)
    if last:
        return sorted(numbers[-1] for numbers in places.values() if len(numbers) > 1)
    return sorted(draw.choice(numbers) for numbers in places.values())


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.release)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.release) if name in LONG else name for name in CASES]
)
def test_command_leaves_the_old_or_the_new_state_when_any_call_fails(name: str, last: bool, stages: Stages) -> None:
    case = CASES[name]
    before, after, calls = stages.listed(name)
    draw = random.Random(f"{seed()} {name}")
    failed = []
    for number in chosen(calls, draw, last=last, release=stages.release):
        kind = KINDS.get(calls[number - 1].split()[0], Kind.WRITE)
        code, lasting = draw.choice(NUMBERS[kind]), draw.choice((0, FOREVER))
        fault = stages.fault(kinds=31, action=Action.FAIL, when=number, number=code, lasting=lasting)
        try:
            _assert_old_or_new(stages, case, fault, before, after)
        except AssertionError as error:
            how = f"{calls[number - 1]}: {errno.errorcode[code]}{' from then on' if lasting else ''}"
            failed.append(f"call {number} of {len(calls)}, {how}\n{error}\n")
    assert not failed, f"{SEED_VARIABLE}={seed()} repeats these {len(failed)} of {name}:\n\n" + "\n".join(failed)


def _assert_old_or_new(stages: Stages, case: Case, fault: Fault, before: object, after: object) -> None:
    stages.prepare(case.stage)
    started = stages.start(case.command, fault)
    ended = stages.wait(started)
    _, fired, at = counted(started)
    assert "Traceback" not in ended.stderr, f"at {at}: {ended.stderr[-3000:]}"
    assert ended.code in (2, *case.codes), f"exit code {ended.code} at {at}: {ended.stderr[-2000:]}"
    if ended.code == 2:
        assert fired, ended.stderr
        assert ended.stderr.count("Error: ") == 1, f"at {at}: {ended.stderr[-2000:]}"
    found = case.state(stages)
    if ended.code != 2:
        assert found == after, f"acknowledged, and lost: {found}, at {at}"
    assert found in (before, after, case.between), f"neither old nor new: {found}, at {at}"
    again = stages.run(case.command)
    assert "Traceback" not in again.stderr, f"the next command, after {at}: {again.stderr[-2000:]}"
    if found != after:
        assert again.code in case.codes, f"the next command, after {at}: {again.stderr[-2000:]}"
    found = case.state(stages)
    assert found == after, f"the next command made {found} in place of {after}, after {at}"
