"""Commands that have a model write rows: ``tunewright data generate`` and ``data from-documents``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.readers.source_files import source_files
from tunewright.data.versions import DatasetVersion, has_version, load_version
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.evidence.common import GeneratedEffect
    from tunewright.synthesis.generate import GenerateEstimate, GenerateResult, RowGenerator
    from tunewright.synthesis.input_files import Input
    from tunewright.synthesis.questions import DocumentsResult, QuestionWriter
    from tunewright.synthesis.teachers import Teacher


def estimate_generate(project: OpenProject, files: Iterable[str | Path]) -> GenerateEstimate:
    """Estimate calls, tokens and cost of :meth:`generate`, without sending anything."""
    generator, inputs = _generator(project, files)
    return generator.estimate(inputs)


def generate(project: OpenProject, files: Iterable[str | Path], out: str | Path | None = None) -> GenerateResult:
    """Have the config's teacher write ideal outputs for inputs, as a file that ``data.add`` reads.

    Args:
        files: inputs in any format of pairs, with or without ideal outputs.
        out: the file to write (None: ``generated/`` in the project, named after the first file).

    Raises:
        UserError: no teacher or licence note in the config, a faulty or secret input, an endpoint that fails, a
            budget that is used up, or an existing file with other rows. Finished replies are kept.
    """
    generator, inputs = _generator(project, files)
    return generator.run(inputs, _out(project, out, Path(inputs[0].row.source).name.partition(".")[0]))


def _generator(project: OpenProject, files: Iterable[str | Path]) -> tuple[RowGenerator, list[Input]]:
    from tunewright.evaluation.answer_constraints import AnswerConstraints, grammar_of
    from tunewright.metrics import scorer_of
    from tunewright.synthesis.generate import RowGenerator, RubricJudge
    from tunewright.synthesis.input_files import read_inputs

    config = project.folder.config
    teacher = _teacher(project.folder, project.reporter)
    inputs = read_inputs(source_files(files, project.reporter), config.data, project.reporter)
    scorer = scorer_of(config.evaluate.metric, project.folder.root)
    needed = config.generate.judge_score
    judge = None if needed is None else RubricJudge(project.folder, needed, project.reporter)
    grammar = grammar_of(project.folder)  # the form of the config's structured outputs
    constraints = None if grammar is None else AnswerConstraints(project.chat, grammar)
    generator = RowGenerator(project.folder, _version(project), teacher, scorer, constraints, judge, project.reporter)
    return generator, inputs


def estimate_from_documents(project: OpenProject, files: Iterable[str | Path]) -> GenerateEstimate:
    """Estimate calls, tokens and cost of :meth:`from_documents`, without sending anything."""
    return _writer(project).estimate([Path(file) for file in files])


def from_documents(project: OpenProject, files: Iterable[str | Path], out: str | Path | None = None) -> DocumentsResult:
    """Have the config's teacher write questions and answers from documents, each citing its passage.

    Args:
        files: PDF, DOCX, HTML, Markdown or text.
        out: the file to write (None: ``generated/`` in the project, named after the first document).

    Raises:
        UserError: as for :meth:`generate`; also if no document can be read.
    """
    paths = [Path(file) for file in files]
    return _writer(project).run(paths, _out(project, out, paths[0].stem))


def generated_effect(project: OpenProject, evaluation: str | Path, without: str | Path) -> GeneratedEffect:
    """Compare an adapter with one trained without the generated rows, on people's test items.

    The finding becomes a part of the first evaluation's evidence. No answer is recomputed.

    Args:
        evaluation: the evaluation of the adapter trained with generated rows.
        without: the evaluation of an adapter trained with train.generated: false.

    Raises:
        UserError: no such evaluation, or the two differ in more than the generated rows.
    """
    from tunewright.evidence.files import find_evaluation
    from tunewright.synthesis.effect import measure_effect

    ours, theirs = (find_evaluation(project.folder.evaluations, name) for name in (evaluation, without))
    return measure_effect(project.folder, ours, theirs, project.reporter)


def _out(project: OpenProject, out: str | Path | None, name: str) -> Path:
    path = project.folder.root / "generated" / f"{name}.jsonl" if out is None else Path(out)
    if path.is_dir():
        raise UserError("A folder is there", where=str(path), fix="Name a file with --out.")
    return path


def _writer(project: OpenProject) -> QuestionWriter:
    from tunewright.config import ConstrainConfig
    from tunewright.synthesis.questions import SCHEMA, QuestionWriter

    config = project.folder.config
    # The teacher's replies are pairs in JSON, regardless of the form of the project's answers.
    evaluate = config.evaluate.model_copy(update={"structured_outputs": ConstrainConfig(json_schema=SCHEMA)})
    asking = ProjectFolder(project.folder.root, config.model_copy(update={"evaluate": evaluate}))
    return QuestionWriter(project.folder, _version(project), _teacher(asking, project.reporter), project.reporter)


def _version(project: OpenProject) -> DatasetVersion | None:
    if has_version(project.folder.dataset):
        return load_version(project.folder.dataset)
    project.reporter.say("There is no dataset version yet: inputs are not compared with held-out rows.")
    return None


def _teacher(project: ProjectFolder, reporter: Reporter) -> Teacher:
    from tunewright.synthesis.teachers import EndpointTeacher, LocalTeacher

    config = project.config
    if config.generate.base_url is None and config.generate.base is None:
        raise UserError(
            "The config has no teacher",
            where="generate.base_url",
            fix="Set generate.base_url, model and api_key_env, or generate.base for a local model.",
        )
    if config.generate.license is None:
        raise UserError(
            "The teacher's licence is not stated",
            where="generate.license",
            fix="Read the licence or terms of the teacher on training with its outputs, and put a note of it there.",
        )
    if config.generate.base is None:
        return EndpointTeacher(project, _schema(project), reporter)
    from tunewright.chat import open_chat
    from tunewright.evaluation.generations import Generator
    from tunewright.models.bases import resolve_base

    base = resolve_base(config.generate.base, config.generate.revision, project.root, reporter)
    chat = open_chat(base, config.chat, reporter)
    quantization = config.evaluate.quantization or config.train.quantization
    generator = Generator.of(project, base, chat, quantization, reporter)
    return LocalTeacher(project, generator, reporter)


def _schema(project: ProjectFolder) -> dict[str, object] | None:
    """Return the JSON schema of the config's structured outputs."""
    from tunewright.generation.constraints import read_schema

    constrain = project.config.evaluate.structured_outputs
    if constrain is None or constrain.json_schema is None:
        return None
    schema = constrain.json_schema
    return dict(read_schema(project.root / schema)) if isinstance(schema, str) else schema
