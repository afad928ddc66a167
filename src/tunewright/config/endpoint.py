"""The config's sections of models behind OpenAI-compatible APIs: judge, teacher, incumbents and reflection model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tunewright.config.section import ConfigSection
from tunewright.core.errors import UserError

_PARAMETERS = {"temperature": 0, "max_tokens": 512}
_INCUMBENT_PARAMETERS = {"temperature": 0, "max_tokens": 1024}
_TEACHER_PARAMETERS = {"temperature": 0.7, "max_tokens": 512}
_REFLECTION_PARAMETERS = {"temperature": 1.0, "max_tokens": 4096}
_OURS = {"model", "messages", "stream", "stream_options", "n"}


class EndpointConfig(ConfigSection):
    """A model behind an OpenAI-compatible API."""

    base_url: Annotated[str | None, Field(pattern=r"^https?://[^@\s]+$")] = None
    """The API's root, such as https://api.openai.com/v1 (no password in it: api_key_env is for
    that).
    """
    model: Annotated[str | None, Field(min_length=1)] = None
    """The model's name at that endpoint."""
    api_key_env: Annotated[str | None, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = None
    """Name of the environment variable that holds the API key (null: no key is sent)."""
    parameters: dict[str, Any] = _PARAMETERS
    """Further parameters of every request (temperature 0 makes replies reproducible; 512 tokens
    leave room for a short reason). A reasoning model needs others, such as max_completion_tokens:
    4096.
    """
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests in flight at once."""
    requests_per_minute: Annotated[float | None, Field(gt=0)] = None
    """Maximum number of requests sent per minute, retries included (null: no limit)."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for a reply."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Retries of a request after a lost connection or status 408, 409, 429 or 5xx. Waits follow
    Retry-After, else 1, 2, 4, ... seconds.
    """
    price_input: Annotated[float | None, Field(ge=0)] = None
    """Price of a million prompt tokens, in any currency."""
    price_output: Annotated[float | None, Field(ge=0)] = None
    """Price of a million reply tokens, in the same currency."""

    @field_validator("parameters")
    @classmethod
    def _none_of_ours(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(_OURS & parameters.keys()):
            raise ValueError(f"{name} is set by tunewright; remove it")
        return parameters

    @model_validator(mode="after")
    def _both_prices(self) -> EndpointConfig:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("set both price_input and price_output, or neither")
        return self

    @property
    def reply_limit(self) -> int | None:
        """Maximum number of tokens that the parameters allow a reply; None if they set no limit."""
        for name in ("max_completion_tokens", "max_tokens"):
            if isinstance(self.parameters.get(name), int):
                return int(self.parameters[name])
        return None

    def require_costs(self, of: str = "") -> None:
        """Check that a budget can be kept: a request has a price and a longest reply."""
        if self.price_input is None:
            raise ValueError(f"a budget requires price_input and price_output{of}")
        if self.reply_limit is None:
            raise ValueError("a budget requires max_tokens or max_completion_tokens among the parameters")


class ReferenceModelConfig(EndpointConfig):
    """A model to compare the tuned answers with: an endpoint, or its answers in a file."""

    answers: Annotated[str | None, Field(min_length=1)] = None
    """A JSONL file of {"key": PAIR KEY, "answer": TEXT}, relative to this file, in place of
    base_url.
    """

    @model_validator(mode="after")
    def _one_source(self) -> ReferenceModelConfig:
        if (self.answers is None) == (self.base_url is None):
            raise ValueError("set either answers (a file) or base_url and model (an endpoint)")
        if self.base_url is not None and self.model is None:
            raise ValueError("base_url requires model")
        return self


class JudgeConfig(EndpointConfig):
    """The model that judges answers; controls test it on every run. Requires base_url and model."""

    criteria: Annotated[str | None, Field(min_length=1)] = None
    """Criteria to add to the judge's instructions (null: none)."""
    budget: Annotated[float | None, Field(gt=0)] = None
    """Highest cost of judging one evaluation, in the prices' currency (null: no limit)."""
    controls: Annotated[int, Field(ge=14)] = 30
    """Maximum number of items on which the judge itself is tested (30: a control passes with up to
    two failures; fewer than 14 cannot prove 80% even without a failure).
    """
    reference_model: ReferenceModelConfig | None = None
    """Another model to compare the tuned answers with: base_url and model, or answers (null: none).
    """

    def require(self) -> None:
        """Check that a judge is set."""
        if self.base_url is None or self.model is None:
            raise UserError(
                "The config has no judge",
                where="judge.base_url",
                fix="Set judge.base_url and judge.model (and judge.api_key_env), such as those of a model you serve.",
            )

    @model_validator(mode="after")
    def _priced_budget(self) -> JudgeConfig:
        if self.budget is None:
            return self
        asked = [self, self.reference_model] if self.reference_model and self.reference_model.base_url else [self]
        for endpoint in asked:
            endpoint.require_costs(" of every endpoint")
        return self


class IncumbentConfig(EndpointConfig):
    """A hosted model that answers dev and test as an arm. Requires base_url and model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    """The arm's name after `incumbent-`; letters, digits, dot, hyphen and underscore."""
    parameters: dict[str, Any] = _INCUMBENT_PARAMETERS
    """Further parameters of every request, as your application sends them (temperature 0 makes
    answers reproducible; 1024 tokens cut few answers, and cut ones are counted).
    """
    system_prompt: Annotated[str | None, Field(min_length=1)] = None
    """System prompt to send in place of the rows' own (null: the rows' own, if any)."""
    trained_on: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Added files of pairs that this model was itself trained on. Test rows from them favour it:
    they are counted, and the loss is also measured on the others.
    """
    budget: Annotated[float | None, Field(gt=0)] = None
    """Highest cost of this incumbent's answers, in the prices' currency (null: no limit). It
    requires prices and a limit on reply tokens.
    """
    frozen: bool = False
    """Use frozen answers only and send nothing, for an endpoint that is gone. Rows without a frozen
    answer are left out of the contrast and counted.
    """

    @model_validator(mode="after")
    def _complete(self) -> IncumbentConfig:
        if self.base_url is None or self.model is None:
            raise ValueError("set base_url and model (also with frozen: they identify the frozen answers)")
        if self.budget is not None:
            self.require_costs()
        return self


class GenerateConfig(EndpointConfig):
    """The teacher that writes ideal outputs: base_url and model, or the local model base."""

    base: Annotated[str | None, Field(min_length=1)] = None
    """A local model as teacher in place of base_url, named as base_model is. Its engine, precision
    and batch size are those of evaluations.
    """
    revision: str | None = None
    """Branch, tag or commit of a hub model in generate.base (null: main)."""
    license: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    """What the teacher's licence says on training with its outputs. The note is kept with every
    row, and without it nothing is generated.
    """
    instruction: Annotated[str | None, Field(min_length=1)] = None
    """Instruction for the teacher alone, such as the form of an answer. It is added to the system
    prompt and is not part of the row.
    """
    parameters: dict[str, Any] = _TEACHER_PARAMETERS
    """Further parameters of every request. A local teacher takes temperature, top_p and max_tokens.
    (0.7, the temperature of Wang et al. 2022, arXiv 2203.11171: samples have to differ for their
    agreement to say anything.)
    """
    samples: Annotated[int, Field(ge=1, le=40)] = 3
    """Answers sampled for each input; the one that most samples agree with is kept."""
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Smallest agreement of a kept answer: its mean score by evaluate.metric against all samples,
    itself included (0.6: two samples of three). Samples that cannot be used count as 0.
    """
    min_score: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Smallest score by evaluate.metric of a kept answer, where the input has an ideal output or
    the metric needs none (regex, json_valid).
    """
    judge_score: Annotated[int | None, Field(ge=2, le=5)] = None
    """Smallest score of a kept answer, from 1 to 5, by the model of the judge section. The judge is
    tested first on training rows of people (null: answers are not judged).
    """
    questions: Annotated[int, Field(ge=1, le=20)] = 3
    """Questions to ask for each passage in `data from-documents`."""
    passage_characters: Annotated[int, Field(ge=200, le=20_000)] = 2_000
    """Longest passage of a document in characters (2,000 are about 500 tokens of English)."""
    response_format: bool = True
    """Send the schema of evaluate.structured_outputs to the endpoint as response_format. Answers
    are checked against it either way.
    """
    budget: Annotated[float | None, Field(gt=0)] = None
    """Highest cost of one run, in the prices' currency (null: no limit)."""

    @model_validator(mode="after")
    def _one_teacher(self) -> GenerateConfig:
        if self.base is not None and self.base_url is not None:
            raise ValueError("set either base (a local model) or base_url and model (an endpoint)")
        if self.samples > 1 and self.parameters.get("temperature") == 0:
            raise ValueError("samples of temperature 0 are equal: set samples: 1, or a temperature above 0")
        if self.budget is not None:
            self.require_costs()
        return self


class ReflectionModelConfig(EndpointConfig):
    """The model that reads answers with their faults and proposes instructions. Requires base_url and model."""

    parameters: dict[str, Any] = _REFLECTION_PARAMETERS
    """Further parameters of every request (temperature 1 varies the proposals; 4,096 tokens leave
    room for a long instruction). A reasoning model needs others, such as max_completion_tokens:
    8192.
    """


class PromptOptimizationConfig(ConfigSection):
    """Optimization of the instruction by GEPA, which `tunewright optimize-prompt` runs."""

    reflection_model: ReflectionModelConfig | None = None
    """The model that proposes instructions (null: the judge's endpoint and parameters)."""
    budget: Annotated[float | None, Field(gt=0)] = None
    """Highest cost of one optimization, in the prices' currency (null: no limit)."""
    max_reflection_calls: Annotated[int, Field(ge=1)] = 50
    """Maximum number of requests to the reflection model in one optimization."""
    max_metric_calls: Annotated[int, Field(ge=10)] = 600
    """Scored answers of the base after which no further instruction is tried (GEPA's measure of its
    budget); at least two passes over the validation rows.
    """
    minibatch_size: Annotated[int, Field(ge=1, le=32)] = 3
    """Training rows that the reflection model sees at once (3: GEPA's default)."""
    val_items: Annotated[int, Field(ge=2)] = 50
    """Training rows, in whole clusters, that score the instructions; the others are shown to the
    reflection model. At most half of the training rows.
    """
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    """Seed of the optimization (null: the project's seed)."""
