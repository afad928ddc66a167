"""The config's sections of measurements: evaluate with its arms, metrics and constraint, and regressions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tunewright.config.endpoint import IncumbentConfig, PromptOptimizationConfig
from tunewright.config.metrics import Metric, metric_name
from tunewright.config.section import AnswerEngineName, ConfigSection, DemonstrationOrder, Quantization, RetrieverName


class ConstrainConfig(ConfigSection):
    """The form of a constrained answer: choices, a regular expression, a JSON schema or function calls."""

    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...] | None, Field(min_length=1)] = None
    """The whole answer is one of these texts."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    r"""The whole answer matches this regular expression. The syntax is that of Rust's regex: like
    Python's, without look-around and back-references; \d means 0 to 9.
    """
    json_schema: str | dict[str, Any] | None = None
    """The whole answer is JSON of this schema: the schema itself, or its file relative to this one.
    """
    tools: Literal["auto", "required"] | None = None
    """Calls in the answer are of functions that the row declares, with arguments by their schemas.
    `auto` allows text too; `required` allows calls alone. Rows without functions are not
    constrained.
    """

    @model_validator(mode="after")
    def _one_of_four(self) -> ConstrainConfig:
        if [self.choices, self.regex, self.json_schema, self.tools].count(None) != 3:
            raise ValueError("set exactly one of choices, regex, json_schema and tools")
        return self


class EvaluateConfig(ConfigSection):
    """Measurement of the arms, and the gain that counts as better."""

    metric: Metric = "exact_match"
    """The metric that decides: exact_match, macro_f1, bleu, chrf, token_f1, rouge_l, json (F1 over an
    object's fields) or json_valid; for function calls, call_exact_match, call_ast_match, call_name_match,
    call_argument_f1, call_schema_valid or irrelevance_detection; with settings, {exact_match:
    {ignore_case: true}}, {choices: [granted, denied]}, {json: {fields: [name, date]}}, {regex:
    '[A-Z]+-[0-9]+'}, {python: 'module:function'}.
    """
    extra_metrics: tuple[Metric, ...] = ()
    """Further metrics to report, which decide nothing: [bleu, chrf]."""
    num_fewshot: Annotated[tuple[Annotated[int, Field(ge=1, le=256)], ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """Numbers of demonstrations to try, static and retrieved; the best arm on dev goes to the test.
    They double, as in Bertsch et al. 2024 (arXiv 2405.00200). Arms that exceed the base's context
    are left out.
    """
    static_seeds: Annotated[int, Field(ge=0, le=20)] = 3
    """Random draws of static demonstrations for each number (0: no static arms). One draw says
    little, because scores vary with the draw (Zhao et al. 2021, arXiv 2102.09690).
    """
    retrievers: tuple[RetrieverName, ...] = ("bm25", "tfidf")
    """Retrievers of demonstrations similar to the question: bm25 (words), tfidf (character
    n-grams), dense (the base's own hidden states) and sentence-transformers (embedding_model); []
    for no retrieved arms.
    """
    embedding_model: Annotated[str | None, Field(min_length=1)] = None
    """Model of the retriever sentence-transformers: a folder, relative to this file, or a hub id.
    It needs tunewright[sentence-transformers].
    """
    mmr_lambda: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Weights of similarity against diversity in retrieved demonstrations, by maximal marginal
    relevance (Carbonell and Goldstein 1998); each is tried. 1 is similarity alone.
    """
    demonstration_order: Annotated[tuple[DemonstrationOrder, ...], Field(min_length=1)] = ("similar_last",)
    """Orders of retrieved demonstrations to try: the most similar one next to the question
    (similar_last, as in Liu et al. 2022, arXiv 2101.06804) or first (similar_first).
    """
    instructions: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Alternative instructions to try in place of the pairs' own: their system turn, or the text
    that all inputs begin with.
    """
    prompt_optimization: PromptOptimizationConfig | None = None
    """Reflection model and limits of `tunewright optimize-prompt` (null: the judge's endpoint, and
    the defaults).
    """
    screening_items: Annotated[int | None, Field(ge=10)] = 64
    """Dev items that every prompting arm answers. Only the finalists answer all of dev (null: all
    arms do).
    """
    finalists: Annotated[int, Field(ge=1)] = 3
    """Maximum number of prompting arms that answer all of dev, of those that are not worse than the
    leader on the screening items.
    """
    tuned_retrieved: bool = True
    """Also measure the adapter with the best retrieved demonstrations in its prompt."""
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    """Longest answer in tokens (null: the 99th percentile of the training answers plus a quarter,
    at least 8).
    """
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that end an answer; they are not part of it (null: with a chat template none, else the
    headings ### Instruction and ### Response, which a base may write after its answer).
    """
    structured_outputs: ConstrainConfig | None = None
    """Form that constrained arms enforce while they decode, measured alongside the free arms:
    {choices: [a, b]}, {regex: PATTERN}, {json_schema: FILE} or {tools: auto} (calls of each row's
    functions).
    """
    engine: AnswerEngineName = "auto"
    """Engine that computes the answers of all arms. peft is built in; vllm needs the environment
    that `tunewright engine install vllm` creates. auto uses vllm where that environment and a CUDA
    GPU are present, else peft, and says why.
    """
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Conversations generated at once; vllm on a GPU takes as many as fit (up to 256)."""
    quantization: Quantization | None = None
    """Quantization of the base, the same for all arms (null: as in the adapter's training)."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Smallest gain over the best prompting arm that is worth shipping: 0.02 is 2 points."""
    incumbents: tuple[IncumbentConfig, ...] = ()
    """Models in use today, behind OpenAI-compatible endpoints, which answer dev and test as arms:
    name, base_url and model, with the other keys of `judge` that describe an endpoint,
    system_prompt, budget and frozen.
    """
    non_inferiority_margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Largest loss against an incumbent that still counts as not worse; without incumbents it has
    no effect. (0.02: the default of `margin`, since a loss too small to ship for is too small to
    keep a model for; fixed before the test is opened, as ICH E9 asks, section 3.3.2).
    """

    @field_validator("incumbents")
    @classmethod
    def _distinct(cls, incumbents: tuple[IncumbentConfig, ...]) -> tuple[IncumbentConfig, ...]:
        names = [incumbent.name for incumbent in incumbents]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two incumbents are named {name}")
        return incumbents

    @field_validator("extra_metrics")
    @classmethod
    def _once(cls, extra_metrics: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        names = [metric_name(m) for m in extra_metrics]
        names += [metric_name(info.data["metric"])] if "metric" in info.data else []
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is already measured")
        return extra_metrics

    @model_validator(mode="after")
    def _named_embedding_model(self) -> EvaluateConfig:
        if "sentence-transformers" in self.retrievers and self.embedding_model is None:
            raise ValueError("the retriever sentence-transformers requires embedding_model")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics to measure; the first decides."""
        return (self.metric, *self.extra_metrics)


Margin = Annotated[
    float | None,
    Field(gt=0, lt=1, description="Largest acceptable drop, as a share (null: regressions.margin)."),
]


class FileSuite(ConfigSection):
    """A suite whose items are in a file."""

    file: Annotated[str, Field(min_length=1)]
    """JSON Lines, relative to this file."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Number of items, drawn by the seed (null: all)."""
    margin: Margin = None


class InstructionsSuite(FileSuite):
    """Prompts whose answers rules can check."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 1280
    """Longest answer in tokens (1280: lm-eval's setting for IFEval; fewer is faster)."""


class LmEvalSuite(ConfigSection):
    """A task of EleutherAI's lm-evaluation-harness, which is an extra."""

    task: Annotated[str, Field(min_length=1)]
    """The task's name in lm-eval."""
    include_path: Annotated[str | None, Field(min_length=1)] = None
    """A folder with your own task files, relative to this file."""
    metric: Annotated[str | None, Field(min_length=1)] = None
    """One of the task's metrics (null: acc_norm, else its first)."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Number of items, from the task's beginning (null: all)."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Worked examples before each question (0: lm-eval's default)."""
    margin: Margin = None


def _named(key: str) -> BeforeValidator:
    """Return a validator that accepts a suite's name alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class RegressionsConfig(ConfigSection):
    """Suites of general capability, measured with the adapter off and on to show what tuning lost."""

    samples: Annotated[int, Field(ge=0)] = 32
    """Conversations that the base writes, to measure their likelihood under the adapter; 0 turns
    this off (32: about 200 seconds of one core for a base of 135M parameters, most of them once per
    base).
    """
    samples_margin: Annotated[float | None, Field(gt=0)] = None
    """Largest acceptable drop of that likelihood, in nats per token (null: reported, and not part
    of the verdict, because no general threshold is known).
    """
    multiple_choice: tuple[Annotated[FileSuite, _named("file")], ...] = ()
    """Files of multiple-choice questions: objects with query, choices and gold, and with group
    where several belong together. An entry is a file's name or {file: NAME, limit: 500, margin:
    0.02}.
    """
    instruction_following: tuple[Annotated[InstructionsSuite, _named("file")], ...] = ()
    """Files of prompts with checks of the answer's form, such as Google's IFEval. Entries are as
    above, with max_new_tokens as a further setting.
    """
    lm_eval: tuple[Annotated[LmEvalSuite, _named("task")], ...] = ()
    """Tasks of lm-eval (pip install 'tunewright[lm-eval]'), such as hellaswag or {task: hellaswag,
    limit: 500}.
    """
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Largest acceptable drop of a suite's score: 0.02 is 2 points."""

    @property
    def measures(self) -> bool:
        """True if any suite is configured."""
        return bool(self.samples or self.multiple_choice or self.instruction_following or self.lm_eval)
