"""Memory that training needs: estimated for a project or only a base, and found by one real pass.

The data loader yields micro-batches of the config's size. A step that needs smaller chunks splits them itself. The loss
of every chunk is divided by the trained tokens of the whole step, so the chunks' gradients add up to the step's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import list_adapters
from tunewright.config import Config
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.data.versions import current_manifest, load_version
from tunewright.models.bases import base_config, local_base
from tunewright.models.families import (
    LLAMA,
    Shape,
    check_architecture,
    read_shape,
    require_quantizable,
    resolve_targets,
)
from tunewright.models.loading import require_kernels
from tunewright.models.memory_plan import (
    Memory,
    MemoryCheck,
    Plan,
    SetupPlan,
    available_memory,
    check_memory,
    gigabytes,
    plan,
    recomputed_layers,
    unusable_card,
)
from tunewright.open_project import OpenProject
from tunewright.training import distributed
from tunewright.training.options import MemoryOptions

if TYPE_CHECKING:
    # Imported where it is used: an estimate needs no torch.
    from tunewright.training.recomputation import RecomputedLayers

SHORT_ROW = 32
"""Tokens of a short pair: a card without memory for one such row cannot train the base."""

_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_NO_DRIVER = "Found no NVIDIA driver"

BY_MISTAKE = 1_000_000_000
"""Parameters of a base that is probably on the CPU by mistake, because the card cannot be used."""


def estimate_memory(project: OpenProject, options: MemoryOptions = MemoryOptions()) -> tuple[Plan, MemoryCheck]:
    """Return the memory needed for training by part, and whether it fits, only from the base's config.json.

    The longest row is measured if there is a dataset and the base's tokenizer is on this machine.
    """
    folder, reporter = project.folder, project.reporter
    memory = available_memory(options.gpu)
    base = options.base
    alone = base is not None and not folder.has_config
    config = Config() if alone else folder.config
    if alone:
        reporter.say("There is no project here: the config's defaults apply.")
    spec, revision = (config.base_model, config.revision) if base is None else (base, None)
    settings = config.train
    if settings.use_dora:
        reporter.warn("DoRA needs more memory than this estimate, which counts LoRA only.")
    if EXPERTS in settings.target_modules:
        reporter.warn(
            "LoRA on experts needs more memory than this estimate: each layer whose activations are kept also keeps "
            "a changed copy of its experts."
        )
    tokens = options.length or settings.max_length
    shared, answer = options.shared, options.answer
    if shared + (answer or 1) > tokens:
        raise UserError(
            f"{shared:,} shared and {answer or 1:,} trained tokens exceed the row length of {tokens:,}",
            where="--length",
            fix="Raise --length, or lower --shared or --answer.",
        )
    model_config = base_config(spec, revision, folder.root, reporter)
    shape = read_shape(model_config)
    architecture = check_architecture(model_config)
    settings = resolve_targets(settings, shape, architecture)
    require_quantizable(settings.quantization, shape, architecture, "train.quantization")
    at_once = options.rows or settings.micro_batch_size or settings.batch_size
    if settings.method in ("dpo", "orpo"):  # the chosen and the rejected answer go through together
        at_once *= 2
        reporter.say(f"{settings.method.upper()}: each of the {at_once // 2:,} pairs of a micro-batch is two rows.")
    padded = not trains_packed(model_config, architecture, reporter)
    if padded:
        ignored = " --shared changes nothing: the rows share no prefix." if shared else ""
        reporter.say(f"Rows are padded, because this base cannot be trained on packed rows.{ignored}")
    batch = {"rows": at_once, "length": tokens, "shared": shared, "answer": answer or tokens}
    made = plan(spec, shape, settings, memory, **batch, padded=padded)
    longest = None if alone else _longest_row(project, spec, revision)
    checked = check_memory(made, settings, longest, rows=options.rows is not None, length=options.length is not None)
    return made, checked


def trains_packed(model_config: Path, architecture: str, reporter: Reporter) -> bool:
    """Return whether a base is trained on packed rows; any base but a Llama or Mistral is proved, which needs torch."""
    if architecture in LLAMA:
        return True
    from tunewright.training.proving import prove

    return prove(model_config, reporter).packed


def _longest_row(project: OpenProject, spec: str, revision: str | None) -> int | None:
    """Return the tokens of the longest row of train and dev; None if it is unknown here."""
    folder, reporter = project.folder, project.reporter
    if current_manifest(folder.dataset) is None:
        return None
    from tunewright.chat import open_chat

    unknown = "The length of your longest row is not known"
    try:
        base = local_base(spec, revision, folder.root, reporter)
        if base is None:
            reporter.say(f"{unknown}: the base's tokenizer is not on this machine.")
            return None
        chat = open_chat(base, folder.config.chat, reporter)
        version = load_version(folder.dataset)
        members = [member for split in ("train", "dev") for member in version.examples(split)]
        with reporter.task("Measuring rows", len(members), "examples") as task:
            longest = 0
            for member in members:
                longest = max(longest, *(len(row.ids) for row in chat.rows(member.example.messages)))
                task.advance()
    except UserError as error:
        reporter.warn(f"{unknown}: {error.what}.")
        return None
    return longest or None


def require_room(project: OpenProject) -> None:
    """Check that this machine can train the config's base, only from the base's config.json.

    Long rows that may not fit cause a warning. On the CPU memory is never refused: it may be swapped out.

    Raises:
        UserError: the card cannot hold one row of `SHORT_ROW` tokens; torch is built for CUDA, cannot use a card and
            the base is large; or the base is unsupported, also with these target modules or in 4 bits, or fails a
            proof that training needs.
    """
    config, reporter = project.folder.config, project.reporter
    model_config = base_config(config.base_model, config.revision, project.folder.root, reporter)
    architecture, shape = check_architecture(model_config), read_shape(model_config)
    memory, settings = available_memory(None), resolve_targets(config.train, shape, architecture)
    require_quantizable(settings.quantization, shape, architecture, "train.quantization")
    _require_card(shape, project)
    from tunewright.training.proving import TRAINS, require_config_proofs

    proofs = require_config_proofs(model_config, config.base_model, TRAINS, reporter)
    recomputed_layers(settings, shape.layers, card=memory.card)
    if distributed.is_sharded():
        return  # each card holds a part of the base
    one_row = {"rows": 1, "length": SHORT_ROW, "answer": SHORT_ROW}
    least = plan(config.base_model, shape, settings, memory, **one_row, padded=not proofs.packed)
    own = least.used[settings.quantization == "nf4"]
    short = (
        f"{config.base_model} needs at least {gigabytes(own.least)} to train ({own.setup.name}); "
        f"available: {memory.source}"
    )
    if own.least > memory.bytes:
        # With adapters that are already trained, the command may have nothing to train.
        trained = any(adapter.imported is None for adapter in list_adapters(project.folder.adapters))
        if memory.card and not trained:
            raise UserError(short, where="base_model", fix=_what_fits(least.used.get(True), own, memory))
        reporter.warn(f"{short}.")
    elif own.longest < settings.max_length:
        reporter.warn(
            f"Rows of more than {own.longest:,} tokens may not fit (available: {memory.source}); train.max_length is "
            f"{settings.max_length:,}."
        )


def _require_card(shape: Shape, project: OpenProject) -> None:
    """Check that a CUDA build of torch has a card that it can use, or that the base is small enough for the CPU."""
    require_kernels()
    why = unusable_card()
    if why is None:
        return
    unused = f"torch is built for CUDA but cannot use a card: {why}"
    if shape.parameters >= BY_MISTAKE:
        raise UserError(
            unused,
            where="base_model",
            fix="Update the driver, or start the container with its cards. To train "
            f"{shape.parameters:,} parameters on the CPU, set CUDA_VISIBLE_DEVICES=-1.",
        )
    # A CUDA build is the package index's default, so on a machine without a card this is nothing to warn of. A driver
    # is there for a card, also where no device of NVIDIA is on the bus (WSL).
    if not why.startswith(_NO_DRIVER) or any(
        vendor.read_text().strip() == _NVIDIA for vendor in _DEVICES.glob("*/vendor")
    ):
        project.reporter.warn(f"{unused}. Training runs on the CPU.")


def _what_fits(nf4: SetupPlan | None, own: SetupPlan, memory: Memory) -> str:
    """Return the alternatives if ``own`` does not fit. ``nf4`` is None if the family cannot be quantized."""
    others = "choose a smaller base, or shard this one over several cards (docs/how-to/many-gpus.md)"
    if nf4 is None or nf4 is own:
        return f"{others[0].upper()}{others[1:]}."
    if nf4.least > memory.bytes:
        return f"train.quantization: nf4 needs {gigabytes(nf4.least)}, which does not fit either: {others}."
    return (
        f"Set train.quantization: nf4, which needs {gigabytes(nf4.least)} and fits rows of up to {nf4.longest:,} "
        "tokens (`tunewright estimate-memory` shows more)."
    )


_KEPT = "micro_batch.json"


@dataclass(frozen=True)
class RawRows:
    """A micro-batch's rows as the dataset has them, carried with the packed batch so that it can be split."""

    rows: tuple[Mapping[str, Any], ...]

    def pieces(self, size: int, as_of: int = 0) -> list[tuple[Mapping[str, Any], ...]]:
        """Split the rows into chunks of at most ``size``, as even as possible.

        Fewer rows than ``as_of`` make as many chunks as ``as_of`` rows would; some are then empty.
        """
        # No rows make one empty chunk: this process makes its pass with the others.
        count = max(1, -(-max(len(self.rows), as_of) // size))
        ends = [len(self.rows) * place // count for place in range(count + 1)]
        return [self.rows[start:end] for start, end in pairwise(ends)]


class MicroBatch:
    """The number of rows that go through the model at once.

    The working folder keeps the number: a resumed run uses the same one, and so adds up gradients
    in the same order.
    """

    def __init__(self, asked: int, work: Path, reporter: Reporter) -> None:
        self.asked = asked
        self.file = work / _KEPT
        self.reporter = reporter
        self.rows: int | None = None
        """None until it is chosen."""
        self.layers: RecomputedLayers | None = None
        """None until the model is known."""
        self.liger: bool | None = None
        """True if the run uses Liger's kernels; None until it is chosen."""
        self._kept: dict[str, Any] = {}
        if self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.liger = kept.get("liger", False)  # an earlier version used them only where the config said so
            if kept["asked"] == asked:
                self.rows, self._kept = kept["rows"], kept

    def set_layers(self, layers: RecomputedLayers) -> None:
        """Set the model's layers; a resumed run recomputes as many as before, if training chose their number."""
        if layers.auto and "recomputed" in self._kept:
            layers.count = min(self._kept["recomputed"], layers.total)
        self.layers = layers

    def choose(self, rows: int, tokens: int) -> None:
        """Record that the longest batch, of ``tokens`` tokens, fits in chunks of ``rows`` rows."""
        fewer = "" if rows == self.asked else f" of the {self.asked} requested"
        again = ""
        if self.layers is not None and (self.layers.auto or self.layers.count):
            again = f" with {self.layers.count} of {self.layers.total} layers recomputed"
        self.reporter.say(f"Micro-batch: {rows} rows{fewer}; the longest batch, {tokens:,} tokens, fits{again}.")
        self._keep(rows)

    def shrink(self, rows: int, step: int) -> int:
        """Return the rows to continue with after memory ran out in ``step`` (0: before the first).

        They are as many as before if more layers can be recomputed, else half as many.
        """
        if self.layers is not None and self.layers.recompute_more():
            now, change = rows, f"{self.layers.count} of {self.layers.total} layers recomputed"
        elif rows == 1:
            raise too_little_memory("one row does not fit")
        else:
            now, change = rows // 2, f"{rows // 2} rows"
        if step:
            self.reporter.warn(
                f"Memory ran out in step {step} with {rows} rows at once. This step is repeated with {change}, and "
                "later steps use as many. The batch size is unchanged."
            )
            self._keep(now)
        return now

    def _keep(self, rows: int) -> None:
        self.rows = rows
        if distributed.is_main_process():
            recomputed = {} if self.layers is None else {"recomputed": self.layers.count}
            write_json(self.file, {"asked": self.asked, "rows": rows, "liger": self.liger, **recomputed})


def too_little_memory(why: str) -> UserError:
    """Return the error for a shortage that no smaller micro-batch solves."""
    return UserError(
        f"Not enough memory for a training step: {why}",
        where="train.micro_batch_size",
        fix="Run `tunewright estimate-memory` to see what fits. Set train.gradient_checkpointing: all or "
        "train.quantization: nf4, lower train.max_length "
        "or use a smaller base.",
    )
