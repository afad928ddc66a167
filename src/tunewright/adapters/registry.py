"""Adapters on disk, and trust in them: one immutable folder each, ``adapters/NAME-DIGEST12``.

NAME-DIGEST12/
  adapter_config.json, adapter_model.safetensors   loaded by peft and vLLM
  lineage.json                                     its inputs, by digest
  manifest.json, manifest.json.sig                 every file's digest, and signatures over them (manifest.py)
  metrics.jsonl                                    loss, dev loss, dev metric, speed by step
  replay.jsonl                                     conversations written by the base that it was also trained on
  checkpoints/step-N/                              the adapter at other evaluations: the best and the last
  local.json                                       what only this project knows of it; not part of the manifest
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lora_weights import CONFIG as CONFIG
from tunewright.adapters.lora_weights import WEIGHTS as WEIGHTS
from tunewright.adapters.lora_weights import check_adapter, weight_faults
from tunewright.adapters.manifest import LOCAL, MANIFEST, changed_files, make_manifest, read_manifest
from tunewright.adapters.signing import SigningKey, sign, verify_signatures
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, new_folder, text_lines, write_json, write_text
from tunewright.core.numbers import give_number, name_numbered

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.models.bases import Base


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
        """NAME-DIGEST12, the name in the server and on the command line."""
        return self.folder.name

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """The record of the adapter's inputs."""
        path = self.folder / LINEAGE
        try:
            lineage: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"The lineage cannot be read: {error}", where=str(path)) from None
        if not isinstance(lineage, dict) or not {"created", "digest"} <= lineage.keys():
            raise UserError("Not a lineage: created or digest is missing", where=str(path))
        return lineage

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights and the LoRA configuration."""
        return str(self.lineage["digest"])

    @property
    def dataset(self) -> str | None:
        """The digest of the dataset version that it was trained on; None for a foreign adapter without one."""
        return str(self.lineage["dataset"]["digest"]) if "dataset" in self.lineage else None

    @property
    def quantization(self) -> Quantization:
        """The quantization of the base during training."""
        # Lineages without the key are of unquantized bases.
        found: Quantization = self.lineage.get("config", {}).get("train", self.lineage).get("quantization", "none")
        return found

    @property
    def local(self) -> dict[str, Any]:
        """The project's record: other inputs with the same result (``also_inputs``), and the import (``imported``)."""
        path = self.folder / LOCAL
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def was_trained_by(self, inputs_digest: str) -> bool:
        """Return whether these inputs (dataset, base, template, config, seed) produced this adapter."""
        # An unsigned claim about foreign training inputs must not keep the project from training.
        believed = self.imported is None or self.imported["signed"]
        own = (self.lineage["inputs_digest"],) if believed and "inputs_digest" in self.lineage else ()
        return inputs_digest in (*own, *self.local.get("also_inputs", []))

    @property
    def imported(self) -> dict[str, Any] | None:
        """The origin and checks of an import; None for an adapter trained here."""
        found: dict[str, Any] | None = self.local.get("imported")
        return found

    @property
    def history(self) -> list[dict[str, Any]]:
        """The run's metrics, oldest first: ``step``, ``epoch``, and a step's ``loss`` or an evaluation's
        ``eval_loss``.

        A step also has ``learning_rate``, ``grad_norm`` before clipping, ``tokens_per_s`` and ``memory_bytes``; an
        evaluation has ``eval_metric``, from 0 to 1 by the config's metric. A foreign adapter has none.
        """
        file = self.folder / HISTORY
        return read_history(file) if file.exists() else []

    @property
    def replayed(self) -> list[list[dict[str, Any]]]:
        """The messages of each conversation of replay that it was trained on; empty without replay."""
        file = self.folder / REPLAY
        if not file.exists():
            return []
        return [json.loads(line)["messages"] for line in text_lines(file.read_text(encoding="utf-8"))]

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The adapter's folders at other evaluations: ``step-N`` to folder, earliest first."""
        folders = (self.folder / CHECKPOINTS).glob("step-*")
        return {f.name: f for f in sorted(folders, key=lambda f: int(f.name.removeprefix("step-")))}

    def checkpoint(self, step: str) -> Path:
        """Return the folder of the adapter at another evaluation."""
        if step not in self.checkpoints:
            known = ", ".join(self.checkpoints) or "none"
            raise UserError(f"No checkpoint {step!r}", where=self.name, fix=f"Its checkpoints: {known}.")
        return self.checkpoints[step]

    def verify(self, step: str | None = None) -> None:
        """Check that weights, configuration and lineage (and a checkpoint's files) have not changed since they were
        stored.

        :func:`tunewright.adapters.registry.trust_status` checks all files and the signatures.
        """
        folder = self.folder if step is None else self.checkpoint(step)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
        if missing:
            raise UserError(f"Missing files: {', '.join(missing)}", where=str(folder))
        manifest = read_manifest(self.folder)
        within = "" if step is None else f"{CHECKPOINTS}/{step}/"
        checked = (LINEAGE, within + CONFIG, within + WEIGHTS)
        changed = [] if manifest is None else changed_files(self.folder, manifest, checked)
        if changed or (step is None and adapter_digest(self.folder) != self.digest):
            raise UserError(
                f"The adapter's files have changed since they were stored: {', '.join(changed) or 'another digest'}",
                where=str(self.folder),
                fix="Remove the folder and train again. The training data and config are still there.",
            )


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics file, oldest first, without a last line that is still being written."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("The run has no metrics", where=str(file), fix="It was removed, or has not started.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The metrics cannot be read: {error}", where=str(file)) from None
    rows = [_history_row(line, f"{file}:{number}") for number, line in enumerate(text.split("\n")[:-1], start=1)]
    # A foreign adapter may have lines of other kinds.
    return [row for row in rows if "step" in row and ("loss" in row or {"eval_loss", "epoch"} <= row.keys())]


def _history_row(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    values = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {"": ""}
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
        raise UserError("Not a row of metrics", where=where, fix="Restore the file, or train again.")
    return values


def require_digest(folder: Path, expected: str) -> None:
    """Check that an adapter's files have this digest."""
    if adapter_digest(folder) != expected:
        raise UserError(
            "The adapter's files have changed since they were stored",
            where=str(folder),
            fix="Copy the adapter here again, or train it again.",
        )


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and LoRA configuration."""
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
    signer: SigningKey | None = None,
) -> Adapter:
    """Copy a trained adapter (and its earlier checkpoints) into a folder named by its digest.

    Its weights must be finite, and with ``servable`` vLLM must load it. Other inputs may give the same adapter: the
    existing one keeps its lineage, and local.json records them. ``texts`` are further files, by name.
    """
    for source in (weights, *checkpoints.values()):
        check_adapter(source, servable=servable)
    identity = adapter_digest(weights)
    folder = adapters / f"{name}-{identity[:12]}"
    for cut_off in adapters.glob(f".{folder.name}.*"):  # left by a killed process that stored the same adapter
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
    give_number(adapters, folder.name)
    if not stored.was_trained_by(lineage["inputs_digest"]):
        # Not in the signed manifest: it only records which trainings need not be repeated.
        also = [*stored.local.get("also_inputs", []), lineage["inputs_digest"]]
        write_json(folder / LOCAL, {**stored.local, "also_inputs": also})
    return stored


def write_manifest(folder: Path, name: str) -> None:
    """Write the manifest of the files now in ``folder``, for the adapter ``name``."""
    lineage = Adapter(folder).lineage
    write_text(folder / MANIFEST, make_manifest(folder, name, lineage).text.decode())


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, target / name)


def list_adapters(adapters: Path) -> list[Adapter]:
    """Return all stored adapters, the newest last."""
    found = [Adapter(lineage.parent) for lineage in adapters.glob(f"[!.]*/{LINEAGE}")]
    return sorted(found, key=lambda a: (a.lineage["created"], a.name))


def find_adapter(adapters: Path, name: str | None = None) -> Adapter:
    """Return the adapter with this number, name or unique prefix of a name; without a name, the newest.

    The newest is one trained here, if there is any: an imported adapter must be named.
    """
    known = list_adapters(adapters)
    if not known:
        raise UserError("No adapter has been trained yet", where=str(adapters), fix="Run `tunewright train`.")
    if name is None:
        return ([each for each in known if each.imported is None] or known)[-1]
    name = name_numbered(adapters, name) or name
    matches = [a for a in known if a.name == name] or [a for a in known if a.name.startswith(name)]
    if len(matches) != 1:
        what = f"{len(matches)} adapters start with {name!r}" if matches else f"No adapter is named {name!r}"
        raise UserError(what, where=str(adapters), fix=f"Stored adapters: {', '.join(a.name for a in known)}.")
    return matches[0]


def require_compatible(adapter: Adapter, base: Base, chat: ChatFormat) -> None:
    """Check an adapter's files, and that base and chat format are the same as in its training; name the differences."""
    from tunewright.chat.inspection import differences

    adapter.verify()
    if "chat" not in adapter.lineage:
        raise UserError(
            "The lineage does not record the chat format: an earlier tunewright trained this adapter",
            where=adapter.name,
            fix="Train again: tunewright train",
        )
    rendering = differences(adapter.lineage["chat"], chat.description)
    mode = adapter.lineage.get("reasoning", {"mode": chat.reasoning})["mode"]
    if (mode == "strip") is not (chat.reasoning == "strip"):  # the others render alike
        rendering.append(f"chat.reasoning was {mode} and is {chat.reasoning}")
    trained_on = adapter.lineage["base"]
    if trained_on["digest"] != base.digest:
        before, here = trained_on["files"], base.files
        files = sorted(name for name in before | here if before.get(name) != here.get(name))
        differing = [f"other {', '.join(files)}", *rendering]
        raise UserError(
            f"The adapter was trained on {trained_on['spec']} ({trained_on['digest'][:12]}), and the base here is "
            f"{base.spec} ({base.digest[:12]}): {'; '.join(differing)}",
            where=adapter.name,
            fix="Set base_model to the adapter's base, or train again.",
        )
    if rendering:
        raise UserError(
            f"The adapter was trained with another chat format: {'; '.join(rendering)}",
            where=adapter.name,
            fix="Set chat.template, chat.tools, chat.date and chat.reasoning to the values of its training, or train "
            "again.",
        )


def trained_quantization(adapters: Sequence[Adapter]) -> Quantization:
    """Return the base's quantization during the training of these adapters (at least one)."""
    by_kind: dict[Quantization, str] = {a.quantization: a.name for a in adapters}
    if len(by_kind) > 1:
        listed = ", ".join(f"{name} with train.quantization {kind}" for kind, name in by_kind.items())
        raise UserError(
            f"The adapters were trained on differently quantized bases: {listed}",
            where="quantization",
            fix="Use adapters of one kind, or set serve.quantization for all.",
        )
    return next(iter(by_kind))


State = Literal["signed", "unsigned", "untrusted", "not checked", "revoked", "tampered"]


@dataclass(frozen=True)
class TrustStatus:
    """An adapter's trust status in a project.

    *signed*: intact, with a signature of a key that the project trusts. *unsigned*, *untrusted*: intact, but its
    maker is not verified. *not checked*: intact, but without ``ssh-keygen`` its signature cannot be checked.
    *revoked*: signed with a revoked key. *tampered*: changed since it was stored or signed, or not finite.
    """

    adapter: str
    state: State
    keys: tuple[str, ...]
    """The signing keys, by their names in the project, else by their fingerprints."""
    reasons: tuple[str, ...]


def trust_status(adapter: Adapter, trusted: TrustedKeys, *, weights: bool = True) -> TrustStatus:
    """Check every file and signature of a stored adapter; with ``weights`` also that its numbers are finite."""
    try:
        faults = _faults(adapter, weights=weights)
        signed = [] if read_manifest(adapter.folder) is None else verify_signatures(adapter.folder, trusted)
    except UserError as error:
        return TrustStatus(adapter.name, "tampered", (), (str(error).partition("\n")[0],))
    keys = tuple(each.key for each in signed)
    faults += [each.why for each in signed if each.status == "tampered"]
    if faults:
        return TrustStatus(adapter.name, "tampered", keys, tuple(faults))
    for state in ("signed", "revoked", "not checked", "untrusted"):
        if reasons := [each.why for each in signed if each.status == state]:
            return TrustStatus(adapter.name, state, keys, tuple(reasons))
    return TrustStatus(adapter.name, "unsigned", (), ("no signature",))


def _faults(adapter: Adapter, *, weights: bool) -> list[str]:
    """Return the changes since the adapter was stored."""
    manifest = read_manifest(adapter.folder)
    lineage = adapter.lineage
    if manifest is None:  # an earlier tunewright stored it
        adapter.verify()
        faults = []
    else:
        faults = changed_files(adapter.folder, manifest)
        if manifest.name != adapter.name:
            faults.append(f"the manifest names {manifest.name}")
        if not faults and make_manifest(adapter.folder, adapter.name, lineage) != manifest:
            faults = ["the manifest and the lineage disagree"]
        if not faults and adapter_digest(adapter.folder) != manifest.digest:
            faults = ["the digest does not match the weights and configuration"]
    if weights and not faults:
        places = (adapter.folder, *adapter.checkpoints.values())
        faults = [fault for place in places for fault in weight_faults(place / WEIGHTS)]
    return faults


def require_trusted(adapter: Adapter, trusted: TrustedKeys) -> None:
    """Refuse an adapter that has changed or whose key is revoked; if the project trusts keys, also one without their
    signature.
    """
    found = trust_status(adapter, trusted, weights=False)
    unproven = found.state in ("unsigned", "untrusted", "not checked")
    if found.state == "signed" or (unproven and not trusted.required):
        return
    fix = {
        "unsigned": f"If you vouch for it: tunewright adapters sign {adapter.name}",
        "untrusted": "If you trust the signer: tunewright keys trust FILE",
        "not checked": "Install OpenSSH 8.2 or later, or sign it again: tunewright adapters sign",
        "revoked": "Train again, or sign it again if you vouch for it: tunewright adapters sign",
        "tampered": "Remove the folder, and train or import it again.",
    }[found.state]
    why = "; ".join(found.reasons)
    if unproven:
        why += ", and this project requires a trusted signature"
    raise UserError(f"The adapter is {found.state}: {why}", where=adapter.name, fix=fix)
