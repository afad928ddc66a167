"""Which engine computes the answers of an evaluation and the base's own samples, and why it is that one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.adapters.vllm_compat import CONFIG, vllm_refusals
from tunewright.config import Config, Quantize
from tunewright.core.errors import UserError
from tunewright.engines.vllm import environment
from tunewright.engines.vllm.environment import Environment
from tunewright.models.loading import device

_WHERE = "evaluate.engine"


@dataclass(frozen=True)
class AnswerEngine:
    """The engine of a whole evaluation.

    One engine answers every arm: with two, a contrast would count the difference between engines as one between arms.

    Args:
        name: "peft" is the embedded loop over transformers and peft.
        why: the reason, for people.
        environment: vLLM's; None with peft.
    """

    name: Literal["peft", "vllm"]
    why: str
    environment: Environment | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What this engine adds to the digest of whatever rests on answers.

        Empty with peft: answers and evidence of versions that knew no other engine keep their names.
        """
        return {} if self.name == "peft" else {"engine": self.name}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages of vLLM's own environment; empty with peft."""
        if self.environment is None:
            return {}
        return {name: str(self.environment.versions[name]) for name in ("vllm", "torch")}


EMBEDDED = AnswerEngine("peft", "it is built in")


def answer_engine(
    config: Config, quantize: Quantize, *, adapter: Path | None = None, constrained: bool = False
) -> AnswerEngine:
    """Choose the engine by ``evaluate.engine``: ``auto`` takes vLLM where a CUDA card and its CUDA build are there.

    Args:
        config: says which engine, and what adapters will be trained.
        quantize: how the base is held.
        adapter: folder of the adapter that will answer; None where it is yet to be trained by the config, if at all.
        constrained: some answers have to match a grammar.

    Raises:
        UserError: vLLM is asked for, and is not installed or cannot answer this.
    """
    asked = config.evaluate.engine
    if asked == "peft":
        return AnswerEngine("peft", f"{_WHERE} says so")
    obstacle = _obstacle(config, quantize, adapter, constrained=constrained)
    if asked == "vllm":
        if obstacle is not None:
            raise UserError(f"vLLM cannot answer here: {obstacle}", where=_WHERE, fix="Set it to auto or peft.")
        return AnswerEngine("vllm", f"{_WHERE} says so", _installed())
    if device() == "cpu":
        return AnswerEngine("peft", "there is no CUDA card")
    if obstacle is not None:
        return AnswerEngine("peft", obstacle)
    try:
        return AnswerEngine("vllm", "a CUDA card and vLLM's environment are here", environment.find("cuda"))
    except UserError:
        return AnswerEngine("peft", "vLLM is not installed with CUDA (`tunewright engine install vllm` does that)")


def _installed() -> Environment:
    try:
        return environment.find()
    except UserError as error:
        raise UserError(error.what, where=_WHERE, fix="`tunewright engine install vllm`, or set it to peft.") from None


def _obstacle(config: Config, quantize: Quantize, adapter: Path | None, *, constrained: bool) -> str | None:
    """Return why vLLM cannot answer as the embedded loop would; None if it can."""
    if quantize == "nf4":
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
