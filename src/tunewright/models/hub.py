"""A base from the Hugging Face hub, pinned to a commit at first use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright.disk import write_json, writing
from tunewright.errors import UserError
from tunewright.progress import Reporter

_WANTED = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
CONSOLIDATED = "consolidated"
"""Mistral's repositories hold all weights twice: in files that begin so, for its own code, and in those of
transformers, which are the ones that are read."""


def hub_folder(repository: str, revision: str | None, lock_file: Path, reporter: Reporter) -> tuple[Path, str]:
    """Fetch the hub repository into the hub's own cache; return its folder and the commit.

    The commit that ``revision`` (branch, tag or commit; None: main) meant at first use is kept in ``lock_file``:
    commit that file, and every later run, here or elsewhere, uses the same weights.

    Raises:
        UserError: unknown id or revision, a gated repository, or no way to reach the hub.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    key = _pin(repository, revision)
    pins = _pins(lock_file)
    with _refusals(repository, revision):
        commit = str(pins.get(key) or HfApi().model_info(repository, revision=revision).sha)
        reporter.say(f"Base {repository} at commit {commit[:12]}")
        with writing(Path(constants.HF_HUB_CACHE)):
            folder = Path(
                snapshot_download(
                    repository, revision=commit, allow_patterns=_WANTED, ignore_patterns=f"{CONSOLIDATED}*"
                )
            )
    if key not in pins:
        write_json(lock_file, {**pins, key: commit})
    return folder, commit


def hub_config(repository: str, revision: str | None, lock_file: Path) -> Path:
    """Fetch a hub repository's ``config.json`` and nothing else; a pin in ``lock_file`` holds, none is added.

    Raises:
        UserError: as for :func:`hub_folder`, or the repository has no such file.
    """
    from huggingface_hub import constants, hf_hub_download

    commit = _pins(lock_file).get(_pin(repository, revision)) or revision
    with _refusals(repository, revision), writing(Path(constants.HF_HUB_CACHE)):
        return Path(hf_hub_download(repository, "config.json", revision=commit))


def _pin(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision or 'main'}"


def _pins(lock_file: Path) -> dict[str, str]:
    pins: dict[str, str] = json.loads(lock_file.read_text(encoding="utf-8")) if lock_file.exists() else {}
    return pins


@contextmanager
def _refusals(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub refuses into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} is gated",
            where="base",
            fix=f"Accept its licence on the page of {repository}, then log in with `hf auth login` (or set HF_TOKEN).",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r}", where="revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {repository}, or it is private",
            where="base",
            fix="Check the spelling; for a private model log in with `hf auth login` (or set HF_TOKEN).",
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"{repository} has no config.json: it holds no base", where="base") from None
    except (OSError, errors.HTTPError) as error:
        raise UserError(
            f"the hub cannot be reached, and {repository} is not in its cache ({type(error).__name__})",
            where="base",
            fix="Check the network, or download the base elsewhere and give its folder as `base`.",
        ) from error
