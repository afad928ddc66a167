"""Each replica's share of the machine, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded_engine import Recorded, running

from tiny import byte_tokenizer, chat_of
from tunewright.config import Config, ServeConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models.bases import Base
from tunewright.serving.engines.autoscaler import ScalingState
from tunewright.serving.engines.start import EngineSpec
from tunewright.serving.engines.start_replicas import autoscaler_of, machine_shares, start_engines

SPEC = EngineSpec(Base("base", Path("missing"), None, "LlamaForCausalLM", {}), chat_of(byte_tokenizer()), "none", {})


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1"]), ("2, 5,7", ["2", "5"])])
def test_each_replica_gets_a_gpu_of_those_that_the_server_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    _gpus(monkeypatch, 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shares = machine_shares(2)
    assert [share.name for share in shares] == ["replica-1", "replica-2"]
    assert [share.variables["CUDA_VISIBLE_DEVICES"] for share in shares] == expected


@pytest.mark.parametrize(("threads", "replicas", "expected"), [(16, 4, "4"), (7, 2, "3"), (2, 4, "1")])
def test_replicas_without_a_gpu_share_the_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, replicas: int, expected: str
) -> None:
    _gpus(monkeypatch, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert {share.variables["OMP_NUM_THREADS"] for share in machine_shares(replicas)} == {expected}


def test_more_replicas_than_gpus_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 1)
    with pytest.raises(UserError, match="Too few GPUs for 2 replicas: 1"):
        start_engines("peft", Config(serve=ServeConfig(replicas=2)), SPEC, LogReporter())


def test_most_replicas_are_counted_against_the_gpus_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"serve\.max_replicas: Too few GPUs for 3 replicas: 2"):
        start_engines("peft", Config(serve=ServeConfig(max_replicas=3)), SPEC, LogReporter())


def test_most_replicas_below_the_number_at_the_start_are_refused() -> None:
    serve = ServeConfig(max_replicas=2).model_copy(update={"replicas": 3})  # as by --replicas 3
    with pytest.raises(UserError, match=r"serve\.max_replicas: At most 2 replicas, but at least 3"):
        start_engines("peft", Config().model_copy(update={"serve": serve}), SPEC, LogReporter())


def test_number_of_replicas_follows_the_load_only_between_two_different_limits() -> None:
    fixed, varying = ServeConfig(replicas=2, max_replicas=2), ServeConfig(replicas=1, max_replicas=2)
    with running({"replica-1": Recorded()}) as replicas:
        assert autoscaler_of(replicas, Config(serve=fixed), LogReporter()) is None
        autoscaler = autoscaler_of(replicas, Config(serve=varying), LogReporter())
        assert autoscaler is not None
        assert autoscaler.state == ScalingState(wanted=1, present=1, added=0, removed=0, failures=0)


def test_limit_of_adapters_is_refused_with_llama_cpp() -> None:
    with pytest.raises(UserError, match=r"serve\.adapters_per_replica: llama\.cpp restarts"):
        start_engines("llamacpp", Config(serve=ServeConfig(adapters_per_replica=2)), SPEC, LogReporter())
