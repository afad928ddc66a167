"""LoRA training with trl and peft: loss on the answers only, resumable, the best evaluation's adapter kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.lineage import training_lineage
from tunewright.adapters.lora_weights import require_servable
from tunewright.adapters.registry import Adapter, list_adapters, store_adapter
from tunewright.adapters.signing import SigningKey, store_signer
from tunewright.chat import ChatFormat, refuse_untrained
from tunewright.config import Config, ReasoningMode, TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_text, writing
from tunewright.core.numbers import give_number
from tunewright.core.progress import LogReporter, Reporter, slow
from tunewright.core.text import count_of
from tunewright.data.versions import DatasetVersion
from tunewright.metrics import metric_inputs
from tunewright.models import quiet_transformers
from tunewright.models.bases import Base
from tunewright.models.families import read_shape, require_quantizable, resolve_targets
from tunewright.models.loading import context_length, device, load_model, named, require_bitsandbytes
from tunewright.models.sources import high_rate
from tunewright.training import distributed
from tunewright.training.checkpoints import require_intact, working_folder
from tunewright.training.history import (
    COMMAND,
    Evaluation,
    adapter_folder,
    best_evaluation,
    evaluations,
    evaluations_to_keep,
    place_text,
    require_trackers,
    tracked_in,
)
from tunewright.training.liger import require_liger
from tunewright.training.lora import require_precision
from tunewright.training.monitoring import DevTask, UnstableRunError, dev_task
from tunewright.training.packing.order import ORDER
from tunewright.training.parent import parent_inputs, parent_lineage, require_parent
from tunewright.training.preference_pairs import PreferenceRows, preference_inputs, preference_rows
from tunewright.training.proving import TRAINS, proved
from tunewright.training.rows import EncodedRows, render_digest, training_rows
from tunewright.training.run import Run, require_fsdp_supported
from tunewright.training.self_samples import Replay, draw_replay, replay_inputs


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`."""

    adapter: Adapter
    trained: bool
    """False if an adapter with the same inputs existed already."""


@dataclass(frozen=True)
class PausedRun:
    """State of a paused run."""

    step: int
    best: Evaluation
    """The best evaluation so far, including the one at the pause: the run's result if it ended here."""
    seconds: float
    """Training time of this process."""


def training_inputs(project: ProjectFolder, version: DatasetVersion, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Return everything that decides which adapter a training run produces."""
    config, base = project.config, proved(base, LogReporter())
    return {
        "dataset": version.digest,
        "base": base.digest,
        "template": chat.digest,
        "train": config.train.deciding(),
        "chosen_by": _selection_inputs(project),
        "seed": config.seed,
        "order": ORDER,
        # Only if rows are padded: the identity of adapters trained on packed rows stays the same.
        **({} if base.packed else {"rows": "padded"}),
        **_reasoning_inputs(config.chat.reasoning, version),
        **replay_inputs(project),
        **parent_inputs(project),
        **preference_inputs(config.train, project.dataset, version),
    }


def _reasoning_inputs(mode: ReasoningMode, version: DatasetVersion) -> dict[str, Any]:
    """Return the use of thinking; empty if it is the default or no row has thinking."""
    matters = mode != "train" and any(member.example.has_reasoning for member in version.members)
    return {"reasoning": mode} if matters else {}


def _selection_inputs(project: ProjectFolder) -> dict[str, Any]:
    """Return the inputs, apart from the train section, that decide which evaluation's adapter is kept."""
    config = project.config
    if config.train.eval_max_samples == 0:
        return {"metric": None}
    settings = config.evaluate
    return {
        "metric": metric_inputs(settings.metric, project.root),
        "max_new_tokens": settings.max_new_tokens,
        "stop": settings.stop,
    }


def train(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    *,
    adapters: Path | None = None,
    work: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    signer: SigningKey | None = None,
) -> TrainResult:
    """Train the config's adapter on a dataset version, or find the one already trained on the same inputs.

    A stopped run resumes from its last complete checkpoint. ``adapters`` is the folder where the
    adapter is looked for and kept (None: the project's own), ``work`` is the folder of the run's
    checkpoints, removed at its end (None: in the project's working folder); ``facts`` are further
    entries of the lineage. A signal raises KeyboardInterrupt, with a checkpoint saved.
    """
    distributed.init()
    # In one process only: all have the same base and versions.
    base = distributed.broadcast_from_main(lambda: proved(base, reporter, TRAINS))
    config = project.config
    require_servable(config.train)
    require_trackers(config.train.report_to)
    place = project.adapters if adapters is None else adapters
    identity = digest(training_inputs(project, version, base, chat))
    work = work or project.work / "training" / identity[:12]
    if (existing := find_trained(place, config.name, identity)) is not None:
        if distributed.is_main_process():
            # A run that was killed after it stored its adapter left its folder, and maybe no number.
            shutil.rmtree(work, ignore_errors=True)
            give_number(place, existing.name)
        return TrainResult(existing, trained=False)
    # The key is tried now, not after hours of training, and only in the process that stores.
    if signer is None and adapters is None and distributed.is_main_process():
        signer = store_signer(project.keys, reporter)
    commands = {project.pilot_adapters: "advise", project.fold_adapters: "crossval"}
    with working_folder(work), quiet_transformers(), writing(work):
        if distributed.is_main_process():
            write_text(work / COMMAND, (commands | {project.curve_adapters: "train --curve"}).get(place, "train"))
        run = _run(project, version, base, chat, reporter, work)
        inputs = {**training_lineage(config, version, base, chat), "inputs_digest": identity, **(facts or {})}
        inputs |= parent_lineage(run.parent)
        adapter = distributed.broadcast_from_main(lambda: _store(run, config, work, place, inputs, signer))
    if distributed.is_main_process():
        shutil.rmtree(work)
    evaluated = run.evaluated
    if (kept := len(evaluations_to_keep(evaluated))) < len(evaluated):
        reporter.say(f"Kept the adapters of {kept} of {len(evaluated)} evaluations: the best ones and the last one.")
    if (best := best_evaluation(evaluated)) is not evaluated[-1]:
        result = "The dev loss" if run.dev_task is None else "The dev result"
        reporter.warn(f"{result} was best after {place_text(best)}: that adapter is kept, not the last one.")
    return TrainResult(adapter, trained=True)


def train_until(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    *,
    work: Path,
    step: int,
) -> PausedRun:
    """Train as `train` does, up to a step; `train` then resumes from the checkpoint in ``work``.

    A diverged run raises `DivergedError`; a signal before that step KeyboardInterrupt, with a
    checkpoint saved.
    """
    base = proved(base, reporter, TRAINS)
    with working_folder(work), quiet_transformers(), writing(work):
        run = _run(project, version, base, chat, reporter, work, step)
    evaluated = run.evaluated
    return PausedRun(evaluated[-1].step, best_evaluation(evaluated), run.seconds)


@dataclass(frozen=True)
class _TrainedRun:
    """A run that has reached its end or its pause."""

    splits: dict[str, EncodedRows]
    dev_task: DevTask | None
    replay: Replay
    history: list[dict[str, Any]]
    seconds: float
    details: dict[str, Any]
    """See `Run.details`."""
    parent: Adapter | None
    preferences: PreferenceRows | None

    @cached_property
    def evaluated(self) -> list[Evaluation]:
        """The evaluations of the run, in order."""
        return evaluations(self.history)


def _run(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    work: Path,
    until: int | None = None,
) -> _TrainedRun:
    config = project.config.model_copy(update={"train": _supported(project.config.train, base, reporter)})
    project = ProjectFolder(project.root, config)
    limit = min(config.train.max_length, context_length(base))
    parent = require_parent(project, version, base, chat, reporter)
    if not config.train.generated:
        version = _without_generated(version, reporter)
    preferences = None
    if config.train.prefers:
        preferences = preference_rows(config.train, project.dataset, version, chat, limit, reporter)
    with slow(reporter, "Encoding the rows"):
        splits = {
            name: training_rows(chat, version.examples(name), limit, config.train.on_overlength, reporter)
            for name in ("train", "dev")
            if name == "dev" or preferences is None
        }
    if preferences is not None:
        splits["train"] = preferences.answers
    encoded_train, encoded_dev = splits["train"].rows, splits["dev"].rows
    refuse_untrained(chat, base, frozenset(token for row in encoded_train for token in row.ids))
    dev = list({m.key: m for m in splits["dev"].members}.values())
    task = dev_task(config, project.root, chat, version.domain_of("train"), dev, context_length(base), reporter)

    def finished_run() -> _TrainedRun | UserError:
        @cache
        def model() -> Any:
            reporter.say(f"Loading {named(base, config.train.quantization)}")
            # A base that FSDP shards need not fit on one GPU: it is loaded on the CPU, and its shards move.
            sharded = distributed.is_sharded()
            place = "cpu" if sharded else None
            return load_model(base, config.train.dtype, config.train.quantization, place, shardable=sharded)

        # Before the base is loaded: if vLLM writes the samples, it has the GPU for itself.
        replay = draw_replay(project, version, base, chat, model, limit, reporter)
        run = Run(config, base, work, reporter, parent=parent, preferences=preferences, limit=limit)
        try:
            with tracked_in(project.work / "trackers", config.name, run.name):
                history, seconds = run.fit(
                    model(), chat.tokenizer, encoded_train, encoded_dev, task, until, replay.rows
                )
        except UnstableRunError as broken:
            # Returned, not raised: a traceback would keep the model while a sweep handles the error.
            trained = splits["train"].members if preferences is None else preferences.members
            return broken.as_user_error([*trained, *replay.members])
        return _TrainedRun(splits, task, replay, history, seconds, run.details(), parent, preferences)

    result = finished_run()
    # transformers' trainer and accelerate form reference cycles with the model, and the next base needs its memory.
    clear_device_cache(garbage_collection=True)
    if isinstance(result, UserError):
        raise result
    return result


def _supported(settings: TrainConfig, base: Base, reporter: Reporter) -> TrainConfig:
    """Check that these settings can be trained on the base and this machine; return them with the base's own layers."""
    shape = read_shape(base.folder / "config.json")
    settings = resolve_targets(settings, shape, base.architecture)
    require_quantizable(settings.quantization, shape, base.architecture, "train.quantization")
    require_bitsandbytes(settings.quantization, "train.quantization")
    require_liger(settings.use_liger_kernel, base.architecture)
    require_precision(settings)
    if not base.packed and settings.prefix_sharing == "on":
        raise UserError(
            "Prompts cannot be shared: this base cannot be trained on packed rows",
            where="train.prefix_sharing",
            fix="Set it to auto.",
        )
    if high := high_rate(settings.learning_rate, base.folder):
        reporter.warn(high)
    if distributed.is_sharded():
        require_fsdp_supported(settings, packed=base.packed)
        reporter.say(
            f"FSDP: the base is sharded over {distributed.world_size()} processes; a layer is gathered while it "
            "computes."
        )
    return settings


def _without_generated(version: DatasetVersion, reporter: Reporter) -> DatasetVersion:
    kept = tuple(m for m in version.members if not (m.generated and m.split == "train"))
    left_out = len(version.members) - len(kept)
    reporter.say(f"{count_of(left_out, 'generated row')} left out of the training (train.generated: false)")
    return replace(version, members=kept)


def _store(
    run: _TrainedRun, config: Config, work: Path, place: Path, inputs: Mapping[str, Any], signer: SigningKey | None
) -> Adapter:
    """Store the best evaluation's adapter, with the others as its checkpoints."""
    evaluated, task = run.evaluated, run.dev_task
    best = best_evaluation(evaluated)
    kept = evaluations_to_keep(evaluated)
    for each in kept:
        require_intact(adapter_folder(work, each.step))
    encoded = run.splits["train"]
    lineage = {
        **inputs,
        # Digests of the splits as rendered for training, and the rows that the config dropped.
        "rendering": {
            name: {
                "digest": render_digest(each.rows),
                "rows": len(each.rows),
                "left_out": [{"key": row.member.key, "tokens": len(row.row.ids)} for row in each.too_long],
            }
            for name, each in run.splits.items()
        },
        "training": {
            "examples": len({m.key for m in encoded.members}),
            "rows": len(encoded.rows),
            "trained_tokens": sum(sum(row.loss_mask) for row in encoded.rows),
            "epochs": [asdict(each) for each in evaluated],
            "kept_step": best.step,
            "seconds": round(run.seconds, 1),
            "device": device(),
            "processes": distributed.world_size(),
            **run.details,
            "metric": None if task is None else task.scorer.name,
            "dev_rows_answered": 0 if task is None else len(task.requests),
        },
        **run.replay.lineage,
        **({} if run.preferences is None else run.preferences.lineage),
    }
    return store_adapter(
        place,
        config.name,
        adapter_folder(work, best.step),
        {f"step-{e.step}": adapter_folder(work, e.step) for e in kept if e is not best},
        lineage,
        run.history,
        servable=config.train.require_vllm_compatible,
        texts=run.replay.files,
        signer=signer,
    )


def find_trained(adapters: Path, name: str, identity: str) -> Adapter | None:
    """Return the verified adapter that these inputs produced under this project's name, if there is one."""
    for adapter in list_adapters(adapters):
        if adapter.was_trained_by(identity) and adapter.name.startswith(f"{name}-"):
            adapter.verify()
            return adapter
    return None
