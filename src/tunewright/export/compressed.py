"""Models in FP8 or 4-bit integers for vLLM: files of compressed-tensors, which llm-compressor writes."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import digest, write_json
from tunewright.core.processes import ENOUGH_MEMORY, KILLED, end, last_lines, start
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion
from tunewright.engines.environment import LLMCOMPRESSOR, Environment, find
from tunewright.engines.llmcompressor import worker
from tunewright.export import Scheme
from tunewright.export.artifact import BuiltArtifact, ExportSource
from tunewright.export.merge import (
    ArtifactOutputs,
    TrainedModel,
    choose_merge_method,
    load_folder,
    measure_trained,
    observe_folder,
    save_settings,
    write_merged,
)
from tunewright.export.weights import Weights
from tunewright.gate.results import Precision
from tunewright.models.bases import Base
from tunewright.models.loading import device, text_settings
from tunewright.training.rows import encode_members

PRECISIONS: dict[Scheme, Precision] = {"fp8": "fp8", "w4a16": "4-bit"}

ROWS = 512
"""Calibration rows, or all training rows if there are fewer: llm-compressor's default number."""

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_GROUPS = (128, 64, 32)
"""Weights per scale: llm-compressor's default, and the smaller groups that vLLM's kernels take."""
_NOT_INHERITED = ("PYTHON", "VIRTUAL_ENV", "LLM_COMPRESSOR_", "COMPRESSED_TENSORS_")
_TAIL = 12


@dataclass(frozen=True)
class Compression:
    """Settings of one run of llm-compressor."""

    scheme: Scheme
    environment: Environment
    group_size: int | None = None
    """Weights per scale; None for fp8, which has one scale per output."""
    rows: Sequence[Sequence[int]] = ()
    """Token ids of calibration rows; empty for fp8, which needs none."""

    @property
    def inputs(self) -> dict[str, Any]:
        """These settings' part of the export's inputs."""
        found: dict[str, Any] = {"scheme": self.scheme, "llmcompressor": self.environment.versions["llmcompressor"]}
        if self.scheme == "w4a16":
            found |= {"group_size": self.group_size, "calibration": digest([list(row) for row in self.rows])}
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        if self.scheme == "fp8":
            return ("vLLM computes in FP8 on cards from compute capability 8.9 (Ada, Hopper)",)
        tokens = sum(map(len, self.rows))
        return (
            f"calibrated on {len(self.rows):,} training rows ({tokens:,} tokens), {self.group_size} weights per scale",
        )


def require_compressed(base: Base) -> Environment:
    """Return llm-compressor's environment, before anything is computed."""
    if base.architecture not in _ARCHITECTURES:
        raise UserError(
            f"A {base.architecture} is not exported to FP8 or W4A16: only {' and '.join(_ARCHITECTURES)} are",
            where=base.spec,
            fix="Use `tunewright export merge`, whose folder transformers and vLLM load.",
        )
    if find_spec("compressed_tensors") is None:
        raise UserError(
            "compressed-tensors is not installed; compressed files are checked by running them",
            where="compressed-tensors",
            fix=install_command("compressed"),
        )
    return find(LLMCOMPRESSOR)


def compression(
    scheme: Scheme,
    environment: Environment,
    base: Base,
    chat: ChatFormat,
    version: DatasetVersion,
    *,
    max_length: int,
    seed: int,
) -> Compression:
    """Return the settings for a model: for w4a16 the calibration rows, drawn by ``seed`` from the training rows."""
    if scheme == "fp8":
        return Compression(scheme, environment)
    group = group_size(base)
    members = sorted(version.domain_of("train"), key=lambda member: digest([seed, member.key]))
    # As in training, which has reported rows that are too long, and refused faulty ones.
    rows = [row.ids for row in encode_members(chat, members[:ROWS], max_length).rows]
    if not rows:
        raise UserError(
            "No training row is available to calibrate on",
            where=f"dataset version {version.digest[:12]}",
            fix="Use --scheme fp8, which needs no rows.",
        )
    return Compression(scheme, environment, group, rows)


def build_compressed(folder: Path, source: ExportSource, how: Compression) -> BuiltArtifact:
    """Write base and adapter as one quantized model, and compare it with the trained model."""
    project, trained = source.project, measure_trained(source)
    weights, way, ways = choose_merge_method(trained, project.reporter)
    write_compressed(folder, how, weights, project.base, project.chat, trained.system_prompt, project.reporter)
    figures = trained.figures(observe_compressed(folder, trained, project.reporter))
    notes = (*how.notes, *source.notes())
    versions = {f"llmcompressor:{name}": str(version) for name, version in how.environment.versions.items()}
    return BuiltArtifact(figures, PRECISIONS[how.scheme], way, ways, notes, packages=versions)


def write_compressed(
    folder: Path,
    how: Compression,
    weights: Weights,
    base: Base,
    chat: ChatFormat,
    system_prompt: str | None,
    reporter: Reporter,
) -> None:
    """Merge the weights in a folder inside ``folder``, have llm-compressor quantize them, and add the tokenizer."""
    merged = folder / "merged"
    merged.mkdir()
    write_merged(merged, weights, base, chat, system_prompt, reporter)
    name = f"llm-compressor {how.environment.versions['llmcompressor']}"
    job: dict[str, Any] = {"source": str(merged), "target": str(folder), "scheme": how.scheme}
    job |= {"group_size": how.group_size, "rows": [list(row) for row in how.rows]}
    with reporter.task(f"{how.scheme} with {name}", 1, "models") as task:
        _run(how.environment, job)
        task.advance()
    shutil.rmtree(merged)
    save_settings(folder, base, chat, system_prompt)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files readable only by the owner


def observe_compressed(folder: Path, trained: TrainedModel, reporter: Reporter) -> ArtifactOutputs:
    """Return the outputs of the compressed model, computed by transformers and compressed-tensors.

    Weights are decompressed; the inputs of FP8 layers are rounded as the file's scheme says.
    """
    with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars; it raises its errors
        model = load_folder(folder, trained)
        with torch.inference_mode():
            model(input_ids=torch.tensor([trained.probe.prompts[0]], device=device()))  # the first pass decompresses
    return observe_folder(model, folder, trained, reporter, "the compressed model's answers")


def group_size(base: Base) -> int:
    """Return the largest number of weights per scale that divides the rows of every linear layer."""
    config: Any = text_settings(base)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rows = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head)
    for size in _GROUPS:
        if all(row % size == 0 for row in rows):
            return size
    raise UserError(
        f"W4A16 needs rows of a multiple of {_GROUPS[-1]} weights, and this base has rows of {min(rows)}, "
        f"{max(rows)} weights",
        where=base.spec,
        fix="Use --scheme fp8.",
    )


def _run(environment: Environment, job: dict[str, Any]) -> None:
    """Run llm-compressor, whose output is shown only if it fails."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryDirectory() as work, (Path(work) / "log").open("wb") as log:
        write_json(Path(work) / "job.json", job)
        command = [str(environment.python), "-I", worker.__file__, str(Path(work) / "job.json")]
        child = start(command, stdout=log, stderr=log, cwd=Path(work), env=variables)
        try:
            code = child.wait()
        finally:
            end(child)
        if code == KILLED:
            raise UserError("llm-compressor was killed", fix=ENOUGH_MEMORY)
        if code:
            raise UserError(
                f"llm-compressor failed:\n{last_lines(Path(log.name), _TAIL)}",
                where=str(environment.folder),
                fix="Correct the cause and run the same command again.",
            )
