"""Finding a base: a folder, a hub id pinned to a commit, or a packaged model; checked before anything loads it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import platformdirs

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, write_json, write_text
from tunewright.core.locks import in_use, remove_abandoned
from tunewright.core.progress import LogReporter, Reporter
from tunewright.models.families import check_architecture, is_mxfp4, read_config, read_shape, text_name
from tunewright.models.sources import (
    BUNDLED,
    CONSOLIDATED,
    PACKAGED,
    cached_commit,
    cached_folder,
    hub_config,
    hub_folder,
    packaged_folder,
)

INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")
_DECIDING = {*_TOKENIZERS, INDEX, "chat_template.json", "config.json", "generation_config.json"}
_DECIDING |= {"special_tokens_map.json", "tokenizer_config.json"}
"""Files that affect the model's output, in addition to all weights and templates."""

_INPUT_EMBEDDING, _OUTPUT_EMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_SAMPLED_ROWS = 1000
_UNTRAINED_NORM = 1e-3
"""A row whose norm is below this share of the median row's has not been trained. Llama 3's base models have such rows
for ``<|eot_id|>`` and the header tokens; the smallest trained rows are some tenths of the median."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """An open-weight base on this machine's disk."""

    spec: str
    """The base as the config names it."""
    folder: Path
    commit: str | None
    """The hub commit that the revision was pinned to; None for a folder and for a packaged model."""
    architecture: str
    files: dict[str, str]
    """SHA-256 of each file that affects the model's output, by name."""
    packed: bool = True
    """False if packed rows do not give the gradients of separate rows: the base trains on padded rows."""
    own_cache: bool = True
    """False if tunewright's key/value cache cannot hold the base's state: it decodes with transformers' cache."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the files' digests: the identity of the base, wherever it is stored."""
        return digest(self.files)


def hub_id(base: Base) -> str | None:
    """Return the base's hub id; None for a folder and for a packaged model."""
    return base.spec if base.commit is not None else None


def resolve_base(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Base:
    """Find, download and check the base that ``spec`` names; relative folders are relative to ``root``."""
    commit, folder = None, _local_folder(spec, root, reporter)
    if folder is None:
        # An unsupported base is refused by its configuration only, before gigabytes of weights are downloaded.
        if find_spec("torch") is None:
            check_architecture(hub_config(spec, revision, root / "base.lock.json"))
        else:
            read_shape(hub_config(spec, revision, root / "base.lock.json"))
        folder, commit = hub_folder(spec, revision, root / "base.lock.json", reporter)
    if revision is not None and commit is None:
        raise UserError("Only a hub id has a revision", where="revision", fix="Remove the key revision.")
    architecture = check_base_folder(folder)
    if find_spec("torch") is not None and is_mxfp4(read_config(folder / "config.json")):
        size = 2 * read_shape(folder / "config.json").parameters / 1e9
        reporter.say(f"{spec} stores its experts in MXFP4. They are dequantized: {size:,.1f} GB in bfloat16.")
    return Base(spec, folder, commit, architecture, _file_digests(folder))


def base_here(base: Base) -> Base:
    """Return this machine's copy of a base that another machine found: in the same folder, or in its own hub cache."""
    if base.commit is not None:
        folder = cached_commit(base.spec, base.commit)
        missing, fix = "is not in its hub cache", f"Download it there: hf download {base.spec} --revision {base.commit}"
    elif base.spec in PACKAGED:
        folder, missing, fix = packaged_folder(base.spec, LogReporter()), "", ""
    else:
        folder = base.folder if base.folder.is_dir() else None
        missing, fix = (
            f"is missing: no folder {base.folder}",
            "Copy it to the same folder of every machine, or share it.",
        )
    if folder is None:
        raise UserError(f"The base {base.spec} {missing}", where="base_model", fix=fix)
    found = _file_digests(folder)
    unequal = sorted(name for name in {*found, *base.files} if found.get(name) != base.files.get(name))
    if unequal:
        what = f"The base {base.spec} is another one: {', '.join(unequal)}"
        raise UserError(what, where="base_model", fix="Copy the same files to every machine.")
    return replace(base, folder=folder)


def check_spec(spec: str, root: Path) -> None:
    """Check a base as far as is possible without a download: a folder whole, a hub id by its form."""
    place = _place(spec, root)
    if isinstance(place, Path):
        check_base_folder(place)


def base_config(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Path:
    """Return the ``config.json`` of the base that ``spec`` names; for a hub id only this file is downloaded."""
    if revision is not None and _place(spec, root) != "hub":
        raise UserError("Only a hub id has a revision", where="revision", fix="Remove the key revision.")
    folder = _local_folder(spec, root, reporter)
    return hub_config(spec, revision, root / "base.lock.json") if folder is None else folder / "config.json"


def local_base(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Base | None:
    """Return the base for reading its tokenizer, without asking the hub; None if its tokenizer is not on this machine.

    Its weights may be missing, and no digests are computed.
    """
    folder = _local_folder(spec, root, reporter) or cached_folder(spec, revision, root / "base.lock.json")
    if folder is None or not any((folder / name).exists() for name in _TOKENIZERS):
        return None
    return Base(spec, folder, None, check_architecture(folder / "config.json"), {})


def _local_folder(spec: str, root: Path, reporter: Reporter) -> Path | None:
    """Return the base's folder, for a packaged one after its conversion; None if it comes from the hub."""
    place = _place(spec, root)
    if place == "package":
        return packaged_folder(spec, reporter)
    return place if isinstance(place, Path) else None


def _place(spec: str, root: Path) -> Path | Literal["package", "hub"]:
    """Return a base's source: its folder, packages, or the hub."""
    if spec in PACKAGED:
        return "package"
    if ":" in spec:
        raise UserError(
            f"Unknown base {spec!r}", where="base_model", fix=f"The packaged bases are {', '.join(PACKAGED)}."
        )
    folder = root / Path(spec).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if _HUB_ID.fullmatch(spec):
        return "hub"
    raise UserError(
        f"{spec!r} is neither a folder nor a hub id",
        where="base_model",
        fix=f"Use a folder with a config.json, an id such as meta-llama/Llama-3.1-8B, or {BUNDLED}.",
    )


def check_base_folder(folder: Path) -> str:
    """Return the architecture of the base in ``folder``."""
    architecture = check_architecture(folder / "config.json")
    _check_weights(folder)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise UserError(f"No tokenizer: none of {', '.join(_TOKENIZERS)} exists", where=str(folder))
    return architecture


def tensor_files(folder: Path) -> dict[str, str]:
    """Return the weights file of each of a base's tensors, by the tensor's name in the file."""
    index = folder / INDEX
    if index.exists():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return files
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        return dict.fromkeys(weights.keys(), "model.safetensors")


def _check_weights(folder: Path) -> None:
    index = folder / INDEX
    if index.exists():
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        wanted = ["model.safetensors"]
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        fix = "Convert them to safetensors: .bin and .pth files can run code and are not read." if pickled else None
        raise UserError(f"Missing weights: {', '.join(missing)}", where=str(folder), fix=fix)
    from safetensors import SafetensorError, safe_open

    for name in wanted:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"Damaged weights: {error}", where=str(folder / name)) from None


def _file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 by name, cached by size and modification time, since a 70B base takes minutes to read."""
    cache_file = platformdirs.user_cache_path("tunewright") / "digests.json"
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        cache = {}
    digests, fresh = {}, {}
    for path in sorted(folder.iterdir()):
        decides = path.suffix in {".safetensors", ".jinja", ".model"} or path.name in _DECIDING
        if not decides or path.name.startswith(CONSOLIDATED) or not path.is_file():
            continue
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        digests[path.name] = fresh[key] = cache.get(key) or file_digest(path)
    if not fresh.keys() <= cache.keys():
        write_json(cache_file, {**cache, **fresh})
    return digests


def untrained_tokens(base: Base, ids: Collection[int]) -> list[int]:
    """Return the sorted ``ids`` whose input or output embedding row is missing or next to zero."""
    # An output embedding that is tied to the input has no tensor of its own.
    tables = {
        name: base.folder / file
        for name, file in tensor_files(base.folder).items()
        if text_name(name) in (_INPUT_EMBEDDING, _OUTPUT_EMBEDDING)
    }
    return sorted(set().union(*(_empty_rows(file, name, ids) for name, file in tables.items())))


def _empty_rows(path: Path, name: str, ids: Collection[int]) -> set[int]:
    import ml_dtypes  # noqa: F401 - numpy knows bfloat16 from here on
    import numpy as np
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as weights:
        table = weights.get_slice(name)
        size = table.get_shape()[0]
        there = [token for token in ids if token < size]
        sampled, norms = (
            [float(np.linalg.norm(table[row : row + 1].astype(np.float32))) for row in rows]
            for rows in (range(0, size, max(1, size // _SAMPLED_ROWS)), there)
        )
    limit = _UNTRAINED_NORM * sorted(sampled)[(len(sampled) - 1) // 2]
    return {token for token, norm in zip(there, norms, strict=True) if norm <= limit} | (set(ids) - set(there))


_FIX = "Mount the project's folder at the same path on every machine, writable."


class Site(NamedTuple):
    """The things that every machine must have: a file in the project's folder, and the base."""

    root: Path
    file: Path
    text: str
    """The content of the file, which no copy of the folder has."""
    base: Base


@contextmanager
def open_site(project: ProjectFolder, base: Base) -> Iterator[Site]:
    """Yield what every machine must have; its file is removed at the end."""
    places = project.work.resolve() / "machines"
    places.mkdir(exist_ok=True)
    remove_abandoned(places.iterdir())
    own = Path(tempfile.mkdtemp(dir=places))
    try:
        with in_use(own):
            site = Site(project.root.resolve(), own / "seen", own.name, base)
            write_text(site.file, site.text)
            yield site
    finally:
        shutil.rmtree(own, ignore_errors=True)


def require_site(site: Site) -> Base:
    """Return this machine's copy of the base."""
    try:
        seen = site.file.read_text(encoding="utf-8") == site.text
    except OSError:
        seen = False
    if not seen:
        raise UserError("The project's folder is not there, or is another one", where=str(site.root), fix=_FIX)
    try:
        with tempfile.TemporaryFile(dir=site.file.parent):
            pass
    except OSError as error:
        what = f"The project's folder cannot be written to: {error.strerror}"
        raise UserError(what, where=str(site.root), fix=_FIX) from None
    return base_here(site.base)
