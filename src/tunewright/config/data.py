"""The config's data section: where the pairs come from and how they are split."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic_core import CoreSchema

from tunewright.config.section import ConfigSection

# The names that the data scan gives its findings: 23 secrets, 7 kinds of personal data, 3 that need --presidio.
Findable = Literal[
    "private_key",
    "github_token",
    "gitlab_token",
    "npm_token",
    "tunewright_key",
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
    "birth_date",
    "record_number",
    "ip_address",
    "person",
    "location",
    "nrp",
]


Duplicates = Literal["keep", "drop"]
Overlap = Literal["drop-train", "move", "keep"]
Split = Literal["train", "dev", "test"]
# "eval" and "holdout" are missing on purpose: authors use both for dev and for test.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "dev": ("dev", "development", "val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read_split(name: object) -> Split:
    """Return the split that a source, an option or a cell names, ignoring case and outer white space."""
    plain = name.strip().casefold() if isinstance(name, str) else None
    for split, names in _SPLIT_NAMES.items():
        if plain in names:
            return split
    raise ValueError(f"Expected one of {', '.join(chain(*_SPLIT_NAMES.values()))}")


class FileSource(ConfigSection):
    """A source of pairs, with its authors' split and its header row; written as its path if it has neither."""

    path: Annotated[str, Field(min_length=1)]
    """A file, folder, pattern or dataset of the hub, as in data.sources."""
    split: Annotated[Split, BeforeValidator(read_split)] | None = None
    """Split of all its rows: train, dev or test (null: drawn)."""
    header_row: Annotated[int | None, Field(ge=1)] = None
    """Like data.header_row, for this source."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if not isinstance(value, str | dict | FileSource):
            raise ValueError("Expected a path, or {path: FILE, split: test}")
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _refuse_header_row_of_hub(self) -> FileSource:
        if self.header_row is not None and self.path.startswith("hf:/"):
            raise ValueError("header_row is for files of this machine: set data.header_row for a dataset of the hub")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, str | int]:
        given = {name: value for name, value in self if value is not None}
        return given if len(given) > 1 else self.path

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of both spellings."""
        return {"anyOf": [{"type": "string", "minLength": 1}, super().__get_pydantic_json_schema__(schema, handler)]}


class MixConfig(ConfigSection):
    """Generic instruction data that is mixed into the training rows to reduce forgetting."""

    source: Annotated[str, Field(min_length=1)]
    """A file of pairs from outside the domain, relative to this file."""
    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of all training rows to draw from this file, by the seed (0.05: Scialom et al. 2022,
    arXiv 2205.12393, find 1% enough for whole tasks).
    """
    rows: str | None = None
    """Like data.rows, for this file."""
    sheet: str | None = None
    """Like data.sheet, for this file."""
    header_row: Annotated[int | None, Field(ge=1)] = None
    """Like data.header_row, for this file."""
    input: str | None = None
    """Like data.input, for this file."""
    output: str | None = None
    """Like data.output, for this file."""
    drop_columns: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Like data.drop_columns, for this file."""


class DataConfig(ConfigSection):
    """Sources of the pairs, and their split."""

    sources: tuple[FileSource, ...] = ()
    """Files of pairs that `tunewright run` adds: JSON, CSV, .xlsx, Parquet or a saved `datasets`
    folder, relative to this file. Folders of such files, patterns such as data/*.jsonl and datasets
    of the Hugging Face hub such as hf://datasets/org/name:train work too. {path: a.csv, split:
    test} gives all rows of a source to train, dev or test; rows without a split are drawn. header_row
    in a source is like data.header_row.
    """
    rows: Annotated[str | None, Field(min_length=1)] = None
    """JMESPath expression that finds the rows in a JSON document that is not an array of rows, such
    as values(@) for {id: row, ...} or *[] for {name: [row, ...], ...}.
    """
    sheet: Annotated[str | None, Field(min_length=1)] = None
    """Sheet of an .xlsx workbook. Required if several visible sheets have rows."""
    header_row: Annotated[int | None, Field(ge=1)] = None
    """Line of a CSV file's header, or row of a sheet's, if titles are above it (null: the first with a
    value). Files without columns ignore it.
    """
    input: Annotated[str | None, Field(min_length=1)] = None
    """Column or key of the input, or a Jinja template over the row's keys, such as {{ context ~ " "
    ~ question }}.
    """
    output: Annotated[str | None, Field(min_length=1)] = None
    """Column or key of the ideal output, or a Jinja template, such as {{ answers[0] }} or {{ slots
    | tojson }}.
    """
    group_by: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Columns or keys such as customer or document. Rows that share a value are not independent and
    stay on one side of the split. With data.rows, also a JMESPath from the object above a row, such
    as parent.id or parent.sql[0]; parent.parent is the next object above.
    """
    split_column: Annotated[str, Field(min_length=1)] | None = None
    """Column or key, such as part, in which the authors of the rows give each row to train, dev or
    test. It is not part of the example.
    """
    on_overlap: Overlap = "drop-train"
    """Rows near a held-out row of another split, where authors gave a split: `drop-train` leaves them
    out, `move` moves their cluster to that split, `keep` keeps them, and *ship* also requires the
    gain on held-out rows without a near training row.
    """
    drop_columns: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Columns or keys to leave out, such as id or source. Other unused ones are kept as metadata.
    """
    system_prompt: str | None = None
    """System prompt for pairs without one, put before each pair when it is added."""
    allow: tuple[Findable, ...] = ()
    """Kinds of secrets and personal data that may be in the pairs, such as the firm's phone number
    or test keys. They are counted and reported, and do not block.
    """
    max_characters: Annotated[int, Field(gt=0)] = 32_000
    """Longest conversation in characters. A longer one is rejected: it is nearly always a file
    pasted into a cell.
    """
    dedup_threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Inputs at or above this Jaccard similarity of character 4-grams share a cluster, which never
    straddles the split (0.8: Lee et al. 2021, arXiv 2107.06499).
    """
    split_by: Literal["input", "output_template"] = "input"
    """`input` clusters rows with near-equal inputs. `output_template` also clusters rows whose
    outputs differ only in quoted strings and numbers, such as queries made from one template.
    """
    duplicates: Duplicates = "keep"
    """`keep` or `drop` rows that nearly repeat another's input (data.dedup_threshold) with the same
    output. They are counted either way. Exact duplicates are always dropped.
    """
    val_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of examples in dev, the split that chooses prompts and checkpoints."""
    test_size: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of examples in test, the held-out split: nothing is trained or chosen on it."""

    conflicts: Literal["error", "accept"] = "error"
    """`error` rejects new rows that give another output for a known input; `accept` keeps them.
    Both list them.
    """
    benchmarks: tuple[str, ...] = ()
    """JSONL files of benchmark items, relative to this file. Training rows are searched for these
    items in the same way as for test rows.
    """
    contaminated: Literal["warn", "drop"] = "warn"
    """`warn` keeps a training row that contains a test or benchmark item; `drop` leaves it out.
    Both name it.
    """
    mix: MixConfig | None = None
    """Generic instruction data to mix into training against forgetting: {source: FILE, fraction:
    0.05}.
    """

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        used = {*self.group_by, self.input, self.output}
        both = [name for name in self.drop_columns if name in used]
        if both:
            raise ValueError(f"drop_columns names {both[0]}, which input, output or group_by use")
        if self.split_column in {*used, *self.drop_columns} - {None}:
            raise ValueError(f"split_column names {self.split_column}, which another key of data uses")
        return self
