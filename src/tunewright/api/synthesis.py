"""Commands that have a model write rows: ``tunewright data generate`` and ``data from-documents``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.api.context import ProjectContext
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.readers.sources import source_files
from tunewright.data.versions import DatasetVersion, has_version, load_version

if TYPE_CHECKING:
    from tunewright.evaluation.answer_constraints import AnswerConstraints
    from tunewright.evidence.generated_effect import GeneratedEffect
    from tunewright.synthesis.generate import Estimate, GenerateResult, RowGenerator
    from tunewright.synthesis.inputs import Input
    from tunewright.synthesis.questions import DocumentsResult, QuestionWriter
    from tunewright.synthesis.teachers import Teacher


class SynthesisApi:
    """Methods that have the config's teacher write rows."""

    def __init__(self, opened: ProjectContext) -> None:
        self._context = opened
        self._project = opened.folder
        self._reporter = opened.reporter

    def estimate_generate(self, files: Iterable[str | Path]) -> Estimate:
        """Estimate calls, tokens and cost of :meth:`generate`, without sending anything."""
        generator, inputs = self._generator(files)
        return generator.estimate(inputs)

    def generate(self, files: Iterable[str | Path], out: str | Path | None = None) -> GenerateResult:
        """Have the config's teacher write ideal outputs for inputs, as a file that :meth:`DatasetApi.add` reads.

        Args:
            files: inputs in any format of pairs, with or without ideal outputs.
            out: the file to write (None: ``generated/`` in the project, named after the first file).

        Raises:
            UserError: no teacher or licence note in the config, a faulty or secret input, an endpoint that fails, a
                budget that is used up, or an existing file with other rows. Finished replies are kept.
        """
        generator, inputs = self._generator(files)
        return generator.run(inputs, self._out(out, Path(inputs[0].row.source).name.partition(".")[0]))

    def _generator(self, files: Iterable[str | Path]) -> tuple[RowGenerator, list[Input]]:
        from tunewright.metrics import scorer_of
        from tunewright.synthesis.generate import RowGenerator
        from tunewright.synthesis.inputs import read_inputs
        from tunewright.synthesis.rubric import RubricJudge

        config = self._project.config
        teacher = self._teacher(self._project)
        inputs = read_inputs(source_files(files, self._reporter), config.data, self._reporter)
        scorer = scorer_of(config.evaluate.metric, self._project.root)
        needed = config.generate.judge_score
        judge = None if needed is None else RubricJudge(self._project, needed, self._reporter)
        generator = RowGenerator(
            self._project, self._version(), teacher, scorer, self._constraints(), judge, self._reporter
        )
        return generator, inputs

    def estimate_from_documents(self, files: Iterable[str | Path]) -> Estimate:
        """Estimate calls, tokens and cost of :meth:`from_documents`, without sending anything."""
        return self._writer().estimate([Path(file) for file in files])

    def from_documents(self, files: Iterable[str | Path], out: str | Path | None = None) -> DocumentsResult:
        """Have the config's teacher write questions and answers from documents, each citing its passage.

        Args:
            files: PDF, DOCX, HTML, Markdown or text.
            out: the file to write (None: ``generated/`` in the project, named after the first document).

        Raises:
            UserError: as for :meth:`generate`; also if no document can be read.
        """
        paths = [Path(file) for file in files]
        return self._writer().run(paths, self._out(out, paths[0].stem))

    def generated_effect(self, evaluation: str | Path, without: str | Path) -> GeneratedEffect:
        """Compare an adapter with one trained without the generated rows, on people's test items.

        The finding becomes a part of the first evaluation's evidence. Nothing is answered again.

        Args:
            evaluation: the evaluation of the adapter trained with them.
            without: the evaluation of an adapter trained with train.generated: false.

        Raises:
            UserError: no such evaluation, or the two differ in more than the generated rows.
        """
        from tunewright.evidence.schema import find_evaluation
        from tunewright.synthesis.effect import measure_effect

        ours, theirs = (find_evaluation(self._project.evaluations, name) for name in (evaluation, without))
        return measure_effect(self._project, ours, theirs, self._reporter)

    def _out(self, out: str | Path | None, name: str) -> Path:
        path = self._project.root / "generated" / f"{name}.jsonl" if out is None else Path(out)
        if path.is_dir():
            raise UserError("A folder is there", where=str(path), fix="Name a file with --out.")
        return path

    def _writer(self) -> QuestionWriter:
        from tunewright.config import ConstrainConfig
        from tunewright.synthesis.questions import SCHEMA, QuestionWriter

        config = self._project.config
        # The teacher's replies are pairs in JSON, whatever form the project's answers have.
        evaluate = config.evaluate.model_copy(update={"structured_outputs": ConstrainConfig(json_schema=SCHEMA)})
        asking = ProjectFolder(self._project.root, config.model_copy(update={"evaluate": evaluate}))
        return QuestionWriter(self._project, self._version(), self._teacher(asking), self._reporter)

    def _version(self) -> DatasetVersion | None:
        if has_version(self._project.dataset):
            return load_version(self._project.dataset)
        self._reporter.say("There is no dataset version yet: inputs are not compared with held-out rows.")
        return None

    def _constraints(self) -> AnswerConstraints | None:
        """Return the check of the form that the config's structured outputs have."""
        from tunewright.evaluation.answer_constraints import AnswerConstraints, grammar_of

        grammar = grammar_of(self._project)
        return None if grammar is None else AnswerConstraints(self._context.chat, grammar)

    def _teacher(self, project: ProjectFolder) -> Teacher:
        from tunewright.synthesis.teachers import EndpointTeacher, LocalTeacher, require_teacher

        config = project.config
        require_teacher(config.generate)
        if config.generate.base is None:
            return EndpointTeacher(project, _schema(project), self._reporter)
        from tunewright.chat import open_chat
        from tunewright.evaluation.generations import Generator
        from tunewright.models.bases import resolve_base

        base = resolve_base(config.generate.base, config.generate.revision, self._project.root, self._reporter)
        chat = open_chat(base, config.chat, self._reporter)
        quantization = config.evaluate.quantization or config.train.quantization
        generator = Generator.of(project, base, chat, quantization, self._reporter)
        return LocalTeacher(project, generator, self._reporter)


def _schema(project: ProjectFolder) -> dict[str, object] | None:
    """Return the JSON schema of the config's structured outputs."""
    from tunewright.generation.constraints import read_schema

    constrain = project.config.evaluate.structured_outputs
    if constrain is None or constrain.json_schema is None:
        return None
    schema = constrain.json_schema
    return dict(read_schema(project.root / schema)) if isinstance(schema, str) else schema
