"""Letting one adapter in: into quarantine, checked, and among the project's own only if nothing is wrong with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.admission.archives import take_archive
from tunewright.adapters.admission.config import ForeignConfig, read_config
from tunewright.adapters.admission.metadata import check_history, check_lineage, check_replay
from tunewright.adapters.admission.quarantine import LARGEST, MEGABYTE, README, Intake, quarantine, take_folder
from tunewright.adapters.admission.weights import base_norms, check_numbers, check_shapes
from tunewright.adapters.fit import require_fit
from tunewright.adapters.keys import NAME, TrustedKeys
from tunewright.adapters.manifest import LOCAL, MANIFEST, SIGNATURE, Manifest, changes, read_manifest
from tunewright.adapters.registry import (
    CONFIG,
    HISTORY,
    LINEAGE,
    REPLAY,
    WEIGHTS,
    Adapter,
    adapter_digest,
    write_manifest,
)
from tunewright.adapters.signing import weigh
from tunewright.adapters.system_prompt import KEY as SYSTEM_PROMPT
from tunewright.adapters.system_prompt import stated_system_prompt
from tunewright.config import Quantize
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import new_folder, write_json, writing
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.models.memory.shape import read_shape

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


@dataclass(frozen=True)
class Statement:
    """What whoever imports an adapter says of it, since it does not say so itself."""

    by: str | None
    base_matches: bool = False
    """It was trained on this project's base, with its chat format."""
    quantize: Quantize | None = None
    """How the base was held in training."""
    unsigned: bool = False
    """It may come in without a signature of a key that the project trusts."""
    name: str | None = None
    """What it is to be called."""
    system_prompt: str | None = None
    """The system turn that all its training rows had."""


@dataclass(frozen=True)
class Admitted:
    """An adapter that was let in."""

    adapter: Adapter
    new: bool
    """False where the same one was there already."""
    signed: Literal["signed", "untrusted", "unsigned"]
    lineage: Literal["its own", "stated"]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "adapter": self.adapter.name,
            "folder": str(self.adapter.folder),
            "new": self.new,
            "signed": self.signed,
            "lineage": self.lineage,
        }


class Admission:
    """A project's gate for foreign adapters.

    Args:
        adapters: where its adapters are.
        trusted: its keys.
        base, chat: what an adapter has to be for.
        reporter: shows progress, hears what is left behind.
    """

    def __init__(self, adapters: Path, trusted: TrustedKeys, base: Base, chat: ChatFormat, reporter: Reporter) -> None:
        self._adapters = adapters
        self._trusted = trusted
        self._base = base
        self._chat = chat
        self._reporter = reporter
        self._shape = read_shape(base.folder / "config.json")

    def admit(self, source: Path, said: Statement) -> Admitted:
        """Check the adapter in a folder or archive, and store it.

        Raises:
            UserError: why it is not let in; then nothing is stored.
        """
        with quarantine(self._adapters.parent) as place, _told_of(source, place / "adapter"):
            files = place / "adapter"
            files.mkdir()
            self._take(source, place, files)
            configs = self._configs(files, str(source))
            config = configs[files]
            self._require_statement(files, config, source, said)
            manifest = read_manifest(files)
            signed = self._check_signature(files, manifest, source, said)
            stem = self._name(files, manifest, source, said)
            self._check_records(files, configs, str(source))
            lineage = self._lineage(files, config, source, said)
            # What takes longest comes last: it reads the base's weights.
            self._check_weights(files, configs, str(source))
            name = f"{stem}-{adapter_digest(files)[:12]}"
            if manifest is not None and manifest.name != name:
                raise UserError(f"its manifest is that of {manifest.name}, and it is {name}", where=str(source))
            if manifest is None:
                write_manifest(files, name)
            record = {"at": now(), "by": said.by, "source": source.name, "signed": signed == "signed"}
            write_json(files / LOCAL, {"imported": record})
            target = self._adapters / name
            new = not target.exists()
            if new:
                with new_folder(target) as temporary:
                    for entry in files.iterdir():
                        entry.replace(temporary / entry.name)
            return Admitted(Adapter(target), new, signed, lineage)

    def _take(self, source: Path, place: Path, files: Path) -> None:
        """Copy what is there into quarantine, and look at nothing but the copy from then on."""
        intake = Intake(files, str(source))
        if source.is_dir():
            take_folder(source, intake)
        else:
            archive = place / ".archive"
            with writing(place):
                _copy_file(source, archive)
            take_archive(archive, intake)
        missing = [name for name in (CONFIG, WEIGHTS) if name not in intake.files]
        if missing:
            raise UserError(f"no {' and no '.join(missing)}: it is no adapter", where=str(source))
        for name in (README, LOCAL):
            if name in intake.files:
                (files / name).unlink()
                self._reporter.say(f"{name} is not taken along.")

    def _configs(self, files: Path, where: str) -> dict[Path, ForeignConfig]:
        """Return the configurations, by folder: the adapter's own, and those of its earlier checkpoints."""
        return {
            path.parent: read_config(
                path.read_bytes(), self._shape, self._base.architecture, f"{where}, {path.relative_to(files)}"
            )
            for path in sorted(files.rglob(CONFIG))
        }

    def _check_records(self, files: Path, configs: Mapping[Path, ForeignConfig], where: str) -> None:
        """Check that earlier checkpoints are whole, and that what is said of a training is of one."""
        weights = {path.parent for path in files.rglob(WEIGHTS)}
        for folder in sorted(weights ^ configs.keys()):
            lacking = CONFIG if folder in weights else WEIGHTS
            raise UserError(f"it is missing: {lacking}", where=f"{where}, {folder.relative_to(files)}")
        beside = [n for n in (HISTORY, REPLAY, MANIFEST, SIGNATURE) if (files / n).exists()]
        if (beside or len(configs) > 1) and not (files / LINEAGE).exists():
            what = beside[0] if beside else "earlier checkpoints"
            raise UserError(f"it has {what}, and no {LINEAGE} that they could belong to", where=where)
        if (files / HISTORY).exists():
            check_history(files / HISTORY, f"{where}, {HISTORY}")
        if (files / REPLAY).exists():
            check_replay(files / REPLAY, f"{where}, {REPLAY}")

    def _check_weights(self, files: Path, configs: Mapping[Path, ForeignConfig], where: str) -> None:
        """Check all weights: headers and shapes first, then the numbers against the base's."""
        for folder, config in configs.items():
            path = folder / WEIGHTS
            check_shapes(path, config, f"{where}, {path.relative_to(files)}")
        modules = {module: None for config in configs.values() for module in config.modules}
        with self._reporter.task("measuring the base's weights", len(modules), "layers") as task:
            norms = base_norms(self._base.folder, modules, task)
        for folder, config in configs.items():
            path = folder / WEIGHTS
            check_numbers(path, config, norms, f"{where}, {path.relative_to(files)}")

    def _require_statement(self, files: Path, config: ForeignConfig, source: Path, said: Statement) -> None:
        """Ask for the user's word where the adapter has no lineage that names its base by digest."""
        if (files / LINEAGE).exists() or said.base_matches:
            return
        named = f" (it names {config.names_base[:120]!a}, which proves nothing)" if config.names_base else ""
        raise UserError(
            f"it does not say by digest which base and chat template it was trained with{named}",
            where=str(source),
            fix=f"If you know that it was {self._base.spec} as it is here, and this project's chat template: "
            "--base-matches. Its lineage then says that you said so.",
        )

    def _check_signature(
        self, files: Path, manifest: Manifest | None, source: Path, said: Statement
    ) -> Literal["signed", "untrusted", "unsigned"]:
        """What its signatures are worth; a broken one keeps it out, and so does none where the project trusts keys."""
        if manifest is None and (files / SIGNATURE).exists():
            raise UserError(f"a signature, and no {MANIFEST} that it could be of", where=str(source))
        if manifest is not None and (told := changes(files, manifest)):
            raise UserError(f"it is not what its manifest says: {', '.join(told)}", where=str(source))
        signed = weigh(files, self._trusted) if manifest is not None else []
        worth = {each.worth: each.why for each in signed}
        for bad in ("tampered", "revoked"):
            if bad in worth:
                raise UserError(worth[bad], where=str(source))
        if "signed" in worth:
            return "signed"
        state: Literal["untrusted", "unsigned"] = "untrusted" if worth else "unsigned"
        if self._trusted.valid and not said.unsigned:
            raise UserError(
                f"it is {state}, and this project trusts keys",
                where=str(source),
                fix="Trust who signed it (tunewright keys trust FILE); or let it in all the same with --unsigned.",
            )
        return state

    def _name(self, files: Path, manifest: Manifest | None, source: Path, said: Statement) -> str:
        """Return what it is called, before the digest."""
        if manifest is not None:
            if said.name is not None:
                raise UserError(f"its manifest names it: {manifest.name}", where="--name", fix="Leave it out.")
            return manifest.name[:-13]
        stem = said.name or source.resolve().name.partition(".tar")[0].removesuffix(".zip").removesuffix(".tgz")
        suffix = f"-{adapter_digest(files)[:12]}"
        stem = stem.removesuffix(suffix)
        if not NAME.fullmatch(stem + suffix):
            raise UserError(
                f"{stem[:80]!a} is no name: small letters, digits, and . _ - after the first, 50 at most",
                where="--name" if said.name else str(source),
                fix="Give it one: --name NAME",
            )
        return stem

    def _lineage(
        self, files: Path, config: ForeignConfig, source: Path, said: Statement
    ) -> Literal["its own", "stated"]:
        """Hold its lineage to the base and the chat format here; where it has none, write down what is stated."""
        path = files / LINEAGE
        if path.exists():
            if said.base_matches or said.quantize is not None:
                option = "--base-matches" if said.base_matches else "--quantize"
                raise UserError("its lineage says so by digest", where=option, fix="Leave it out.")
            if said.system_prompt is not None:
                raise UserError("It has a lineage of its own.", where="--system-prompt", fix="Leave it out.")
            check_lineage(path.read_bytes(), f"{source}, {LINEAGE}")
            adapter = Adapter(files)
            if adapter.lineage["digest"] != adapter_digest(files):
                raise UserError("its lineage is that of other weights", where=f"{source}, {LINEAGE}")
            if adapter.lineage["template_digest"] != self._chat.digest:
                told = "it was trained with another chat template"
                raise UserError(told, where=f"{source}, {LINEAGE}, template_digest")
            try:
                require_fit(adapter, self._base, self._chat)
            except UserError as error:
                raise UserError(error.what, where=str(source), fix=error.fix) from None
            return "its own"
        if config.names_base not in (None, self._base.spec):
            self._reporter.warn(
                f"It names the base {config.names_base!a}; you state that it was trained on {self._base.spec}."
            )
        write_json(path, self._stated(files, config, said))
        return "stated"

    def _stated(self, files: Path, config: ForeignConfig, said: Statement) -> Mapping[str, Any]:
        base = self._base
        return {
            "schema_version": 2,
            "created": now(),
            "digest": adapter_digest(files),
            "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
            "template_digest": self._chat.digest,
            "chat": self._chat.description,
            "quantization": said.quantize or "none",
            **({} if said.system_prompt is None else {SYSTEM_PROMPT: stated_system_prompt(said.system_prompt)}),
            "stated": {"by": said.by, "names_base": config.names_base},
        }


@contextmanager
def _told_of(source: Path, files: Path) -> Iterator[None]:
    """Have errors name the file as it came, not its copy, which is gone by the time they are read."""
    try:
        yield
    except UserError as error:
        where = error.where and error.where.replace(str(files), str(source))
        raise UserError(error.what, where=where, fix=error.fix) from None


def _copy_file(source: Path, target: Path) -> None:
    """Copy a plain file of at most so many bytes as an adapter may have."""
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep a reader waiting
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(source)) from None
    with os.fdopen(handle, "rb") as file, target.open("xb") as copy:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError("neither a folder nor a plain file", where=str(source))
        copied = 0
        while chunk := file.read(MEGABYTE):
            copied += len(chunk)
            if copied > LARGEST + MEGABYTE:
                raise UserError(f"over {LARGEST // MEGABYTE:,} MB: more than an adapter has", where=str(source))
            copy.write(chunk)
