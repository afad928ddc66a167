"""Import of one adapter: into quarantine, checked, and stored only if every check passes.

The format of the weights (github.com/huggingface/safetensors, README): 8 bytes with the header's
length, little-endian; the header, a JSON map of tensor names to dtype, shape, and the start and end
of their bytes; then these bytes, without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.foreign.documents import ForeignConfig, check_history, check_lineage, check_replay, read_config
from tunewright.adapters.foreign.quarantine import (
    NO_ARCHIVE,
    README,
    QuarantinedFiles,
    quarantine,
    quarantine_folder,
    quarantine_remote,
)
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lineage import KEY as SYSTEM_PROMPT
from tunewright.adapters.lineage import stated_system_prompt
from tunewright.adapters.lora_weights import tensor_name
from tunewright.adapters.manifest import DSSE, LOCAL, MANIFEST, NAME, SIGNATURE, Manifest, changed_files, read_manifest
from tunewright.adapters.registry import (
    CONFIG,
    HISTORY,
    LINEAGE,
    REPLAY,
    WEIGHTS,
    Adapter,
    adapter_digest,
    require_compatible,
    write_manifest,
)
from tunewright.adapters.signing import verify_signatures
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import new_folder, write_json
from tunewright.core.numbers import give_number
from tunewright.core.progress import Task
from tunewright.core.remote_files import RemoteFiles
from tunewright.core.strict_json import strict_object
from tunewright.models.bases import tensor_files
from tunewright.models.families import read_shape, text_name
from tunewright.open_project import OpenProject

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


@dataclass(frozen=True)
class _Intake:
    """An adapter in quarantine, and what it has to match. Only the copy is read, so a source that changes meanwhile
    cannot pass another check.
    """

    project: OpenProject
    source: Path | RemoteFiles
    """A folder, or the URL of an adapter that was pushed."""
    said: ImportOptions
    files: Path

    @property
    def where(self) -> str:
        """The source, as errors name it."""
        return str(self.source)

    def place(self, path: Path) -> str:
        """Return a file or folder of the copy, as errors name it."""
        return f"{self.where}, {path.relative_to(self.files)}"

    def take(self) -> None:
        """Copy the source into quarantine."""
        intake = QuarantinedFiles(self.files, self.where)
        if isinstance(self.source, RemoteFiles):
            quarantine_remote(self.source, intake)
        elif self.source.is_dir():
            quarantine_folder(self.source, intake)
        else:
            raise UserError(NO_ARCHIVE, where=self.where, fix="Give the adapter's folder. Unpack an archive first.")
        if missing := [name for name in (CONFIG, WEIGHTS) if name not in intake.files]:
            raise UserError(f"Not an adapter: {' and '.join(missing)} missing", where=self.where)
        for name in (README, LOCAL):
            if name in intake.files:
                (self.files / name).unlink()
                self.project.reporter.say(f"{name} is not imported.")

    def configs(self) -> dict[Path, ForeignConfig]:
        """Return the configurations by folder: the adapter's own, and its earlier checkpoints'."""
        base = self.project.base
        shape = read_shape(base.folder / "config.json")
        return {
            path.parent: read_config(path.read_bytes(), shape, base.architecture, self.place(path))
            for path in sorted(self.files.rglob(CONFIG))
        }

    def require_statement(self, config: ForeignConfig) -> None:
        """Require the user's statement if the adapter has no lineage that names its base by digest."""
        if (self.files / LINEAGE).exists() or self.said.base_matches:
            return
        name = config.document.base_model_name_or_path
        named = f" (it names {name[:120]!a}, which proves nothing)" if name else ""
        raise UserError(
            f"The adapter does not name its base and chat template by digest{named}",
            where=self.where,
            fix=f"If you know that it was trained on this very {self.project.base.spec} with this project's chat "
            "template, use --base-matches. The lineage records your statement.",
        )

    def signature(self, manifest: Manifest | None) -> SignatureState:
        """Return the adapter's signature status; refuse a broken signature, and a missing one if the project trusts
        keys.
        """
        trusted = TrustedKeys(self.project.folder.keys)
        if manifest is None and any((self.files / name).exists() for name in (SIGNATURE, DSSE)):
            raise UserError(f"The adapter has a signature but no {MANIFEST}", where=self.where)
        if manifest is not None and (changed := changed_files(self.files, manifest)):
            raise UserError(f"The files differ from the manifest: {', '.join(changed)}", where=self.where)
        signed = verify_signatures(self.files, trusted) if manifest is not None else []
        status = {each.status: each.why for each in signed}
        # One good signature does not outweigh a broken one.
        for bad in ("tampered", "revoked"):
            if bad in status:
                raise UserError(status[bad], where=self.where)
        if "signed" in status:
            return "signed"
        state: SignatureState = "untrusted" if status else "unsigned"
        why = ""
        if "not checked" in status:
            state, why = "not checked", f": {status['not checked']}"
        if trusted.required and not self.said.unsigned:
            raise UserError(
                f"The adapter is {state}, and this project requires a trusted signature{why}",
                where=self.where,
                fix="Trust the signer's key (tunewright keys trust FILE), or import it anyway with --unsigned.",
            )
        return state

    def stem(self, manifest: Manifest | None) -> str:
        """Return the adapter's name without the digest."""
        said = self.said.name
        if manifest is not None:
            if said is not None:
                what = f"The manifest names the adapter already: {manifest.name}"
                raise UserError(what, where="--name", fix="Remove --name.")
            return manifest.name[:-13]
        suffix = f"-{adapter_digest(self.files)[:12]}"
        stem = (said or Path(self.where).resolve().name).removesuffix(suffix)
        if not NAME.fullmatch(stem + suffix):
            raise UserError(
                f"Invalid name {stem[:80]!a}: use up to 50 lowercase letters, digits, and . _ - after the first",
                where="--name" if said else self.where,
                fix="Choose another with --name NAME.",
            )
        return stem

    def check_records(self, configs: Mapping[Path, ForeignConfig]) -> None:
        """Check that earlier checkpoints are complete, and that training records come with a lineage."""
        weights = {path.parent for path in self.files.rglob(WEIGHTS)}
        for folder in sorted(weights ^ configs.keys()):
            lacking = CONFIG if folder in weights else WEIGHTS
            raise UserError(f"{lacking} is missing", where=self.place(folder))
        records = [n for n in (HISTORY, REPLAY, MANIFEST, SIGNATURE, DSSE) if (self.files / n).exists()]
        if (records or len(configs) > 1) and not (self.files / LINEAGE).exists():
            what = records[0] if records else "earlier checkpoints"
            raise UserError(f"The adapter has {what} but no {LINEAGE} to go with it", where=self.where)
        for name, check in ((HISTORY, check_history), (REPLAY, check_replay)):
            if name in records:
                check(self.files / name, self.place(self.files / name))

    def lineage(self, config: ForeignConfig, by: str | None) -> Literal["its own", "stated"]:
        """Check the lineage against the base and chat format here; without a lineage, write the user's statements."""
        path, said, base, chat = self.files / LINEAGE, self.said, self.project.base, self.project.chat
        if not path.exists():
            named = config.document.base_model_name_or_path
            if named not in (None, base.spec):
                self.project.reporter.warn(
                    f"The adapter names the base {named!a}. You state that it was trained on {base.spec}."
                )
            prompt = {} if said.system_prompt is None else {SYSTEM_PROMPT: stated_system_prompt(said.system_prompt)}
            stated = {
                "schema_version": 2,
                "created": now(),
                "digest": adapter_digest(self.files),
                "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
                "template_digest": chat.digest,
                "chat": chat.description,
                "quantization": said.quantization or "none",
                **prompt,
                "stated": {"by": by, "names_base": named},
            }
            write_json(path, stated)
            return "stated"
        if said.base_matches or said.quantization is not None:
            option = "--base-matches" if said.base_matches else "--quantization"
            raise UserError("The lineage already says so by digest", where=option, fix=f"Remove {option}.")
        if said.system_prompt is not None:
            raise UserError("The adapter has its own lineage", where="--system-prompt", fix="Remove --system-prompt.")
        where = self.place(path)
        check_lineage(path.read_bytes(), where)
        adapter = Adapter(self.files)
        # A lineage could be copied from another adapter: its digest ties it to these weights.
        if adapter.lineage["digest"] != adapter_digest(self.files):
            raise UserError("The lineage belongs to other weights", where=where)
        if adapter.lineage["template_digest"] != chat.digest:
            raise UserError("The adapter was trained with another chat template", where=f"{where}, template_digest")
        try:
            require_compatible(adapter, base, chat)
        except UserError as error:
            raise UserError(error.what, where=self.where, fix=error.fix) from None
        return "its own"

    def check_weights(self, configs: Mapping[Path, ForeignConfig]) -> None:
        """Check all weights: headers and shapes first, then the numbers against the base's."""
        paths = {folder / WEIGHTS: config for folder, config in configs.items()}
        for path, config in paths.items():
            check_shapes(path, config, self.place(path))
        modules = {module: None for config in configs.values() for module in config.modules}
        with self.project.reporter.task("measuring the base's weights", len(modules), "layers") as task:
            norms = base_norms(self.project.base.folder, modules, task)
        for path, config in paths.items():
            check_numbers(path, config, norms, self.place(path))


def import_adapter(
    project: OpenProject, source: Path | RemoteFiles, said: ImportOptions, by: str | None
) -> ImportResult:
    """Check the adapter in a folder or at a URL, and store it; nothing of a refused adapter is stored."""
    adapters = project.folder.adapters
    _ = project.base, project.chat  # a fault of the project is not a fault of the adapter
    with quarantine(adapters.parent) as place:
        files = place / "adapter"
        files.mkdir()
        intake = _Intake(project, source, said, files)
        try:
            intake.take()  # from here on only the copy is read, so a changed source cannot pass a different check
            configs = intake.configs()
            config = configs[files]
            intake.require_statement(config)
            manifest = read_manifest(files)
            signed = intake.signature(manifest)
            stem = intake.stem(manifest)
            intake.check_records(configs)
            lineage = intake.lineage(config, by)
            # The slowest check comes last: it reads the base's weights.
            intake.check_weights(configs)
            name = f"{stem}-{adapter_digest(files)[:12]}"
            if manifest is not None and manifest.name != name:
                raise UserError(f"The manifest names {manifest.name}, but the adapter is {name}", where=str(source))
            if manifest is None:
                write_manifest(files, name)
            record = {"at": now(), "by": by, "source": source.name, "signed": signed == "signed"}
            write_json(files / LOCAL, {"imported": record})
            target = adapters / name
            new = not target.exists()
            if new:
                with new_folder(target) as temporary:
                    for entry in files.iterdir():
                        entry.replace(temporary / entry.name)
            give_number(adapters, name)
        except UserError as error:
            # The copy is gone when the error is read.
            where = error.where and error.where.replace(str(files), str(source))
            raise UserError(error.what, where=where, fix=error.fix) from None
        return ImportResult(Adapter(target), new, signed, lineage)


LARGEST_WEIGHT = 65504.0
"""The largest number of float16, which engines may use."""

LARGEST_CHANGE = 2.0
"""Limit of a layer's |scale·BA| / |W| (Frobenius norms). Trained adapters measured 0.03 on SmolLM2-135M (all linear
layers, 1e-3, two epochs) and 0.6 on a tiny base of random weights. A change of twice the base is not a fine-tune,
and its numbers can overflow in a batch that others share.
"""

LARGEST_HEADER = 8 << 20
"""A LoRA of all linear layers of a 70B base has 1,120 tensors and a header of 180 kB."""

DTYPES = ("F16", "BF16", "F32")


def read_header(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a safetensors file, by name.

    The library checks that shapes and offsets agree and that the tensors fill the file: bytes in a
    gap could hide a payload, an overlap could alias weights. It checks the JSON text less: it keeps
    the last of two entries with one name, ignores unknown keys, and parses headers of up to 100 MB.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise UserError(f"The header claims {length:,} bytes (limit {LARGEST_HEADER:,})", where=where)
        text = file.read(length)
    try:
        with safe_open(path, framework="numpy") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"Not a safetensors file: {error}", where=where) from None
    for name, entry in strict_object(text, f"{where}, header").items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            what = "A tensor needs exactly dtype, shape and data_offsets"
            raise UserError(what, where=f"{where}, {name[:80]!a}")
        if entry["dtype"] not in DTYPES:
            what = f"The dtype must be one of {', '.join(DTYPES)} (got {entry['dtype']})"
            raise UserError(what, where=f"{where}, {name[:80]!a}")
    return shapes


def check_shapes(path: Path, config: ForeignConfig, where: str) -> None:
    """Check the tensors in ``path``, which no other process can change, against config and base."""
    shapes = read_header(path, where)
    wanted: dict[str, tuple[int, tuple[int, int]]] = {}
    for module, kind in config.modules.items():
        inputs, outputs = config.shape.linear(kind)
        rank, _ = config.rank_and_scale(module)
        wanted[tensor_name(module, "A")] = rank, (rank, inputs)
        wanted[tensor_name(module, "B")] = rank, (outputs, rank)
    for name in sorted(shapes.keys() - wanted.keys()):
        raise UserError("Not a LoRA weight of this configuration and base", where=f"{where}, {name[:120]!a}")
    for name, (rank, shape) in wanted.items():
        if name not in shapes:
            what = "The weight is missing, but the configuration requires it"
            raise UserError(what, where=f"{where}, {name}")
        if shapes[name] != shape:
            found, needed = (" x ".join(map(str, sizes)) for sizes in (shapes[name], shape))
            what = f"The shape is {found}; with this base and rank {rank} it must be {needed}"
            raise UserError(what, where=f"{where}, {name}")


def check_numbers(path: Path, config: ForeignConfig, norms: Mapping[str, float], where: str) -> None:
    """Check the numbers of weights that passed :func:`check_shapes`; ``norms`` are the norms of the base's weights."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        for module in config.modules:
            pair = {}
            for half in "AB":
                name = tensor_name(module, half)
                pair[half] = weights.get_tensor(name)
                _check_finite(pair[half], f"{where}, {name}")
            _check_overflow(pair["A"], pair["B"], f"{where}, {module}")
            _, scale = config.rank_and_scale(module)
            _check_change(pair["A"], pair["B"], scale, norms[module], f"{where}, {module}")


def _check_finite(tensor: Any, where: str) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise UserError(f"{bad:,} of {tensor.numel():,} weights are not finite", where=where)
    largest = float(tensor.abs().max())
    # Engines may hold the weights in float16, where a larger one becomes infinite.
    if largest > LARGEST_WEIGHT:
        raise UserError(f"The largest weight is {largest:.3g}, above float16's {LARGEST_WEIGHT:,.0f}", where=where)


def _check_change(a: Any, b: Any, scale: float, norm: float, where: str) -> None:
    """Compare |scale·BA| with the base's |W|; |BA|² = trace((BᵀB)(AAᵀ)) needs no matrix of BA's size."""
    a, b = a.double(), b.double()
    squared = float(((b.T @ b) * (a @ a.T)).sum())  # both factors are [rank, rank] and symmetric
    change = scale * max(squared, 0.0) ** 0.5
    if change > LARGEST_CHANGE * norm:
        raise UserError(
            f"The change of the base's weights is {change / norm:,.1f} times their norm (limit {LARGEST_CHANGE:g})",
            where=where,
        )


def _check_overflow(a: Any, b: Any, where: str) -> None:
    """Check that A·x and B·A·x stay within float16 for inputs x of norm √inputs, as layers' norms give.

    |a·x| is at most |a||x|, for a row of A or of BA. Engines multiply by the scale at the end.
    """
    a, b = a.double(), b.double()
    gram = a @ a.T
    squared = max(float(gram.diagonal().max()), float(((b @ gram) * b).sum(1).max()))
    reached = max(squared, 0.0) ** 0.5 * a.shape[1] ** 0.5
    if reached > LARGEST_WEIGHT:
        raise UserError(
            f"The adapter overflows float16: for inputs of normal size its products reach {reached:.3g} "
            f"(limit {LARGEST_WEIGHT:,.0f})",
            where=where,
        )


def base_norms(base: Path, modules: Iterable[str], task: Task) -> dict[str, float]:
    """Return the Frobenius norms of the weights of the base's modules, by their full names."""
    from safetensors import safe_open

    wanted = {text_name(module): module for module in modules}
    found: dict[str, list[tuple[str, str]]] = {}
    for name, file in tensor_files(base).items():
        module = wanted.get(text_name(name.removesuffix(".weight")))
        if module is not None and name.endswith(".weight"):
            found.setdefault(file, []).append((name, module))
    norms = {}
    for file, tensors in sorted(found.items()):
        with safe_open(base / file, framework="pt") as weights:
            for name, module in tensors:
                norms[module] = float(weights.get_tensor(name).float().norm())
                task.advance()
    assert norms.keys() == set(wanted.values())
    return norms
