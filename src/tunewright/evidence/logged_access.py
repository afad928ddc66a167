"""Lines of the access log: accesses to a test split with the contrasts declared beforehand, and written files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from tunewright.config import MetricName
from tunewright.core.io import digest
from tunewright.evidence.common import Part
from tunewright.metrics import metric_label
from tunewright.render.blocks import Block, Lead, Row, Section, Table, row, table, words

Design = Literal["held-out", "cross-fitted"]


class Declared(Part):
    """A contrast declared before the test split is accessed to measure it."""

    treatment: str
    control: str
    metric: MetricName
    margin: Annotated[float | None, Field(description="Smallest gain worth shipping, for the deciding contrast.")]
    non_inferiority_margin: Annotated[
        float | None,
        Field(description="Largest loss that counts as not worse, if an incumbent or a free arm is compared."),
    ] = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the later field where it is null: older lines are bound by a digest that does not have it."""
        row: dict[str, Any] = handler(self)
        if self.non_inferiority_margin is None:
            del row["non_inferiority_margin"]
        return row


class LogLine(Part):
    """A line of ``access_log.jsonl``, chained to the line before it by digest."""

    schema_version: Literal[1] = 1
    number: Annotated[int, Field(description="The line, from 1.")]
    time: Annotated[str, Field(description="UTC, ISO 8601.")]
    author: Annotated[str | None, Field(description="git's user.name, else the login name.")]
    previous: Annotated[str, Field(description="Digest of the previous line; empty in the first.")]
    digest: Annotated[str, Field(description="SHA-256 of this line without this field, as canonical JSON.")]

    @property
    def true_digest(self) -> str:
        """The digest that ``digest`` must equal."""
        return digest(self.model_dump(mode="json", exclude={"digest"}))


class WrittenFiles(LogLine):
    """A line about files with measurements, at the time they were written or amended."""

    event: Literal["written"] = "written"
    files: Annotated[
        dict[str, str], Field(description="Path, relative to the folder of evaluations, to the file's SHA-256.")
    ]


class LoggedAccess(LogLine):
    """A line about an evaluation that is about to read the test split."""

    event: Literal["opened"] = "opened"
    evaluation: Annotated[str, Field(description="The evaluation's ID; a resumed evaluation keeps it.")]
    design: Annotated[Design, Field(description="cross-fitted: all rows are opened, including the test split.")]
    dataset: Annotated[str, Field(description="Digest of the dataset version.")]
    test_split: Annotated[str, Field(description="Digest of the test split's pair keys.")]
    items: Annotated[int, Field(description="Rows opened.")]
    adapter: Annotated[str | None, Field(description="The adapter's name; null if each fold trains its own.")]
    adapter_digest: str | None
    base: Annotated[str, Field(description="Digest of the base.")]
    declared: Annotated[tuple[Declared, ...], Field(description="The contrasts; the first one decides.")]


class EarlierAccess(Part):
    """An earlier access to items of this evaluation."""

    number: Annotated[int, Field(description="Its line in the access log.")]
    time: str
    author: str | None
    evaluation: str
    adapter: str | None
    shared_items: Annotated[
        int | None, Field(description="Items in common; null if its dataset version is missing here.")
    ]


def openings_text(earlier: Sequence[EarlierAccess], items: int) -> str:
    """Return a sentence about earlier accesses to these items."""
    last = earlier[-1]
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    most = max((each.shared_items or 0 for each in earlier), default=0)
    which = "The test items" if most == items else f"{most:,} of the {items:,} test items" if most else "Test items"
    by = f" by {last.author}" if last.author else ""
    how = "with an adapter for each fold" if last.adapter is None else f"with {last.adapter}"
    unknown = [str(each.number) for each in earlier if each.shared_items is None]
    text = (
        f"{which} had been opened {times} before this (last on {last.time[:10]}{by}, {how}). Choices made after such a "
        "look may owe their score to it; only new rows are untouched."
    )
    if unknown:
        text += f" The items of line {', '.join(unknown)} are unknown: its dataset version is missing."
    return text


def openings_section(opening: LoggedAccess, earlier: Sequence[EarlierAccess], items: int) -> Section:
    """Return an access and the earlier ones to the same items."""
    by = f" by {opening.author}" if opening.author else ""
    declared = [
        f"{each.treatment} against {each.control} by {metric_label(each.metric)}"
        + ("" if each.margin is None else f", margin {100 * each.margin:g} points, which decides")
        for each in opening.declared
    ]
    lead = (
        f"Line {opening.number} of the access log, {_day(opening.time)}{by}. Declared before any prompt was built: "
        f"{'; '.join(declared)}."
    )
    blocks: list[Block] = [Lead(lead)]
    if earlier:
        head = ("Earlier opening", "When (UTC)", "By", "Evaluation", "Adapter", "Items shared")
        openings = table("Table of openings", head, map(_earlier, earlier))
        blocks += [Lead(openings_text(earlier, items)), openings]
    else:
        blocks.append(Lead("These test items had not been opened before."))
    return Section("access-log", "Openings of the test items", tuple(blocks))


def log_table(openings: Sequence[LoggedAccess]) -> Table:
    """Return all openings of the test split, in the access log's order."""
    head = ("Line", *words("Opened (UTC)", "By", "Evaluation", "Adapter"), "Items", *words("Declared"))
    rows = []
    for each in openings:
        adapter, declared = each.adapter or "one for each fold", each.declared[0]
        against = f"{declared.treatment} against {declared.control}"
        made = (_day(each.time), each.author or "", each.evaluation, adapter)
        rows.append((f"{each.number}", *made, f"{each.items}", against))
    return table("Openings of the test split", head, rows)


def _day(time: str) -> str:
    return time[:16].replace("T", " ")


def _earlier(each: EarlierAccess) -> Row:
    shared = "not known" if each.shared_items is None else f"{each.shared_items:,}"
    adapter = each.adapter or "one for each fold"
    return row(f"line {each.number}", _day(each.time), each.author or "", each.evaluation, adapter, shared)
