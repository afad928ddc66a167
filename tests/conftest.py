"""Shared fixtures."""

from __future__ import annotations

import os

# Before torch is imported: tiny models gain nothing from threads, and threads that wait for each other are slow
# wherever the machine has other work too.
os.environ["OMP_NUM_THREADS"] = "1"

import sys

# Many containers set this. Without bytecode each worker rewrites every assertion again, and each command that a test
# starts compiles the package: 2 s of its 3 s.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc

# A test that writes files spent most of its time waiting for the disk. A killed process loses nothing that it wrote, so
# only a loss of power would show the difference. Commands in a process of their own still wait, and tests of crashes at
# these calls put their own function here.
os.fsync = lambda _: None  # type: ignore[assignment]

# Importing creates a million objects, and hardly any garbage. `pytest_collection_modifyitems` ends this.
gc.disable()

import signal
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from making.tiny_bases import build_base

# Fixtures that some files import and others take as a plugin: their assertions are rewritten whichever comes first.
pytest.register_assert_rewrite("making.adapter_projects", "tenant_server", "making.vllm_child", "raylets")

TESTS = Path(__file__).parent

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a timing: on a machine with other work, hypothesis' deadline of 200 ms would be one, and its check
# that examples are drawn quickly another. The same code tries the same examples, so that a change is not refused for
# a fault that was there before it.
settings.register_profile(
    "quick", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# `make test-all` and `make fuzz` choose these with --hypothesis-profile. `make fuzz` tries other examples each time.
settings.register_profile("all", settings.get_profile("quick"), max_examples=100)
settings.register_profile("fuzz", settings.get_profile("quick"), max_examples=10_000, derandomize=False)
settings.load_profile("quick")


# Folders whose files take longest, so that no worker is left with a long one when the others are done.
LONGEST = ("chat", "benchmarks", "gpu", "cli", "training", "evaluation", "serving", "studio", "models", "adapters")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by folder, the longest first."""
    gc.freeze()  # what collection has imported: the first fixture would look at it
    gc.enable()
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(TESTS).parts[0], len(ranks)))


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Remove, before coverage combines its files, those that a killed process left unfinished, and name them."""
    result = yield
    if session.config.getoption("cov_source", None) and not hasattr(session.config, "workerinput"):
        for file in session.config.rootpath.glob(".coverage.*"):
            if not _is_complete(file):
                file.unlink()
                session.config.get_terminal_writer().line(f"\n{file.name} is not counted: its process was killed.")
    return result


def _is_complete(file: Path) -> bool:
    try:
        with closing(sqlite3.connect(file)) as database:
            (version,) = database.execute("SELECT count(*) FROM coverage_schema").fetchone()
            return version == 1 and database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
    except sqlite3.DatabaseError:
        return False


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Exempt everything that exists before a file's tests from garbage collection.

    Each training, evaluation and server collects garbage. With the million objects of imported packages, one
    collection takes half a second: two fifths of a file's time. Without them, it takes none.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and the ChatML template."""
    return build_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that every engine takes."""
    from making.engine_models import write_base

    return write_base(tmp_path_factory.mktemp("engines") / "base")


@pytest.fixture(scope="session")
def small_adapters(small_base: Path) -> dict[str, Path]:
    """Three adapters on it: folders by digest."""
    from making.engine_models import write_adapter

    return dict(write_adapter(small_base, small_base.parent / f"adapter-{seed}", seed=seed) for seed in (1, 2, 3))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """A PostgreSQL server, started when the first test needs it."""
    from making.postgres import postgres_server

    with postgres_server() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty serving state, in each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/serving/state.sqlite"
    from making.postgres import new_schema

    return new_schema(request.getfixturevalue("postgres"))


@pytest.fixture
def state(state_url: str) -> Iterator[Any]:
    """The serving state itself, open."""
    from tunewright.serving.tenants import State

    with State(state_url, "ann") as opened:
        yield opened


@pytest.fixture(scope="module", params=["llama", "mistral", "mistral-window"])
def plain(request: pytest.FixtureRequest) -> Any:
    """A tiny model whose answers wander, of each architecture."""
    from making.wandering_models import llama, mistral

    return {"llama": llama, "mistral": lambda: mistral(None), "mistral-window": lambda: mistral(8)}[request.param]()


@pytest.fixture(scope="module")
def tenants() -> Any:
    """Three adapters on one base."""
    from making.wandering_models import llama, with_adapters

    return with_adapters(llama())


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A process with a fake CUDA card, for the tests of one file in tests/gpu (see card_process.py)."""
    from card_process import card_process, compiled, reason_to_skip

    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    with card_process(compiled(request.config.cache.mkdir("fake_card"))) as process:
        yield process
