"""The choice of the engine that computes the answers of an evaluation and the base's self-samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.adapters.vllm_compat import CONFIG, vllm_refusals
from tunewright.config import Config, Quantization
from tunewright.core.errors import UserError
from tunewright.engines import environment
from tunewright.engines.environment import VLLM, Environment
from tunewright.models.loading import device

_WHERE = "evaluate.engine"


@dataclass(frozen=True)
class AnswerEngine:
    """The engine of an evaluation.

    One engine answers every arm. With two, a contrast would take the difference between the engines for one between
    the arms.

    Args:
        name: "peft" is the embedded loop on transformers and peft.
        why: the reason, for display.
        environment: vLLM's environment; None with peft.
    """

    name: Literal["peft", "vllm"]
    why: str
    environment: Environment | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The engine's part in the digest of everything that depends on answers.

        It is empty with peft, so that answers and evidence of older versions, which had no other engine, keep their
        digests.
        """
        return {} if self.name == "peft" else {"engine": self.name}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages in vLLM's environment; empty with peft."""
        if self.environment is None:
            return {}
        return {name: str(self.environment.versions[name]) for name in ("vllm", "torch")}


EMBEDDED = AnswerEngine("peft", "it is built in")


def answer_engine(
    config: Config,
    quantization: Quantization,
    *,
    adapter: Path | None = None,
    constrained: bool = False,
    workers: Literal["cpu", "cuda"] | None = None,
) -> AnswerEngine:
    """Choose the engine by ``evaluate.engine``: ``auto`` takes vLLM if there is a CUDA card and vLLM's CUDA build.

    Args:
        config: names the engine, and the adapters that will be trained.
        quantization: the precision of the base's weights.
        adapter: folder of the adapter that will answer; None: the config will train it, or the base answers.
        constrained: some answers must match a grammar.
        workers: device of a cluster's workers, which answer; None: this machine does.

    Raises:
        UserError: the config requires vLLM, which is not installed or cannot compute these answers.
    """
    chosen = config.evaluate.engine
    if chosen == "peft":
        return AnswerEngine("peft", f"{_WHERE} says so")
    if workers is not None:
        refuse_vllm_on_cluster(config)
    obstacle = _obstacle(config, quantization, adapter, constrained=constrained)
    if chosen == "vllm":
        if obstacle is not None:
            raise UserError(f"vLLM cannot answer here: {obstacle}", where=_WHERE, fix="Set it to auto or peft.")
        return AnswerEngine("vllm", f"{_WHERE} says so", _installed())
    if (workers or device()) == "cpu":
        return AnswerEngine("peft", "there is no CUDA card")
    if workers is not None:
        return AnswerEngine("peft", "vLLM does not answer on a cluster")
    if obstacle is not None:
        return AnswerEngine("peft", obstacle)
    try:
        return AnswerEngine("vllm", "a CUDA card and vLLM's environment are here", environment.find(VLLM, "cuda"))
    except UserError:
        return AnswerEngine("peft", "vLLM is not installed with CUDA (`tunewright engine install vllm` does that)")


def refuse_vllm_on_cluster(config: Config) -> None:
    """Refuse vLLM where the workers of a cluster answer.

    Raises:
        UserError: the config requires it.
    """
    if config.evaluate.engine == "vllm":
        fix = "Set it to auto or peft, or leave out the cluster."
        raise UserError("vLLM does not answer on a cluster", where=_WHERE, fix=fix)


def _installed() -> Environment:
    try:
        return environment.find(VLLM)
    except UserError as error:
        raise UserError(error.what, where=_WHERE, fix="`tunewright engine install vllm`, or set it to peft.") from None


def _obstacle(config: Config, quantization: Quantization, adapter: Path | None, *, constrained: bool) -> str | None:
    """Return why vLLM cannot answer as the embedded loop would; None if it can."""
    if quantization == "nf4":
        return "the base is held in NF4, and vLLM would hold it in 16 bits, which is another model"
    if constrained:
        return (
            "evaluate.structured_outputs takes the embedded loop, and vLLM has another release of the grammar library"
        )
    if adapter is not None:
        model_config: Mapping[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    else:
        model_config = {"use_dora": config.train.use_dora, "r": config.train.lora_r}
    refused = list(vllm_refusals(model_config).values())
    return f"vLLM does not load {', '.join(refused)}" if refused else None
