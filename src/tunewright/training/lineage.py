"""What an adapter was made of, by digest and version."""

from __future__ import annotations

import platform
from importlib.metadata import version as package_version
from typing import Any

from tunewright.adapters.system_prompt import KEY as SYSTEM_PROMPT
from tunewright.adapters.system_prompt import count_system_turns
from tunewright.chat import ChatFormat
from tunewright.config import Config, Quantize
from tunewright.core.clock import now
from tunewright.data.splits import SPLITS
from tunewright.data.versions import DatasetVersion
from tunewright.models.bases import Base

_PACKAGES = ("tunewright", "torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors")


def packages(quantize: Quantize) -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, of a base that is held so."""
    names = (*_PACKAGES, "bitsandbytes") if quantize == "nf4" else _PACKAGES
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def training_lineage(config: Config, version: DatasetVersion, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Everything but the training's own numbers; ``created`` is UTC, ISO 8601."""
    return {
        "schema_version": 2,
        "created": now(),
        "dataset": {
            "digest": version.digest,
            "splits": {s: {"digest": version.split_digest(s), "examples": len(version.examples(s))} for s in SPLITS},
            "mix": version.manifest.mix.model_dump(mode="json") if version.manifest.mix else None,
        },
        SYSTEM_PROMPT: count_system_turns(version.domain_of("train")),
        "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
        "template_digest": chat.digest,
        "chat": chat.description,
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "packages": packages(config.train.quantization),
    }
