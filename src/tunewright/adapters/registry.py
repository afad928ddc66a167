"""Adapters on disk: one immutable folder each, ``adapters/NAME-DIGEST12``, holding weights, lineage and history.

NAME-DIGEST12/
  adapter_config.json, adapter_model.safetensors   what peft and vLLM load
  lineage.json                                     what it was made of, by digest
  manifest.json, signature.json                    every file's digest, and who stands for them (manifest.py)
  metrics.jsonl                                    loss, dev loss, dev metric, speed by step
  replay.jsonl                                     what the base wrote and the adapter was trained on, where it was
  checkpoints/step-N/                              the adapter at other evaluations: the best and the last
  local.json                                       what only this project knows of it; no part of the manifest
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.adapters.keys import PrivateKey
from tunewright.adapters.manifest import LOCAL, MANIFEST, changes, make_manifest, read_manifest
from tunewright.adapters.signing import sign
from tunewright.adapters.vllm_compat import CONFIG as CONFIG
from tunewright.adapters.vllm_compat import WEIGHTS as WEIGHTS
from tunewright.adapters.vllm_compat import check_adapter
from tunewright.config import Quantize
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, new_folder, text_lines, write_json, write_text

LINEAGE = "lineage.json"
HISTORY = "metrics.jsonl"
REPLAY = "replay.jsonl"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Adapter:
    """A stored adapter."""

    folder: Path

    @property
    def name(self) -> str:
        """NAME-DIGEST12, as the server and the command line call it."""
        return self.folder.name

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What the adapter was made of."""
        path = self.folder / LINEAGE
        try:
            lineage: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"not a lineage that can be read: {error}", where=str(path)) from None
        if not isinstance(lineage, dict) or not {"created", "digest"} <= lineage.keys():
            raise UserError("not a lineage: it does not say when the adapter was made, or its digest", where=str(path))
        return lineage

    @property
    def digest(self) -> str:
        """SHA-256 over the weights and the LoRA configuration."""
        return str(self.lineage["digest"])

    @property
    def dataset(self) -> str | None:
        """The digest of the dataset version that it was trained on; None of a foreign adapter, which does not say."""
        return str(self.lineage["dataset"]["digest"]) if "dataset" in self.lineage else None

    @property
    def quantize(self) -> Quantize:
        """How the base was held while it was trained."""
        # Before there was the key, every base was held whole.
        held: Quantize = self.lineage.get("config", {}).get("train", self.lineage).get("quantization", "none")
        return held

    @property
    def local(self) -> dict[str, Any]:
        """What only this project knows of it: ``also_inputs`` that came to the same one, how it was ``imported``."""
        path = self.folder / LOCAL
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def was_trained_by(self, inputs_digest: str) -> bool:
        """Return whether these inputs (dataset, base, template, config, seed) made this adapter."""
        return inputs_digest in (*self._trained_by, *self.local.get("also_inputs", []))

    @property
    def imported(self) -> dict[str, Any] | None:
        """Where and how it was imported; None of one that was trained here."""
        found: dict[str, Any] | None = self.local.get("imported")
        return found

    @property
    def _trained_by(self) -> tuple[str, ...]:
        # What a stranger claims to have trained on must not keep the project from training.
        believed = self.imported is None or self.imported["signed"]
        return (self.lineage["inputs_digest"],) if believed and "inputs_digest" in self.lineage else ()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The run's metrics, oldest first: ``step``, ``epoch``, and a step's ``loss`` or an evaluation's ``eval_loss``.

        A step also has ``learning_rate``, ``grad_norm`` before clipping, and ``tokens_per_s``; an evaluation
        ``eval_metric``, the share that the config's metric gives. A foreign adapter has none.
        """
        file = self.folder / HISTORY
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    @property
    def replayed(self) -> list[list[dict[str, Any]]]:
        """The messages of each conversation that the base wrote and this was trained on; empty without replay."""
        file = self.folder / REPLAY
        if not file.exists():
            return []
        return [json.loads(line)["messages"] for line in text_lines(file.read_text(encoding="utf-8"))]

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The adapter at other evaluations: ``step-N`` to its folder, earliest first."""
        folders = (self.folder / CHECKPOINTS).glob("step-*")
        return {f.name: f for f in sorted(folders, key=lambda f: int(f.name.removeprefix("step-")))}

    def checkpoint(self, step: str) -> Path:
        """Return the folder of the adapter at another evaluation.

        Raises:
            UserError: there is none of that name.
        """
        if step not in self.checkpoints:
            there = ", ".join(self.checkpoints) or "none"
            raise UserError(f"it has no checkpoint {step!r}", where=self.name, fix=f"There are: {there}.")
        return self.checkpoints[step]

    def verify(self, step: str | None = None) -> None:
        """Check that weights, configuration and lineage (and a checkpoint's files) are what they were when stored.

        All files and the signatures are what :func:`tunewright.adapters.trust.standing` looks at.

        Raises:
            UserError: a file is missing or has changed.
        """
        folder = self.folder if step is None else self.checkpoint(step)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
        if missing:
            raise UserError(f"missing: {', '.join(missing)}", where=str(folder))
        manifest = read_manifest(self.folder)
        within = "" if step is None else f"{CHECKPOINTS}/{step}/"
        told = [] if manifest is None else changes(self.folder, manifest, (LINEAGE, within + CONFIG, within + WEIGHTS))
        if told or (step is None and adapter_digest(self.folder) != self.digest):
            raise UserError(
                f"the adapter's files are not the ones that were stored: {', '.join(told) or 'another digest'}",
                where=str(self.folder),
                fix="Remove the folder and train again; the training data and config are still there.",
            )


def require_digest(folder: Path, expected: str) -> None:
    """Check that an adapter's files are those that a digest was taken of.

    Raises:
        UserError: they are others.
    """
    if adapter_digest(folder) != expected:
        raise UserError(
            "the adapter's files have changed since they were stored",
            where=str(folder),
            fix="Copy the adapter here again from where it was trained, or train it again.",
        )


def adapter_digest(folder: Path) -> str:
    """SHA-256 over an adapter's weights and LoRA configuration."""
    return digest({name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)})


def store_adapter(
    adapters: Path,
    name: str,
    weights: Path,
    checkpoints: Mapping[str, Path],
    lineage: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    *,
    servable: bool,
    texts: Mapping[str, str] | None = None,
    signer: PrivateKey | None = None,
) -> Adapter:
    """Copy a trained adapter (and its earlier checkpoints) into a folder named by its digest.

    Other inputs may come to the very same adapter: the one that is there keeps its lineage, and local.json names them.
    ``texts`` are further files of the folder, by name; ``signer`` signs the manifest of them all.

    Raises:
        UserError: a weight that is no finite number, or (if it is to be ``servable``) what vLLM would not load.
    """
    for source in (weights, *checkpoints.values()):
        check_adapter(source, servable=servable)
    identity = adapter_digest(weights)
    folder = adapters / f"{name}-{identity[:12]}"
    for cut_off in adapters.glob(f".{folder.name}.*"):  # a process that stored this very adapter was killed
        shutil.rmtree(cut_off, ignore_errors=True)
    with new_folder(folder) as temporary:
        _copy(weights, temporary)
        for step, source in checkpoints.items():
            _copy(source, temporary / CHECKPOINTS / step)
        write_json(temporary / LINEAGE, {**lineage, "digest": identity})
        write_text(temporary / HISTORY, "".join(json.dumps(row) + "\n" for row in history))
        for file, text in (texts or {}).items():
            write_text(temporary / file, text)
        write_manifest(temporary, folder.name)
        if signer is not None:
            sign(temporary, signer)
    stored = Adapter(folder)
    if not stored.was_trained_by(lineage["inputs_digest"]):
        # No part of the manifest, which is signed: it only says which trainings need not be done again.
        also = [*stored.local.get("also_inputs", []), lineage["inputs_digest"]]
        write_json(folder / LOCAL, {**stored.local, "also_inputs": also})
    return stored


def write_manifest(folder: Path, name: str) -> None:
    """Write the manifest of what is in ``folder`` now, as the adapter called ``name``."""
    lineage = Adapter(folder).lineage
    write_text(folder / MANIFEST, make_manifest(folder, name, lineage).text.decode())


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, target / name)


def list_adapters(adapters: Path) -> list[Adapter]:
    """Return all stored adapters, the newest last.

    Raises:
        UserError: a lineage that cannot be read.
    """
    found = [Adapter(lineage.parent) for lineage in adapters.glob(f"[!.]*/{LINEAGE}")]
    return sorted(found, key=lambda a: (a.lineage["created"], a.name))


def find_adapter(adapters: Path, name: str | None = None) -> Adapter:
    """Return the adapter called ``name`` (a beginning that only one has will do); the newest where no name is given.

    Of those trained here, if there is any: what came in by import is meant only where it is named.

    Raises:
        UserError: there is none, or more than one begins so.
    """
    known = list_adapters(adapters)
    if not known:
        raise UserError("no adapter has been trained yet", where=str(adapters), fix="`tunewright train` makes one.")
    if name is None:
        return ([each for each in known if each.imported is None] or known)[-1]
    matches = [a for a in known if a.name == name] or [a for a in known if a.name.startswith(name)]
    if len(matches) != 1:
        what = f"{len(matches)} adapters begin with {name!r}" if matches else f"no adapter is called {name!r}"
        raise UserError(what, where=str(adapters), fix=f"There are: {', '.join(a.name for a in known)}.")
    return matches[0]
