"""The schema of ``evidence.json``: all that a verdict rests on, readable without torch or the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.errors import UserError

SCHEMA_VERSION: Literal[1] = 1
EVIDENCE_FILE = "evidence.json"
ITEMS_FILE = "items.jsonl"

Metric = Literal["exact_match", "bleu"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(_Part):
    """A 95% interval, in the metric's own unit (shares from 0 to 1)."""

    low: float
    high: float


class Score(_Part):
    """One arm's score by one metric, as a share from 0 to 1 (a corpus BLEU of 43.2 is 0.432)."""

    value: float
    interval: Interval
    method: Annotated[str, Field(description="How the interval was made, e.g. 'Wilson'.")]


class Arm(_Part):
    """One way of answering, measured on one split."""

    name: Annotated[str, Field(description="zero-shot, retrieved-K, or tuned.")]
    kind: Literal["zero-shot", "retrieved", "tuned"]
    shots: int
    items: int
    exact: Annotated[int, Field(description="Items whose answer equals the reference.")]
    exact_match: Score
    bleu: Score
    truncated: Annotated[int, Field(description="Answers that ran into the token limit.")]
    prompt_tokens: Annotated[float, Field(description="Mean length of a prompt in tokens.")]

    def score(self, metric: Metric) -> Score:
        """This arm's score by ``metric``."""
        return self.exact_match if metric == "exact_match" else self.bleu


class Advice(_Part):
    """Prompting arms measured on the dev split with the untuned base; ``advice-ID.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    metric: Metric
    items: int
    arms: list[Arm]
    best: Annotated[str, Field(description="The arm with the best score; of equal ones the one with fewest shots.")]
    max_new_tokens: int


class Contrast(_Part):
    """Two arms on the same items: ``treatment`` minus ``control``."""

    treatment: str
    control: str
    metric: Metric
    difference: float
    interval: Interval
    interval_method: str
    p_value: float
    test: Annotated[str, Field(description="The test that gave p_value, e.g. 'exact McNemar'.")]
    fixed: Annotated[int, Field(description="Items right under treatment and wrong under control (exact match).")]
    broken: Annotated[int, Field(description="Items wrong under treatment and right under control (exact match).")]
    effective_items: Annotated[
        float | None,
        Field(description="Independent items that the clustered ones are worth (exact match; null for BLEU)."),
    ] = None
    minimum_detectable_effect: Annotated[
        float, Field(description="Smallest true difference that this many items would show with 80% power.")
    ]


class Evidence(_Part):
    """What was measured, on what, with what."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: Annotated[str, Field(description="12 hex digits: a digest of all that decides the measurement.")]
    project: str
    metric: Metric
    margin: float
    items: int
    clusters: Annotated[int, Field(description="Independent groups among the test items; intervals resample these.")]
    train_items: int
    dev_arms: Annotated[list[Arm], Field(description="Prompting arms on the dev split, where the best was chosen.")]
    best_prompting: Annotated[str, Field(description="Name of the prompting arm chosen on dev.")]
    arms: Annotated[list[Arm], Field(description="Arms on the test split.")]
    contrasts: Annotated[
        list[Contrast],
        Field(min_length=1, description="The first one decides: tuned against the best prompting arm."),
    ]
    bleu_signature: str
    lineage: Annotated[
        dict[str, Any],
        Field(description="Digests and versions: dataset, split, base, template, adapter, packages."),
    ]

    def arm(self, name: str) -> Arm:
        """The test arm called ``name``."""
        return next(a for a in self.arms if a.name == name)


class Item(_Part):
    """One test item with every arm's answer; a line of ``items.jsonl``."""

    key: Annotated[str, Field(description="The example's pair key.")]
    cluster: str
    input: str
    reference: str
    answers: Annotated[dict[str, str], Field(description="Arm name to generated answer.")]


def load_evidence(path: Path) -> Evidence:
    """Read ``evidence.json`` (or the folder that holds it).

    Raises:
        UserError: no such file, or not evidence of this schema.
    """
    file = path / EVIDENCE_FILE if path.is_dir() else path
    try:
        return Evidence.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no evidence here", where=str(file), fix="`tunewright evaluate` makes it.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()
        raise UserError(f"not evidence of schema {SCHEMA_VERSION}: {' '.join(first[:3])}", where=str(file)) from None


def load_items(folder: Path) -> list[Item]:
    """Read ``items.jsonl`` beside the evidence in ``folder``.

    Raises:
        UserError: no such file, or a line that is not an item.
    """
    file = folder / ITEMS_FILE
    try:
        # Not splitlines: it also cuts at the line and page separators that texts may hold.
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError("no items here", where=str(file), fix="`tunewright evaluate` makes them.") from None
    return [_item(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line]


def _item(line: str, where: str) -> Item:
    try:
        return Item.model_validate_json(line)
    except ValidationError as error:
        raise UserError(f"not a test item: {' '.join(str(error).splitlines()[1:3])}", where=where) from None
