"""vLLM in the workers of a cluster, with a stand-in for vLLM: what machines must have, and whose answers come back."""

from __future__ import annotations

import hashlib
import hmac
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from data_helpers import Listener

from making.fake_vllm import DIE
from making.pickled_workers import PickledModels
from making.vllm_child import alive, install_fake
from tunewright.adapters.registry import LINEAGE, Adapter
from tunewright.chat import open_chat
from tunewright.config import Config, EvaluateConfig
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.workers import Result, Shared
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.engines import environment
from tunewright.engines.choice import AnswerEngine, MachineVllm, answer_engine
from tunewright.engines.environment import Environment
from tunewright.engines.vllm.engine import VllmEngine
from tunewright.evaluation import answer_worker
from tunewright.evaluation.arm_runner import noise_floor
from tunewright.evaluation.generations import Generator
from tunewright.metrics import scorer_of
from tunewright.models.bases import Base, resolve_base

VLLM = Config(evaluate=EvaluateConfig(engine="vllm"))


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A worker has loaded nothing, and its private folders are apart from those of other tests."""
    answer_worker.unload()
    with tempfile.TemporaryDirectory(prefix="tw-") as folder:  # short, for the path of a socket
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        answer_worker.unload()


@pytest.fixture
def base(tiny_base_folder: Path, tmp_path: Path) -> Base:
    return resolve_base(str(tiny_base_folder), None, tmp_path, Listener())


@pytest.fixture
def adapters(small_adapters: dict[str, Path], tmp_path: Path) -> list[Adapter]:
    made = []
    for number, (digest, folder) in enumerate(small_adapters.items()):
        place = tmp_path / "adapters" / f"small-{number}"
        place.mkdir(parents=True)
        for file in folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        write_json(place / LINEAGE, {"created": "2026-01-01T00:00:00+00:00", "digest": digest})
        made.append(Adapter(place))
    return made


class _Machines(PickledModels):
    """Machines that have given what they have of vLLM."""

    device: Any = "cuda"
    threads = None

    def __init__(self, *found: MachineVllm) -> None:
        super().__init__()
        self._found: Any = found

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return what the machines have."""
        del question, needed
        return [(f"10.0.0.{number}", found) for number, found in enumerate(self._found, 1)]


def _machine(card: int, **versions: str) -> MachineVllm:
    found = {"vllm": "0.32.0", "torch": "2.13.0", **versions}
    return MachineVllm(Environment("vllm", Path("/engines/vllm"), "cuda", found), card << 30)


def test_auto_takes_vllm_on_a_cluster_as_on_one_machine(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = answer_engine(Config(), "none", workers=_Machines(_machine(80), _machine(24)))
    assert (chosen.name, chosen.why) == ("vllm", "vLLM is installed for the CUDA card")
    # The smallest card decides for all workers, so that no answer depends on the worker.
    generator = Generator(
        base, open_chat(base), "float32", "none", 4, tmp_path, Listener(), engine=chosen, workers=_Machines()
    )
    assert generator.rows == 128
    assert answer_engine(Config(), "nf4", workers=_Machines(_machine(80))).name == "peft"

    install_fake(monkeypatch, tmp_path)
    assert answer_engine(Config(), "none", workers=PickledModels()) == AnswerEngine("peft", "there is no CUDA card")


def test_machine_with_another_vllm_is_refused_and_auto_takes_peft() -> None:
    unequal = _Machines(_machine(80), _machine(80, vllm="0.31.0"))
    wanted = (
        r"The machine 10\.0\.0\.2: Its vLLM differs from another machine's: vllm 0\.31\.0 with .* \(there vllm 0\.32\.0"
    )
    with pytest.raises(UserError, match=wanted):
        answer_engine(VLLM, "none", workers=unequal)
    chosen = answer_engine(Config(), "none", workers=unequal)
    assert (chosen.name, "0.31.0" in chosen.why) == ("peft", True)


def test_machine_without_vllm_for_its_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, tmp_path, "cuda")
    with pytest.raises(UserError, match="not installed for the CPU, and the cluster has no GPU") as refused:
        answer_engine(VLLM, "none", workers=PickledModels())
    assert "engine install vllm --build cpu" in (refused.value.fix or "")
    on_gpus = PickledModels()
    on_gpus.device = "cuda"
    with pytest.raises(UserError, match="torch finds no CUDA card, and Ray has GPUs"):
        answer_engine(VLLM, "none", workers=on_gpus)
    install_fake(monkeypatch, tmp_path / "other", "cpu")
    with pytest.raises(UserError, match="vLLM is not installed for CUDA"):
        answer_engine(VLLM, "none", workers=on_gpus)
    assert answer_engine(VLLM, "none", workers=PickledModels()).name == "vllm"


# Answers


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerEngine:
    """vLLM on each machine, played by the stand-in: it answers 1, 2, 3, … and ends on a stop token."""
    install_fake(monkeypatch, tmp_path)
    return answer_engine(VLLM, "none", workers=PickledModels())


def _generator(base: Base, work: Path, engine: AnswerEngine, workers: PickledModels | None) -> Generator:
    chat = open_chat(base)
    return Generator(base, chat, "float32", "none", 4, work, Listener(), engine=engine, rank=4, workers=workers)


def _vllm() -> VllmEngine:
    (loaded,) = answer_worker._loaded.values()
    assert isinstance(loaded, answer_worker._Vllm)
    assert loaded.answers._engine is not None
    return loaded.answers._engine


def _process() -> int:
    return _vllm().child.process_id or 0


def _seen() -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(_vllm().child.socket))) as client:
        seen: dict[str, Any] = client.get("http://vllm/metrics").json()
        return seen


def test_workers_vllm_answers_as_vllm_without_a_cluster(
    base: Base, adapters: list[Adapter], engine: AnswerEngine, tmp_path: Path
) -> None:
    workers = PickledModels()
    here, there = (_generator(base, tmp_path / str(n), engine, on) for n, on in enumerate((None, workers)))
    prompts = [(n, 5) for n in range(1, 20)]
    for adapter in (None, *adapters[:2], None):
        assert there.answer("x", prompts, 3, adapter) == here.answer("x", prompts, 3, adapter)
    assert workers.sizes == [7, 6, 6] * 3, "the last arm is in the journal"
    journals = [
        {file.name: set(file.read_text().split("\n")) for file in one.folder.iterdir()} for one in (here, there)
    ]
    assert len(journals[0]) == 3
    assert journals[0] == journals[1]
    assert (there.used, there.inputs, there._vllm) == (here.used, here.inputs, None)
    seen = _seen()
    assert seen["most_at_once"] == 7, "a part, of which four decode at once"
    assert seen["environment"]["OMP_NUM_THREADS"] == "1"


def test_ended_worker_leaves_neither_vllm_nor_files(
    base: Base, adapters: list[Adapter], engine: AnswerEngine, tmp_path: Path, temporary: Path
) -> None:
    there = _generator(base, tmp_path / "work", engine, PickledModels())
    there.answer("x", [(1, 5)], 3, adapters[0])
    process = _process()
    kept = list(temporary.glob(f"tunewright-engine-*/{adapters[0].digest}/adapter_model.safetensors"))
    assert (len(kept), alive(process)) == (1, True)
    answer_worker.unload()
    assert not alive(process)
    assert not list(temporary.glob("tunewright-engine-*"))


def test_worker_with_another_model_ends_the_first_one(base: Base, engine: AnswerEngine, tmp_path: Path) -> None:
    _generator(base, tmp_path / "work", engine, PickledModels()).answer("x", [(1, 5)], 3)
    process = _process()
    peft = Generator(base, open_chat(base), "float32", "none", 4, tmp_path / "w", Listener(), workers=PickledModels())
    peft.answer("x", [(1, 5)], 3)
    assert not alive(process)


def test_noise_floor_of_workers_shares_no_cached_prefix(base: Base, engine: AnswerEngine, tmp_path: Path) -> None:
    generator = _generator(base, tmp_path / "work", engine, PickledModels())
    members = [
        Member(Example((Message("user", str(n)), Message("assistant", "x"))), f"{n:064x}", "test", str(n))
        for n in range(12)
    ]
    noise = noise_floor(generator, members, [(n, 5) for n in range(12)], 3, scorer_of("exact_match", tmp_path), seed=0)
    assert (noise.items, noise.changed) == (12, 0)
    assert "with vllm: batches of 4, then of 2 in another order" in noise.how
    # The second pass finds nothing of the first in the cache, also in the same worker.
    salt = hmac.new(_vllm()._secret, b"noise floor, 2 at once", hashlib.sha256).hexdigest()
    assert _seen()["body"]["cache_salt"] == salt


def test_stopped_vllm_names_its_machine_and_the_next_batch_starts_it_again(
    base: Base, engine: AnswerEngine, tmp_path: Path
) -> None:
    generator = _generator(base, tmp_path / "work", engine, PickledModels())
    with pytest.raises(UserError, match=r"The machine .*: vLLM stopped before all answers were complete"):
        generator.answer("x", [(DIE,)], 3)
    assert [answer.truncated for answer in generator.answer("x", [(1, 5)], 3)] == [True]


def test_machine_that_joins_later_with_another_vllm_is_refused(
    base: Base, engine: AnswerEngine, tmp_path: Path
) -> None:
    place = environment.default_folder(environment.VLLM, "cpu") / environment.MARK
    mark = json.loads(place.read_text())
    write_json(place, {**mark, "versions": {**mark["versions"], "vllm": "0.31.0"}})
    generator = _generator(base, tmp_path / "work", engine, PickledModels())
    with pytest.raises(UserError, match=r"Its vLLM differs from another machine's: vllm 0\.31\.0 with torch"):
        generator.answer("x", [(1, 5)], 3)
