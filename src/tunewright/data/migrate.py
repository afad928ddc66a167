"""From a hosted fine-tuning job to a project: its files as rows, the nearest settings, its model as the incumbent.

The jobs' fields follow the services' documentation of November 2026:

- OpenAI: developers.openai.com/api/reference/resources/fine_tuning/subresources/jobs/methods/retrieve
- Together: docs.together.ai/reference/get-fine-tunes-id
- Fireworks: docs.fireworks.ai/api-reference/get-supervised-fine-tuning-job

A field that has no documented equal is named as a difference, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunewright.config import Config, TrainConfig
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.core.errors import UserError
from tunewright.core.strict_json import parse_json
from tunewright.data.readers.schemas import PREFERENCE_KEYS

Service = Literal["openai", "together", "fireworks"]

TRAIN_FILE = "train.jsonl"
VALIDATION_FILE = "validation.jsonl"
_KINDS = {"preference": "preference pairs", "tools": "conversations with functions", "chat": "conversations"}


@dataclass
class HostedJob:
    """A fine-tuning job as tunewright's settings, and every remaining difference."""

    model: str | None = None
    """The fine-tuned model's name at the service; None if the job has none."""
    base: str | None = None
    """Hub id of the job's base, if it is documented to be one."""
    train: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    differences: list[str] = field(default_factory=list)

    def take(self, settings: Mapping[str, Any], **names: str) -> None:
        """Set keys of the train section from their settings, or name the difference if a setting is not valid here."""
        for key, theirs in names.items():
            value = settings.get(theirs)
            if value is None:
                continue
            if isinstance(value, str) and key != "lr_scheduler_type":
                what = f"{theirs} was {value!r}, which the service chose by itself"
                self.differ(what, f"train.{key} has its default")
                continue
            try:
                TrainConfig.model_validate({key: value})
            except ValidationError:
                self.differ(f"{theirs} was {value!r}, which is not valid here", f"train.{key} has its default")
            else:
                self.train[key] = value

    def differ(self, theirs: str, ours: str) -> None:
        """Name a difference: the job's side, and the project's."""
        self.differences.append(f"{theirs}: {ours}.")


@dataclass(frozen=True)
class Migration:
    """A project to write."""

    files: dict[str, str]
    rows: dict[str, dict[str, int]]
    """File to number of rows by kind."""
    differences: tuple[str, ...]
    incumbent: str | None
    """The fine-tuned model, if the job has one."""


def migrate(
    service: Service, job_file: Path, train: Path, validation: Path | None = None, base: str | None = None
) -> Migration:
    """Return the project for a job's files; nothing is written.

    Args:
        job_file: the job's object, as the service's API returns it (JSON).
        train, validation: the job's files (JSON Lines).
        base: the open-weight base to tune (None: the job's, if it has a documented hub id, else the default).

    Raises:
        UserError: a file cannot be read, or is not of that service; the job has no rows with ideal outputs.
    """
    text = _text(job_file)
    try:
        document = parse_json(text)
    except ValueError as error:
        raise UserError(f"Not JSON: {error}", where=str(job_file)) from None
    if not isinstance(document, dict):
        raise UserError("The job must be a JSON object", where=str(job_file))
    job = _READERS[service](document, str(job_file))
    texts = {TRAIN_FILE: _text(train)}
    if validation is not None:
        texts[VALIDATION_FILE] = _text(validation)
    rows = {name: _kinds(text, train if name == TRAIN_FILE else validation or train) for name, text in texts.items()}
    if any(kinds["preference"] for kinds in rows.values()):
        job.differ(
            "The rows are preference pairs", "the preferred answer is trained; the rejected one stays in the row"
        )
    job.differ(
        "The job had its own validation file" if validation else "The job had no validation file",
        "the project splits by clusters of similar rows, and trained_on marks those that the hosted model has seen",
    )
    values = _values(service, job, list(texts), base)
    comments = "".join(f"# {line}\n" for line in (f"Migrated from {service}. Differences from the job:", *(
        f"- {difference}" for difference in job.differences
    )))  # fmt: skip
    return Migration(
        files={CONFIG_FILE: comments + write_config(values), **texts},
        rows=rows,
        differences=tuple(job.differences),
        incumbent=job.model,
    )


def _values(service: Service, job: HostedJob, sources: list[str], base: str | None) -> dict[str, Any]:
    """Return the config's values that differ from the defaults."""
    default = Config.model_fields["base_model"].default
    chosen = base or job.base
    if chosen is None:
        job.differ("The job's base has no open weights under a documented name", f"base_model is {default}; choose one")
    name = re.sub(r"[^a-z0-9]+", "-", (job.model or service).lower())[:40].strip("-") or "migrated"
    values: dict[str, Any] = {"name": name, "data": {"sources": sources}}
    if chosen is not None:
        values["base_model"] = chosen
    if job.seed is not None:
        values["seed"] = job.seed
    if job.train:
        values["train"] = job.train
    if job.model is None:
        job.differ("The job has no fine-tuned model", "the project has no incumbent")
    else:
        url, variable = _ENDPOINTS[service]
        incumbent: dict[str, Any] = {"name": service, "base_url": url, "model": job.model, "api_key_env": variable}
        incumbent |= {"trained_on": [TRAIN_FILE]}
        values["evaluate"] = {"incumbents": [incumbent]}
        job.differ(
            "The prices of the fine-tuned model are not in the job",
            "set price_input, price_output and budget of the incumbent",
        )
    return values


_ENDPOINTS: dict[Service, tuple[str, str]] = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "together": ("https://api.together.ai/v1", "TOGETHER_API_KEY"),
    "fireworks": ("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
}


# The services' jobs


def _openai(document: Mapping[str, Any], where: str) -> HostedJob:
    if document.get("object") != "fine_tuning.job":
        raise UserError(
            "Not a fine-tuning job of OpenAI: its object must be 'fine_tuning.job' "
            f"(got {document.get('object')!r})",
            where=where,
            fix="Save the answer of GET /v1/fine_tuning/jobs/ID.",
        )  # fmt: skip
    method = document.get("method") or {}
    kind = method.get("type", "supervised")
    settings = {**(document.get("hyperparameters") or {}), **((method.get(kind) or {}).get("hyperparameters") or {})}
    job = HostedJob(model=document.get("fine_tuned_model"))
    if kind == "reinforcement":
        raise UserError(
            "A reinforcement job has no ideal outputs to train on",
            where=where,
            fix="Migrate a supervised or preference job.",
        )
    if kind != "supervised":
        job.differ(f"The job's method was {kind}", "the project trains on the preferred answers (supervised)")
    job.take(settings, epochs="n_epochs", batch_size="batch_size")
    settings = {name: value for name, value in settings.items() if name not in ("n_epochs", "batch_size")}
    multiplier = settings.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        job.differ(
            f"learning_rate_multiplier was {multiplier!r}, a factor of a rate that OpenAI does not publish",
            "train.learning_rate has its default",
        )
    for name, value in settings.items():
        if value is not None:
            job.differ(f"{name} was {value!r}", "it is not a setting here")
    seed = document.get("seed")
    job.seed = seed if isinstance(seed, int) else None
    job.differ(f"The job tuned {document.get('model')}, whose method is not published", "the project trains LoRA")
    return job


def _together(document: Mapping[str, Any], where: str) -> HostedJob:
    if "model_output_name" not in document or "n_epochs" not in document:
        raise UserError(
            "Not a fine-tuning job of Together: it has no model_output_name or n_epochs",
            where=where,
            fix="Save the answer of GET /v1/fine-tunes/ID.",
        )
    job = HostedJob(model=document.get("model_output_name"), base=document.get("model"))
    same = {name: name for name in ("batch_size", "learning_rate", "warmup_ratio")}
    job.take(document, epochs="n_epochs", **same)
    scheduler = document.get("lr_scheduler") or {}
    job.take(scheduler, lr_scheduler_type="lr_scheduler_type")
    if scheduler.get("lr_scheduler_args"):
        job.differ(f"lr_scheduler_args were {scheduler['lr_scheduler_args']}", "the schedule ends at 0")
    kind = document.get("training_type") or {}
    if kind.get("type") == "Lora":
        job.take(kind, lora_r="lora_r", lora_alpha="lora_alpha", lora_dropout="lora_dropout")
        modules = kind.get("lora_trainable_modules")
        if modules == "all-linear":
            job.train["preset"] = "all-linear"
        elif modules:
            job.differ(f"lora_trainable_modules were {modules!r}", "set train.target_modules")
    else:
        job.differ(f"The job's training_type was {kind.get('type')!r}", "the project trains LoRA")
    method = document.get("training_method") or {}
    if method.get("method", "sft") != "sft":
        job.differ(f"The job's method was {method['method']}", "the project trains on the preferred answers (sft)")
    for name in ("max_grad_norm", "weight_decay"):
        if document.get(name):
            job.differ(f"{name} was {document[name]}", "it is not a setting here")
    if method.get("train_on_inputs") is True or document.get("train_on_inputs") is True:
        job.differ("The job trained on inputs", "only the assistant's turns are trained")
    return job


def _fireworks(document: Mapping[str, Any], where: str) -> HostedJob:
    if "outputModel" not in document or "dataset" not in document:
        raise UserError(
            "Not a supervised fine-tuning job of Fireworks: it has no outputModel or dataset",
            where=where,
            fix="Save the answer of GET /v1/accounts/ACCOUNT/supervisedFineTuningJobs/ID.",
        )
    job = HostedJob(model=document.get("outputModel"))
    job.take(document, epochs="epochs", learning_rate="learningRate", lora_r="loraRank", max_length="maxContextLength")
    if document.get("batchSize"):
        job.differ(f"batchSize was {document['batchSize']} tokens", "train.batch_size counts examples: its default")
    if document.get("earlyStop"):
        job.differ("earlyStop was on", "set train.early_stopping_patience for the same")
    if document.get("warmStartFrom"):
        job.differ(f"The job continued {document['warmStartFrom']}", "the project begins at the base")
    if document.get("jinjaTemplate"):
        job.differ("The job had a jinjaTemplate of its own", "the base's chat template is used")
    base = document.get("baseModel")
    if base:
        job.differ(f"The job's base was {base}", "Fireworks' documentation has no hub id for it")
    return job


_READERS = {"openai": _openai, "together": _together, "fireworks": _fireworks}


# Files


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"The file cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("The file is not UTF-8 text", where=str(path)) from None


def _kinds(text: str, path: Path) -> dict[str, int]:
    """Count the rows by kind; `data add` checks them."""
    counts = Counter[str](dict.fromkeys(_KINDS, 0))
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"Not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise UserError("A row must be a JSON object", where=f"{path}:{number}")
        called = row.get("tools") or row.get("functions")
        counts["preference" if PREFERENCE_KEYS & row.keys() else "tools" if called else "chat"] += 1
    if not counts.total():
        raise UserError("The file has no rows", where=str(path))
    return dict(counts)


def described(migration: Migration) -> Sequence[str]:
    """Return lines about the written files and the model that becomes the incumbent."""
    lines = []
    for file, kinds in migration.rows.items():
        counts = (f"{kinds[kind]:,} {name}" for kind, name in _KINDS.items() if kinds.get(kind))
        lines.append(f"{file}: {', '.join(counts)}")
    return [*lines, f"Incumbent: {migration.incumbent}" if migration.incumbent else "No incumbent"]
