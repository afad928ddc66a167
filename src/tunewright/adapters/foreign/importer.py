"""Import of one adapter: into quarantine, checked, and stored only if every check passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.compatibility import require_compatible
from tunewright.adapters.foreign.config import ForeignConfig, read_config
from tunewright.adapters.foreign.metadata import check_history, check_lineage, check_replay
from tunewright.adapters.foreign.quarantine import (
    NO_ARCHIVE,
    README,
    QuarantinedFiles,
    quarantine,
    quarantine_folder,
    quarantine_remote,
)
from tunewright.adapters.foreign.weights import base_norms, check_numbers, check_shapes
from tunewright.adapters.import_options import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import DSSE, LOCAL, MANIFEST, NAME, SIGNATURE, Manifest, changed_files, read_manifest
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
from tunewright.adapters.signing import verify_signatures
from tunewright.adapters.system_prompt import KEY as SYSTEM_PROMPT
from tunewright.adapters.system_prompt import stated_system_prompt
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import new_folder, write_json
from tunewright.core.progress import Reporter
from tunewright.core.remote_files import RemoteFiles
from tunewright.models.bases import Base
from tunewright.models.memory.shape import read_shape

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


Source = Path | RemoteFiles
"""A folder, or the URL of an adapter that was pushed."""

SignatureState = Literal["signed", "not checked", "untrusted", "unsigned"]


@dataclass(frozen=True)
class ImportResult:
    """An adapter that was imported."""

    adapter: Adapter
    new: bool
    """False if the same adapter was stored already."""
    signed: SignatureState
    lineage: Literal["its own", "stated"]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "adapter": self.adapter.name,
            "folder": str(self.adapter.folder),
            "new": self.new,
            "signed": self.signed,
            "lineage": self.lineage,
        }


class AdapterImporter:
    """Importer that checks foreign adapters and stores them in a project.

    Args:
        adapters: the project's adapters folder.
        trusted: its keys.
        base, chat: what an adapter must match.
        reporter: shows progress, and reports files that are not imported.
    """

    def __init__(self, adapters: Path, trusted: TrustedKeys, base: Base, chat: ChatFormat, reporter: Reporter) -> None:
        self._adapters = adapters
        self._trusted = trusted
        self._base = base
        self._chat = chat
        self._reporter = reporter
        self._shape = read_shape(base.folder / "config.json")

    def import_adapter(self, source: Source, said: ImportOptions, by: str | None) -> ImportResult:
        """Check the adapter in a folder or at a URL, and store it.

        Raises:
            UserError: the reason for a refusal; then nothing is stored.
        """
        with quarantine(self._adapters.parent) as place, _rename_errors(source, place / "adapter"):
            files = place / "adapter"
            files.mkdir()
            # From here on only the copy is read, so a source that changes meanwhile cannot pass another check.
            self._take(source, files)
            configs = self._configs(files, str(source))
            config = configs[files]
            self._require_statement(files, config, source, said)
            manifest = read_manifest(files)
            signed = self._check_signature(files, manifest, source, said)
            stem = self._name(files, manifest, source, said)
            self._check_records(files, configs, str(source))
            lineage = self._lineage(files, config, source, said, by)
            # The slowest check comes last: it reads the base's weights.
            self._check_weights(files, configs, str(source))
            name = f"{stem}-{adapter_digest(files)[:12]}"
            if manifest is not None and manifest.name != name:
                raise UserError(f"The manifest names {manifest.name}, but the adapter is {name}", where=str(source))
            if manifest is None:
                write_manifest(files, name)
            record = {"at": now(), "by": by, "source": source.name, "signed": signed == "signed"}
            write_json(files / LOCAL, {"imported": record})
            target = self._adapters / name
            new = not target.exists()
            if new:
                with new_folder(target) as temporary:
                    for entry in files.iterdir():
                        entry.replace(temporary / entry.name)
            return ImportResult(Adapter(target), new, signed, lineage)

    def _take(self, source: Source, files: Path) -> None:
        """Copy the source into quarantine; from then on only the copy is read."""
        intake = QuarantinedFiles(files, str(source))
        if isinstance(source, RemoteFiles):
            quarantine_remote(source, intake)
        elif source.is_dir():
            quarantine_folder(source, intake)
        else:
            raise UserError(NO_ARCHIVE, where=str(source), fix="Give the adapter's folder. Unpack an archive first.")
        missing = [name for name in (CONFIG, WEIGHTS) if name not in intake.files]
        if missing:
            raise UserError(f"Not an adapter: {' and '.join(missing)} missing", where=str(source))
        for name in (README, LOCAL):
            if name in intake.files:
                (files / name).unlink()
                self._reporter.say(f"{name} is not imported.")

    def _configs(self, files: Path, where: str) -> dict[Path, ForeignConfig]:
        """Return the configurations by folder: the adapter's own, and those of its earlier checkpoints."""
        return {
            path.parent: read_config(
                path.read_bytes(), self._shape, self._base.architecture, f"{where}, {path.relative_to(files)}"
            )
            for path in sorted(files.rglob(CONFIG))
        }

    def _check_records(self, files: Path, configs: Mapping[Path, ForeignConfig], where: str) -> None:
        """Check that earlier checkpoints are complete, and that training records come with a lineage."""
        weights = {path.parent for path in files.rglob(WEIGHTS)}
        for folder in sorted(weights ^ configs.keys()):
            lacking = CONFIG if folder in weights else WEIGHTS
            raise UserError(f"{lacking} is missing", where=f"{where}, {folder.relative_to(files)}")
        records = [n for n in (HISTORY, REPLAY, MANIFEST, SIGNATURE, DSSE) if (files / n).exists()]
        if (records or len(configs) > 1) and not (files / LINEAGE).exists():
            what = records[0] if records else "earlier checkpoints"
            raise UserError(f"The adapter has {what} but no {LINEAGE} to go with it", where=where)
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

    def _require_statement(self, files: Path, config: ForeignConfig, source: Source, said: ImportOptions) -> None:
        """Require the user's statement if the adapter has no lineage that names its base by digest."""
        if (files / LINEAGE).exists() or said.base_matches:
            return
        named = f" (it names {config.names_base[:120]!a}, which proves nothing)" if config.names_base else ""
        raise UserError(
            f"The adapter does not name its base and chat template by digest{named}",
            where=str(source),
            fix=f"If you know that it was trained on this very {self._base.spec} with this project's chat template, "
            "use --base-matches. The lineage records your statement.",
        )

    def _check_signature(
        self, files: Path, manifest: Manifest | None, source: Source, said: ImportOptions
    ) -> SignatureState:
        """Return the adapter's signature status; refuse a broken signature, and a missing one if the project trusts
        keys.
        """
        if manifest is None and any((files / name).exists() for name in (SIGNATURE, DSSE)):
            raise UserError(f"The adapter has a signature but no {MANIFEST}", where=str(source))
        if manifest is not None and (changed := changed_files(files, manifest)):
            raise UserError(f"The files differ from the manifest: {', '.join(changed)}", where=str(source))
        signed = verify_signatures(files, self._trusted) if manifest is not None else []
        status = {each.status: each.why for each in signed}
        # One good signature does not outweigh a broken one.
        for bad in ("tampered", "revoked"):
            if bad in status:
                raise UserError(status[bad], where=str(source))
        if "signed" in status:
            return "signed"
        state: SignatureState = "untrusted" if status else "unsigned"
        why = ""
        if "not checked" in status:
            state, why = "not checked", f": {status['not checked']}"
        if self._trusted.required and not said.unsigned:
            raise UserError(
                f"The adapter is {state}, and this project requires a trusted signature{why}",
                where=str(source),
                fix="Trust the signer's key (tunewright keys trust FILE), or import it anyway with --unsigned.",
            )
        return state

    def _name(self, files: Path, manifest: Manifest | None, source: Source, said: ImportOptions) -> str:
        """Return the adapter's name without the digest."""
        if manifest is not None:
            if said.name is not None:
                raise UserError(
                    f"The manifest names the adapter already: {manifest.name}", where="--name", fix="Remove --name."
                )
            return manifest.name[:-13]
        stem = said.name or Path(str(source)).resolve().name
        suffix = f"-{adapter_digest(files)[:12]}"
        stem = stem.removesuffix(suffix)
        if not NAME.fullmatch(stem + suffix):
            raise UserError(
                f"Invalid name {stem[:80]!a}: use up to 50 lowercase letters, digits, and . _ - after the first",
                where="--name" if said.name else str(source),
                fix="Choose another with --name NAME.",
            )
        return stem

    def _lineage(
        self, files: Path, config: ForeignConfig, source: Source, said: ImportOptions, by: str | None
    ) -> Literal["its own", "stated"]:
        """Check the lineage against the base and chat format here; without a lineage, write the user's statements."""
        path = files / LINEAGE
        if path.exists():
            if said.base_matches or said.quantization is not None:
                option = "--base-matches" if said.base_matches else "--quantization"
                raise UserError("The lineage already says so by digest", where=option, fix=f"Remove {option}.")
            if said.system_prompt is not None:
                raise UserError(
                    "The adapter has its own lineage", where="--system-prompt", fix="Remove --system-prompt."
                )
            check_lineage(path.read_bytes(), f"{source}, {LINEAGE}")
            adapter = Adapter(files)
            # A lineage could be copied from another adapter: its digest ties it to these weights.
            if adapter.lineage["digest"] != adapter_digest(files):
                raise UserError("The lineage belongs to other weights", where=f"{source}, {LINEAGE}")
            if adapter.lineage["template_digest"] != self._chat.digest:
                problem = "The adapter was trained with another chat template"
                raise UserError(problem, where=f"{source}, {LINEAGE}, template_digest")
            try:
                require_compatible(adapter, self._base, self._chat)
            except UserError as error:
                raise UserError(error.what, where=str(source), fix=error.fix) from None
            return "its own"
        if config.names_base not in (None, self._base.spec):
            self._reporter.warn(
                f"The adapter names the base {config.names_base!a}. You state that it was trained on {self._base.spec}."
            )
        write_json(path, self._stated(files, config, said, by))
        return "stated"

    def _stated(self, files: Path, config: ForeignConfig, said: ImportOptions, by: str | None) -> Mapping[str, Any]:
        base = self._base
        return {
            "schema_version": 2,
            "created": now(),
            "digest": adapter_digest(files),
            "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
            "template_digest": self._chat.digest,
            "chat": self._chat.description,
            "quantization": said.quantization or "none",
            **({} if said.system_prompt is None else {SYSTEM_PROMPT: stated_system_prompt(said.system_prompt)}),
            "stated": {"by": by, "names_base": config.names_base},
        }


@contextmanager
def _rename_errors(source: Source, files: Path) -> Iterator[None]:
    """Replace the quarantine's path in errors by the source, since the copy is gone when they are read."""
    try:
        yield
    except UserError as error:
        where = error.where and error.where.replace(str(files), str(source))
        raise UserError(error.what, where=where, fix=error.fix) from None
