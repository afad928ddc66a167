"""Finding a base: a folder, a hub id pinned to a commit, or the bundled model; checked before anything loads it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, write_json
from tunewright.core.progress import Reporter
from tunewright.models.bundled import BUNDLED, bundled_folder
from tunewright.models.families import family_of, text_config
from tunewright.models.hub import CONSOLIDATED, cached_folder, hub_config, hub_folder

INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """An open-weight base on this machine's disk."""

    spec: str
    """As the config names it."""
    folder: Path
    commit: str | None
    """The hub commit that the revision was pinned to; None for a folder and for the bundled model."""
    architecture: str
    files: dict[str, str]
    """SHA-256 of each file that decides what the model computes, by name."""

    @property
    def digest(self) -> str:
        """SHA-256 over the files' digests: the identity of the base, wherever it lies."""
        return digest(self.files)


def resolve_base(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Base:
    """Find, fetch and check the base that ``spec`` names; relative folders count from ``root``.

    Raises:
        UserError: nothing there, an unsupported family, no safetensors weights, remote code, quantized weights,
            or a hub that is gated or cannot be reached.
    """
    commit = None
    place = _place(spec, root)
    if isinstance(place, Path):
        folder = place
    elif place == "bundled":
        folder = bundled_folder(spec.removeprefix("bundled:"), reporter)
    else:
        # What is not supported is refused by its configuration alone, before gigabytes of weights are fetched.
        check_architecture(hub_config(spec, revision, root / "base.lock.json"))
        folder, commit = hub_folder(spec, revision, root / "base.lock.json", reporter)
    if revision is not None and commit is None:
        raise UserError("only a hub id has a revision", where="revision", fix="Remove the key revision.")
    architecture = check_base_folder(folder)
    return Base(spec, folder, commit, architecture, _file_digests(folder))


def base_config(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Path:
    """Return the ``config.json`` of the base that ``spec`` names; of a hub id nothing else is fetched.

    Raises:
        UserError: as for :func:`resolve_base`.
    """
    place = _place(spec, root)
    if revision is not None and place != "hub":
        raise UserError("only a hub id has a revision", where="revision", fix="Remove the key revision.")
    if isinstance(place, Path):
        return place / "config.json"
    if place == "bundled":
        return bundled_folder(spec.removeprefix("bundled:"), reporter) / "config.json"
    return hub_config(spec, revision, root / "base.lock.json")


def base_at_hand(spec: str, revision: str | None, root: Path, reporter: Reporter) -> Base | None:
    """Return the base for reading its tokenizer, without asking the hub; None if its tokenizer is not on this machine.

    Its weights may be missing, and no digests are computed.

    Raises:
        UserError: nothing there, or an unsupported family.
    """
    place = _place(spec, root)
    if isinstance(place, Path):
        folder: Path | None = place
    elif place == "bundled":
        folder = bundled_folder(spec.removeprefix("bundled:"), reporter)
    else:
        folder = cached_folder(spec, revision, root / "base.lock.json")
    if folder is None or not any((folder / name).exists() for name in _TOKENIZERS):
        return None
    return Base(spec, folder, None, check_architecture(folder / "config.json"), {})


def _place(spec: str, root: Path) -> Path | Literal["bundled", "hub"]:
    """Where a base is: its folder, the package of the bundled one, or the hub."""
    kind, _, _name = spec.rpartition(":")
    if kind == "bundled":
        return "bundled"
    if kind:
        raise UserError(f"there is no base {spec!r}", where="base", fix=f"The bundled base is bundled:{BUNDLED}.")
    folder = root / Path(spec).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if _HUB_ID.fullmatch(spec):
        return "hub"
    raise UserError(
        f"{spec!r} is neither a folder nor a hub id",
        where="base",
        fix=f"Give a folder that holds config.json, an id such as meta-llama/Llama-3.1-8B, or bundled:{BUNDLED}.",
    )


def check_base_folder(folder: Path) -> str:
    """Return the architecture of the base in ``folder``.

    Raises:
        UserError: the folder is not a base that can be trained and served.
    """
    architecture = check_architecture(folder / "config.json")
    _check_weights(folder)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise UserError(f"no {', no '.join(_TOKENIZERS)}: there is no tokenizer", where=str(folder))
    return architecture


def check_architecture(path: Path) -> str:
    """Return the architecture that a base's ``config.json`` names.

    Raises:
        UserError: an unsupported family, code of its own, or weights that are quantized already.
    """
    config = read_config(path)
    where = str(path)
    if config.get("auto_map"):
        raise UserError(
            "this base wants to run code of its own (auto_map)", where=where, fix="Code from a base is never run."
        )
    architecture, _ = family_of(config, where)
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(f"the weights are already quantized ({method})", where=where, fix=_unquantized(method))
    return architecture


def _unquantized(method: str) -> str:
    fix = "Use the original base in bfloat16, float16 or float32."
    # Ministral 3 and Devstral 2 are published in FP8; Ministral 3 in bfloat16 too, under another name.
    return f"{fix} Of a Ministral 3 that is the repository whose name ends in -BF16." if method == "fp8" else fix


def read_config(path: Path) -> dict[str, Any]:
    """Return a base's ``config.json`` as it is.

    Raises:
        UserError: there is none, or it holds no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no config.json: this folder holds no base", where=str(path.parent)) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"not JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("not a model configuration", where=str(path))
    return config


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
        fix = "Only safetensors are read; .bin and .pth files can run code." if pickled else None
        raise UserError(f"no weights: {', '.join(missing)} missing", where=str(folder), fix=fix)
    from safetensors import SafetensorError, safe_open

    for name in wanted:
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"damaged weights: {error}", where=str(folder / name)) from None


def _file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name; remembered by size and time of change, since a 70B base takes minutes to read."""
    cache_file = platformdirs.user_cache_path("tunewright") / "digests.json"
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        cache = {}
    digests, fresh = {}, {}
    for path in sorted(folder.iterdir()):
        if not _decides(path) or not path.is_file():
            continue
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        digests[path.name] = fresh[key] = cache.get(key) or file_digest(path)
    if not fresh.keys() <= cache.keys():
        write_json(cache_file, {**cache, **fresh})
    return digests


def _decides(path: Path) -> bool:
    if path.name.startswith(CONSOLIDATED):
        return False
    return path.suffix in {".safetensors", ".jinja", ".model"} or path.name in {
        "chat_template.json",
        "config.json",
        "generation_config.json",
        INDEX,
        "special_tokens_map.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
