"""The config's data section: where the pairs come from and how they are divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunewright.config.section import Section

# As data.secrets names what it finds: the first 22 are secrets, the next 5 personal data, the last 3 need --presidio.
Findable = Literal[
    "private_key",
    "github_token",
    "gitlab_token",
    "npm_token",
    "pypi_token",
    "aws_key_id",
    "aws_secret",
    "google_key",
    "azure_key",
    "slack_token",
    "stripe_key",
    "anthropic_key",
    "openai_key",
    "huggingface_token",
    "sendgrid_key",
    "twilio_key",
    "databricks_token",
    "digitalocean_token",
    "jwt",
    "url_credentials",
    "password",
    "card",
    "iban",
    "email",
    "phone",
    "us_ssn",
    "ip_address",
    "person",
    "location",
    "nrp",
]


Duplicates = Literal["keep", "drop"]


class MixConfig(Section):
    """Generic instruction data among the training rows, against forgetting what the base could do."""

    source: Annotated[
        str, Field(min_length=1, description="A file of pairs that are not of the domain, relative to this file.")
    ]
    fraction: Annotated[
        float,
        Field(
            gt=0,
            le=0.5,
            description="Share of all training rows that is drawn from it, by the seed (0.05: Scialom et al. 2022, "
            "arXiv 2205.12393, find 1% enough for whole tasks).",
        ),
    ] = 0.05
    rows: Annotated[str | None, Field(description="As data.rows, for this file.")] = None
    input: Annotated[str | None, Field(description="As data.input, for this file.")] = None
    output: Annotated[str | None, Field(description="As data.output, for this file.")] = None
    ignore: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(description="As data.ignore, for this file.")
    ] = ()


class DataConfig(Section):
    """Where the pairs come from and how they are divided."""

    sources: Annotated[
        tuple[str, ...],
        Field(
            description="Files of pairs (JSON, CSV, Parquet or a saved `datasets` folder, relative to this file) that "
            "`tunewright run` adds; also folders of such files, and patterns such as data/*.jsonl."
        ),
    ] = ()
    rows: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Where the rows are in a JSON document that is no array of rows: a JMESPath expression, such "
            "as values(@) for {id: row, ...} or *[] for {name: [row, ...], ...}.",
        ),
    ] = None
    input: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The column or key that holds the input, or a Jinja template over the row's keys, such as "
            '{{ context ~ " " ~ question }}.',
        ),
    ] = None
    output: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The column or key that holds the ideal output, or a Jinja template, such as "
            "{{ answers[0] }} or {{ slots | tojson }}.",
        ),
    ] = None
    groups: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Columns or keys, such as customer or document: rows that share a value of one are not "
            "independent, and stay on one side of the split. With data.rows, also a JMESPath from the object above a "
            "row, such as parent.id or parent.sql[0]; parent.parent is the next object above."
        ),
    ] = ()
    ignore: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Columns or keys to leave out, such as id or source; others that nothing uses are kept as "
            "metadata."
        ),
    ] = ()
    system: Annotated[
        str | None,
        Field(description="An instruction put, when pairs are added, before each that has no system turn of its own."),
    ] = None
    allow: Annotated[
        tuple[Findable, ...],
        Field(
            description="Kinds of secrets and personal data that are meant to be in the pairs, such as the firm's own "
            "phone number or test keys: counted and told, but let through."
        ),
    ] = ()
    max_characters: Annotated[
        int,
        Field(
            gt=0,
            description="A longer conversation is refused as faulty: it is nearly always a file pasted into a cell.",
        ),
    ] = 32_000
    similarity: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Inputs at or above this Jaccard similarity of character 4-grams share a cluster, which "
            "never straddles the split (0.8: Lee et al. 2021, arXiv 2107.06499).",
        ),
    ] = 0.8
    split_by: Annotated[
        Literal["input", "output_template"],
        Field(
            description="Rows that share a cluster: those with near-equal inputs, or also those whose outputs are "
            "equal but for quoted strings and numbers, such as queries made from one template."
        ),
    ] = "input"
    duplicates: Annotated[
        Duplicates,
        Field(
            description="Rows with nearly the input (data.similarity) and the output of another are kept in its "
            "cluster, or left out; counted, always. Exact duplicates are left out."
        ),
    ] = "keep"
    dev: Annotated[float, Field(gt=0, lt=0.5, description="Share of examples for choosing (prompts, checkpoints).")] = (
        0.1
    )
    test: Annotated[
        float, Field(gt=0, lt=0.5, description="Share of examples held out and never trained or chosen on.")
    ] = 0.1

    conflicts: Annotated[
        Literal["error", "accept"],
        Field(description="New rows with the input of another and a different output are refused, or kept; shown."),
    ] = "error"
    benchmarks: Annotated[
        tuple[str, ...],
        Field(
            description="Files (JSONL) of items that measure general capability, relative to this file: training rows "
            "are searched for them, as for the test rows."
        ),
    ] = ()
    contaminated: Annotated[
        Literal["warn", "drop"],
        Field(description="A training row that holds a test or benchmark item is kept, or left out; named, always."),
    ] = "warn"
    mix: Annotated[
        MixConfig | None,
        Field(
            description="Generic instruction data to train on besides, against forgetting: "
            "{source: FILE, fraction: 0.05}."
        ),
    ] = None

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        used = {*self.groups, self.input, self.output}
        both = [name for name in self.ignore if name in used]
        if both:
            raise ValueError(f"ignore names {both[0]}, which input, output or groups use")
        return self
