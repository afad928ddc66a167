"""A repository folder for the Hugging Face hub: the adapter in PEFT's form, or a merged model, with its model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.core.io import link_or_copy, write_json, write_text
from tunewright.core.remote_files import hub_silence
from tunewright.data.examples import Message
from tunewright.evaluation.access_log import load_checked
from tunewright.evidence.files import evidence_on
from tunewright.export.artifact import RECORD, BuiltArtifact, Export, ExportResult, ExportSource
from tunewright.export.merge import save_tokenizer
from tunewright.export.templates import count_equal_renderings
from tunewright.report.model_card import CardSubject, model_card

CARD = "README.md"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class HubResult:
    """A repository folder, and the place where it was pushed."""

    folder: Path
    record: Export
    made: bool
    """False if the folder existed already."""
    evidence: str | None
    """ID of the evidence in the card; None if there is none."""
    pushed: str | None
    """Address of the commit on the hub; None if nothing was pushed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "folder": str(self.folder),
            "made": self.made,
            "evidence": self.evidence,
            "pushed": self.pushed,
            "files": self.record.files,
            "notes": list(self.record.notes),
        }


def require_hub_id(name: str, where: str) -> None:
    """Check the form of a hub id."""
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"Not a hub id: {name!r}", where=where, fix="Use OWNER/NAME.")


def card(
    source: ExportSource,
    merged: ExportResult | None,
    base_model: str | None,
    model_license: str | None,
    repository: str | None,
) -> tuple[str, str | None]:
    """Return the model card, and the ID of the evidence in it."""
    project, adapter = source.project, source.adapter
    folder = project.folder.evaluations
    found = evidence_on(folder, adapter.digest, project.reporter)
    if found is not None:
        found = load_checked(folder / found.id, folder, project.reporter)
    subject = CardSubject(
        adapter.name,
        adapter.lineage,
        repository,
        base_model,
        model_license,
        source.system_prompt.text is not None,
        merged.record.figures if merged else None,
    )
    return model_card(subject, found), found.id if found else None


def build_repository(
    folder: Path,
    source: ExportSource,
    merged: ExportResult | None,
    base_model: str | None,
    card: str,
    evidence: str | None,
) -> BuiltArtifact:
    """Write a repository's files: the merged model's, or the adapter's in PEFT's form with the tokenizer."""
    adapter, chat, system = source.adapter, source.project.chat, source.system_prompt.text
    if merged is not None and merged.folder is not None:
        for name in merged.record.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(merged.folder / name, folder / name)
    else:
        settings = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
        # The folder that training used is private.
        write_json(folder / CONFIG, {**settings, "base_model_name_or_path": base_model})
        shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
        save_tokenizer(folder, chat, system)
        _check_template(folder, chat, source.dev_prompts, system)
    write_text(folder / CARD, card)
    notes = []
    if evidence is None:
        notes.append(f"the card says that there is no evidence: run `tunewright evaluate {adapter.name}`")
    if base_model is None:
        notes.append("the card names no base model, because the base is not a hub id: use --base-model")
    figures = merged.record.figures if merged else None
    return BuiltArtifact(figures, "16-bit", "original", notes=tuple(notes))


def _check_template(
    folder: Path, chat: ChatFormat, conversations: Sequence[Sequence[Message]], system_prompt: str | None
) -> None:
    """Check that the folder's own tokenizer and template render conversations to the ids of training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [chat.prompt(messages) for messages in conversations]
    equal = count_equal_renderings(tokenizer, chat.template, conversations, ids, system_prompt)
    if equal < len(ids):
        raise UserError(
            f"The exported template renders {len(ids) - equal} of {len(ids)} dev prompts to other tokens than training "
            "did",
            where=chat.template.name,
            fix="Remove text that looks like a special token from these rows, and train again.",
        )


def push(folder: Path, name: str, message: str, *, private: bool) -> str:
    """Create the repository if it does not exist, and commit the folder without its own record."""
    from huggingface_hub import HfApi, constants, errors

    if (silence := hub_silence(constants.ENDPOINT)) is not None:
        raise UserError(
            f"The hub ({constants.ENDPOINT}) is unreachable: {silence}",
            where="--push",
            fix=f"The folder is complete: push it later with the same command, or with `hf upload {name} {folder}`.",
        )
    api = HfApi(endpoint=constants.ENDPOINT)
    fix = "Run `hf auth login` (or set HF_TOKEN) with a token that may write to the repository."
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[RECORD])
    except errors.HfHubHTTPError as error:
        raise UserError(f"The hub refused the push to {name}: {error}", where="--push", fix=fix) from error
    except ValueError as error:  # the hub's own check of the card's metadata
        raise UserError(f"The hub refused the model card: {error}", where=str(folder / CARD)) from error
    return str(commit.commit_url)
