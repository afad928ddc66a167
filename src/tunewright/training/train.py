"""LoRA training with trl and peft: loss on the answer only, resumable, the best epoch kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.keys import PrivateKey
from tunewright.adapters.registry import Adapter, list_adapters, store_adapter
from tunewright.adapters.signing import store_signer
from tunewright.adapters.vllm_compat import require_servable
from tunewright.chat import ChatFormat
from tunewright.chat.opening import refuse_untrained
from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, writing
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion
from tunewright.metrics import metric_inputs
from tunewright.models.bases import Base
from tunewright.models.families import require_quantizable, require_targets
from tunewright.models.loading import context_length, device, load_model, named
from tunewright.models.quantized import require_bitsandbytes
from tunewright.models.quiet import quiet_transformers
from tunewright.training import distributed
from tunewright.training.adapter import require_precision
from tunewright.training.checkpoint_selection import Evaluation, best_of, evaluations, place_text, worth_keeping
from tunewright.training.checkpoints import require_whole, working_folder
from tunewright.training.dev import DevTask, dev_task
from tunewright.training.divergence import BrokenRunError
from tunewright.training.kernels import require_liger
from tunewright.training.lineage import training_lineage
from tunewright.training.packing.order import ORDER
from tunewright.training.replay import Replay, draw_replay, replay_inputs
from tunewright.training.rows import EncodedRows, render_digest, training_rows
from tunewright.training.run import Run, require_divisible
from tunewright.training.trackers import require_trackers, tracked_in


@dataclass(frozen=True)
class TrainResult:
    """What `train` did."""

    adapter: Adapter
    trained: bool
    """False when an adapter with the same inputs was there already."""


@dataclass(frozen=True)
class Paused:
    """Where a run that is to go on later has got to."""

    step: int
    best: Evaluation
    """The best evaluation so far, the one made here included: what the run would keep if it ended here."""
    seconds: float
    """Of training, by this process."""


def training_inputs(project: ProjectFolder, version: DatasetVersion, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Return all that decides which adapter comes out of a training.

    Raises:
        UserError: a benchmark's file, which replay is held against, cannot be read.
    """
    config = project.config
    return {
        "dataset": version.digest,
        "base": base.digest,
        "template": chat.digest,
        "train": config.train.deciding(),
        "chosen_by": _choice(project),
        "seed": config.seed,
        "order": ORDER,
        **replay_inputs(project),
    }


def _choice(project: ProjectFolder) -> dict[str, Any]:
    """Return what decides, beside the train section, which evaluation's adapter is kept."""
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
) -> TrainResult:
    """Train the config's adapter on a dataset version, or find the one already trained on the same inputs.

    A run that was stopped goes on from its last whole checkpoint.

    Args:
        project: its config decides, its working folder holds the checkpoints.
        version: the rows to train on, and those of dev that choose the epoch.
        base, chat: what is adapted, and how conversations become tokens.
        reporter: shows progress, hears warnings.
        adapters: where the adapter is looked for and kept (None: with the project's own).
        work: the folder of the run's checkpoints, removed at its end (None: in the project's working folder).
        facts: what the lineage is to say beside what decided the training.

    Raises:
        UserError: an adapter that vLLM would not load (`require_servable`), an example that cannot be trained on whole,
            a full disk, a tracker that is not installed, or a loss that is no number or has exploded.
        KeyboardInterrupt: stopped by a signal, with a checkpoint saved.
    """
    distributed.join()
    config = project.config
    require_servable(config.train)
    require_trackers(config.train.report_to)
    if distributed.lonely_launch():
        reporter.warn(
            "`accelerate launch --cpu` started one process only, which is what it does without MPI: "
            "`torchrun --nproc-per-node N -m tunewright train` starts N."
        )
    place = project.adapters if adapters is None else adapters
    identity = digest(training_inputs(project, version, base, chat))
    work = work or project.work / "training" / identity[:12]
    if (there := trained_before(place, config.name, identity)) is not None:
        if distributed.is_main():
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed when it had stored its adapter
        return TrainResult(there, trained=False)
    signer = store_signer(project.keys, reporter) if adapters is None else None
    with working_folder(work), quiet_transformers(), writing(work):
        fitted = _fit(project, version, base, chat, reporter, work)
        inputs = {**training_lineage(config, version, base, chat), "inputs_digest": identity}
        adapter = distributed.by_main(lambda: _store(fitted, config, work, place, {**inputs, **(facts or {})}, signer))
    if distributed.is_main():
        shutil.rmtree(work)
    evaluated = fitted.evaluated
    if (kept := len(worth_keeping(evaluated))) < len(evaluated):
        reporter.say(f"Of {len(evaluated)} evaluations the adapters of {kept} are kept: the best and the last.")
    if (best := best_of(evaluated)) is not evaluated[-1]:
        dev = "The dev loss" if fitted.answered is None else "Dev"
        reporter.warn(f"{dev} was best after {place_text(best)}: that adapter is kept, not the last one.")
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
) -> Paused:
    """Train as `train` would, up to a step: what is in ``work`` then is what `train` goes on from.

    Raises:
        UserError: as of `train`; `DivergedError` where the loss is no number or has exploded.
        KeyboardInterrupt: stopped by a signal before, with a checkpoint saved.
    """
    with working_folder(work), quiet_transformers(), writing(work):
        fitted = _fit(project, version, base, chat, reporter, work, step)
    evaluated = fitted.evaluated
    return Paused(evaluated[-1].step, best_of(evaluated), fitted.seconds)


@dataclass(frozen=True)
class _Fitted:
    """A run that has got to its end, or to where it was to pause."""

    splits: dict[str, EncodedRows]
    answered: DevTask | None
    replay: Replay
    history: list[dict[str, Any]]
    seconds: float
    how: dict[str, Any]
    """How the rows went through the model: see `Run.how`."""

    @cached_property
    def evaluated(self) -> list[Evaluation]:
        """The evaluations of the run, in order."""
        return evaluations(self.history)


def _fit(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    work: Path,
    until: int | None = None,
) -> _Fitted:
    config = project.config
    require_targets(config.train.target_modules, base.architecture)
    require_quantizable(config.train.quantization, base.architecture, "train.quantization")
    require_bitsandbytes(config.train.quantization, "train.quantization")
    require_liger(config.train.use_liger_kernel)
    require_precision(config.train)
    if distributed.in_pieces():
        require_divisible(config.train)
        reporter.say(
            f"FSDP: the base is divided among {distributed.count()} processes; a layer is whole while it computes."
        )
    limit = min(config.train.max_length, context_length(base))
    splits = {
        name: training_rows(chat, version.examples(name), limit, config.train.on_overlength, reporter)
        for name in ("train", "dev")
    }
    encoded_train, encoded_dev = splits["train"].rows, splits["dev"].rows
    refuse_untrained(chat, base, frozenset(token for row in encoded_train for token in row.ids))
    dev = list({m.key: m for m in splits["dev"].members}.values())
    answered = dev_task(config, project.root, chat, version.domain_of("train"), dev, context_length(base), reporter)

    def fitted() -> _Fitted | UserError:
        @cache
        def model() -> Any:
            reporter.say(f"Loading {named(base, config.train.quantization)}")
            # A base that is to be divided need not fit on one card: it waits in memory, and goes there in pieces.
            in_pieces = distributed.in_pieces()
            place = "cpu" if in_pieces else None
            return load_model(base, config.train.dtype, config.train.quantization, place, divisible=in_pieces)

        # Before the base is loaded: where vLLM writes the samples, it has the card for itself.
        replay = draw_replay(project, version, base, chat, model, limit, reporter)
        run = Run(config, base, work, reporter)
        try:
            with tracked_in(project.work / "trackers", config.name, run.name):
                history, seconds = run.fit(
                    model(), chat.tokenizer, encoded_train, encoded_dev, answered, until, replay.rows
                )
        except BrokenRunError as broken:
            # Returned, not raised: a traceback would hold the model for as long as a sweep handles the error.
            return broken.as_user_error([*splits["train"].members, *replay.members])
        return _Fitted(splits, answered, replay, history, seconds, run.how())

    ended = fitted()
    # transformers' trainer and accelerate refer to the model in circles, and the next base needs its memory.
    clear_device_cache(garbage_collection=True)
    if isinstance(ended, UserError):
        raise ended
    return ended


def _store(
    fitted: _Fitted, config: Config, work: Path, place: Path, inputs: Mapping[str, Any], signer: PrivateKey | None
) -> Adapter:
    """Keep the best evaluation's adapter, with the others beside it.

    Args:
        fitted: the run that has ended.
        config: what it was trained by.
        work: its working folder.
        place: where adapters are kept.
        inputs: what the lineage says of all that went in.
        signer: signs the adapter.
    """
    evaluated, answered = fitted.evaluated, fitted.answered
    best = best_of(evaluated)
    kept = worth_keeping(evaluated)
    for each in kept:
        require_whole(each.folder(work))
    lineage = {
        **inputs,
        "rendering": {name: _rendering(encoded) for name, encoded in fitted.splits.items()},
        "training": {
            **_account(fitted.splits["train"], evaluated, best, fitted.seconds),
            **fitted.how,
            "metric": None if answered is None else answered.scorer.name,
            "dev_rows_answered": 0 if answered is None else len(answered.requests),
        },
        **fitted.replay.lineage,
    }
    return store_adapter(
        place,
        config.name,
        best.folder(work),
        {f"step-{e.step}": e.folder(work) for e in kept if e is not best},
        lineage,
        fitted.history,
        servable=config.train.require_vllm_compatible,
        texts=fitted.replay.files,
        signer=signer,
    )


def trained_before(adapters: Path, name: str, identity: str) -> Adapter | None:
    """Return the adapter of this project name that these inputs made, if there is one; checked."""
    for adapter in list_adapters(adapters):
        if adapter.was_trained_by(identity) and adapter.name.startswith(f"{name}-"):
            adapter.verify()
            return adapter
    return None


def _account(encoded: EncodedRows, evaluated: Sequence[Evaluation], best: Evaluation, seconds: float) -> dict[str, Any]:
    """Return the training's own numbers."""
    return {
        "examples": len({m.key for m in encoded.members}),
        "rows": len(encoded.rows),
        "trained_tokens": sum(sum(t.loss_mask) for t in encoded.rows),
        "epochs": [
            {
                "step": e.step,
                "epoch": e.epoch,
                "train_loss": e.train_loss,
                "dev_loss": e.dev_loss,
                "dev_metric": e.dev_metric,
            }
            for e in evaluated
        ],
        "kept_step": best.step,
        "seconds": round(seconds, 1),
        "device": device(),
        "processes": distributed.count(),
    }


def _rendering(encoded: EncodedRows) -> dict[str, Any]:
    """Return what training saw of a split, by digest, and what the config had it leave out."""
    return {
        "digest": render_digest(encoded.rows),
        "rows": len(encoded.rows),
        "left_out": [{"key": row.member.key, "tokens": len(row.row.ids)} for row in encoded.too_long],
    }
