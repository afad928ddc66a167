"""Commands that have a model write rows: ``tunewright data generate`` and ``data from-documents``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.api.context import ProjectContext
from tunewright.core.errors import UserError
from tunewright.data.readers.sources import source_files
from tunewright.data.versions import DatasetVersion, has_version, load_version

if TYPE_CHECKING:
    from tunewright.evaluation.answer_constraints import AnswerConstraints
    from tunewright.synthesis.generate import Estimate, GenerateResult, RowGenerator
    from tunewright.synthesis.inputs import Input
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
        if out is None:
            first = inputs[0].row.source
            out = self._project.root / "generated" / f"{Path(first).name.partition('.')[0]}.jsonl"
        out = Path(out)
        if out.is_dir():
            raise UserError("A folder is there", where=str(out), fix="Name a file with --out.")
        return generator.run(inputs, out)

    def _generator(self, files: Iterable[str | Path]) -> tuple[RowGenerator, list[Input]]:
        from tunewright.metrics import scorer_of
        from tunewright.synthesis.generate import RowGenerator
        from tunewright.synthesis.inputs import read_inputs

        config = self._project.config
        teacher = self._teacher()
        inputs = read_inputs(source_files(files, self._reporter), config.data, self._reporter)
        scorer = scorer_of(config.evaluate.metric, self._project.root)
        return (
            RowGenerator(self._project, self._version(), teacher, scorer, self._constraints(), self._reporter),
            inputs,
        )

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

    def _teacher(self) -> Teacher:
        from tunewright.synthesis.teachers import EndpointTeacher, LocalTeacher, require_teacher

        config = self._project.config
        require_teacher(config.generate)
        if config.generate.base is None:
            return EndpointTeacher(self._project, self._schema(), self._reporter)
        from tunewright.chat import open_chat
        from tunewright.evaluation.generations import Generator
        from tunewright.models.bases import resolve_base

        base = resolve_base(config.generate.base, config.generate.revision, self._project.root, self._reporter)
        chat = open_chat(base, config.chat, self._reporter)
        quantization = config.evaluate.quantization or config.train.quantization
        generator = Generator.of(self._project, base, chat, quantization, self._reporter)
        return LocalTeacher(self._project, generator, self._reporter)

    def _schema(self) -> dict[str, object] | None:
        """Return the JSON schema of the config's structured outputs."""
        from tunewright.generation.constraints import read_schema

        constrain = self._project.config.evaluate.structured_outputs
        if constrain is None or constrain.json_schema is None:
            return None
        schema = constrain.json_schema
        return dict(read_schema(self._project.root / schema)) if isinstance(schema, str) else schema
