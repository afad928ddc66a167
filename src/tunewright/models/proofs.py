"""The result of proving a base: what training and decoding compute of it as transformers does, and what they do not."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright._version import __version__
from tunewright.core.io import digest, write_json
from tunewright.render.blocks import Block, Cell, table, words

Name = Literal["layers", "packing", "cache", "adapter", "memory"]

CODE = 2
"""Number of the proofs' code: it changes when a proof does, and then bases are proved again."""

MEANING: dict[Name, str] = {
    "layers": "The loaded model computes what the config describes, and LoRA reaches every linear layer",
    "packing": "Packed rows that share prefixes have the losses and gradients of separate rows",
    "cache": "Decoding with shared prefixes and mixed adapters computes what a pass over the whole text computes",
    "adapter": "A saved adapter computes the same in peft, merged by peft, and in the engine `peft`",
    "memory": "NF4 quantizes every weight matrix of the decoder layers",
}


class Proof(BaseModel):
    """One proof of a base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    passed: bool
    reason: str | None
    """The reason of a failure; None if it passed."""
    seconds: float


class Proofs(BaseModel):
    """The proofs of a base, by its configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    identity: str
    """Digest of the configuration, and of the versions that computed the proofs."""
    proofs: tuple[Proof, ...]

    def reason(self, name: Name) -> str | None:
        """Return why a proof failed; None if it passed."""
        return next(proof.reason for proof in self.proofs if proof.name == name)

    @property
    def layers(self) -> bool:
        """True if the base can be trained at all."""
        return self.reason("layers") is None

    @property
    def packed(self) -> bool:
        """True if rows are packed and share prefixes; else they are padded."""
        return self.reason("packing") is None

    @property
    def own_cache(self) -> bool:
        """True if decoding uses tunewright's cache; else transformers' own."""
        return self.reason("cache") is None


def blocks(result: Proofs) -> list[Block]:
    """Return the table of proofs."""
    rows = (
        (
            each.name,
            Cell("passed", tone="yes") if each.passed else Cell("failed", tone="no"),
            MEANING[each.name] if each.reason is None else each.reason,
            f"{each.seconds:.1f} s",
        )
        for each in result.proofs
    )
    head = words("Proof", "Result", "Meaning, or why it failed", "Time")
    return [table(f"Proofs of {result.architecture}", head, rows)]


def identity(config: dict[str, Any]) -> str:
    """Return the digest under which a configuration's proofs are kept."""
    versions = [version(name) for name in ("transformers", "torch", "peft")]
    # As text, because some configurations have infinite numbers.
    return digest([CODE, __version__, *versions, json.dumps(config, sort_keys=True)])


def read_kept(key: str) -> Proofs | None:
    """Return the kept proofs of this identity; None if the base has not been proved."""
    try:
        return Proofs.model_validate_json(_file(key).read_bytes())
    except (OSError, ValidationError):
        return None


def keep(proofs: Proofs) -> None:
    """Keep the proofs for later commands."""
    _file(proofs.identity).parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(proofs.identity), proofs.model_dump())


def _file(key: str) -> Path:
    return platformdirs.user_cache_path("tunewright") / "proofs" / f"{key[:32]}.json"
