"""The config's generate section: the teacher that writes ideal outputs, and the rows that are kept."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tunewright.config.endpoint import EndpointConfig

_PARAMETERS = {"temperature": 0.7, "max_tokens": 512}


class GenerateConfig(EndpointConfig):
    """The teacher that writes ideal outputs: base_url and model, or the local model base."""

    base: Annotated[
        str | None,
        Field(
            min_length=1,
            description="A local model as teacher in place of base_url, named as base_model is. Its engine, precision "
            "and batch size are those of evaluations.",
        ),
    ] = None
    revision: Annotated[
        str | None, Field(description="Branch, tag or commit of a hub model in generate.base (null: main).")
    ] = None
    license: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=200,
            description="What the teacher's licence says on training with its outputs. The note is kept with every "
            "row, and without it nothing is generated.",
        ),
    ] = None
    instruction: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Instruction for the teacher alone, such as the form of an answer. It is added to the system "
            "prompt and is not part of the row.",
        ),
    ] = None
    parameters: Annotated[
        dict[str, Any],
        Field(
            description="Further parameters of every request. A local teacher takes temperature, top_p and max_tokens. "
            "(0.7, the temperature of Wang et al. 2022, arXiv 2203.11171: samples have to differ for their agreement "
            "to say anything.)"
        ),
    ] = _PARAMETERS
    samples: Annotated[
        int,
        Field(ge=1, le=40, description="Answers sampled for each input; the one that most samples agree with is kept."),
    ] = 3
    agreement: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Smallest agreement of a kept answer: its mean score by evaluate.metric against all samples, "
            "itself included (0.6: two samples of three). Samples that cannot be used count as 0.",
        ),
    ] = 0.6
    min_score: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Smallest score by evaluate.metric of a kept answer, where the input has an ideal output or "
            "the metric needs none (regex, json_valid).",
        ),
    ] = 1.0
    judge_score: Annotated[
        int | None,
        Field(
            ge=2,
            le=5,
            description="Smallest score of a kept answer, from 1 to 5, by the model of the judge section. The judge is "
            "tested first on training rows of people (null: answers are not judged).",
        ),
    ] = None
    questions: Annotated[
        int, Field(ge=1, le=20, description="Questions to ask for each passage in `data from-documents`.")
    ] = 3
    passage_characters: Annotated[
        int,
        Field(
            ge=200,
            le=20_000,
            description="Longest passage of a document in characters (2,000 are about 500 tokens of English).",
        ),
    ] = 2_000
    response_format: Annotated[
        bool,
        Field(
            description="Send the schema of evaluate.structured_outputs to the endpoint as response_format. Answers "
            "are checked against it either way."
        ),
    ] = True
    budget: Annotated[
        float | None,
        Field(gt=0, description="Highest cost of one run, in the prices' currency (null: no limit)."),
    ] = None

    @model_validator(mode="after")
    def _one_teacher(self) -> GenerateConfig:
        if self.base is not None and self.base_url is not None:
            raise ValueError("set either base (a local model) or base_url and model (an endpoint)")
        if self.samples > 1 and self.parameters.get("temperature") == 0:
            raise ValueError("samples of temperature 0 are equal: set samples: 1, or a temperature above 0")
        if self.budget is not None and self.price_input is None:
            raise ValueError("a budget requires price_input and price_output")
        if self.budget is not None and self.reply_limit is None:
            raise ValueError("a budget requires max_tokens or max_completion_tokens among the parameters")
        return self
