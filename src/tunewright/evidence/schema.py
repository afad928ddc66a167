"""The schema of ``evidence.json``: all that a verdict rests on, readable without torch or the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.config import MetricName, RetrieverName
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.evidence.answer_format import AnswerFormat
from tunewright.evidence.base import ArmScore, Interval, Part, References
from tunewright.evidence.benchmarks import Benchmarks
from tunewright.evidence.budget import Budget
from tunewright.evidence.engine_used import EngineUsed
from tunewright.evidence.human_eval import AnswerReview
from tunewright.evidence.judge import Judgement
from tunewright.evidence.noise import NoiseFloor
from tunewright.evidence.test_set_access import Design, EarlierAccess, TestSetAccess
from tunewright.evidence.train_similarity import OutputTemplates, TrainSimilarity
from tunewright.metrics import Kind

SCHEMA_VERSION: Literal[2] = 2
EVIDENCE_FILE = "evidence.json"
ITEMS_FILE = "items.jsonl"
DEV_PREFIX = "dev-"
"""Before the ID of an evaluation on the dev split, which is its folder's name too."""

ArmKind = Literal["zero-shot", "static", "retrieved", "tuned", "tuned-retrieved", "mixed"]


class Arm(Part):
    """One way of answering, measured on one split."""

    name: Annotated[str, Field(description="zero-shot, static-K-seed-N, retrieved-K, tuned, or best-prompting.")]
    kind: Annotated[ArmKind, Field(description="mixed: each fold's own arm, where they are not all the same.")]
    shots: Annotated[int, Field(description="Demonstrations in the prompt.")]
    seed: Annotated[int | None, Field(description="Which draw of static demonstrations, from 1.")] = None
    retriever: Annotated[RetrieverName | None, Field(description="What found the demonstrations.")] = None
    instruction: Annotated[int, Field(description="0: the pairs' own; else of evaluate.instructions, from 1.")] = 0
    constrained: Annotated[bool, Field(description="Held to evaluate.structured_outputs while it decoded.")] = False
    items: int
    scores: Annotated[dict[MetricName, ArmScore], Field(description="By every metric of the config.")]
    truncated: Annotated[int, Field(description="Answers that ran into the token limit.")]
    prompt_tokens: Annotated[float, Field(description="Mean length of a prompt in tokens.")]
    shared_tokens: Annotated[
        int, Field(description="Of them, those that every prompt begins with: a server's prefix cache has them.")
    ] = 0
    answer_tokens: Annotated[
        float | None,
        Field(description="Mean length of an answer in tokens, the end token included; null in older evidence."),
    ] = None

    def score(self, metric: MetricName) -> ArmScore:
        """This arm's score by ``metric``."""
        return self.scores[metric]


class Measured(Part):
    """A metric, as it was measured."""

    kind: Annotated[
        Kind,
        Field(
            description="right or wrong: items score 0 or 1. mean: from 0 to 1. corpus: of all items' counts together."
        ),
    ]
    definition: Annotated[str, Field(description="What it is exactly; for sacrebleu's metrics with its signature.")]


class LeftOut(Part):
    """An arm that could not be measured."""

    name: str
    why: str


class SeedSpread(Part):
    """A static arm over its draws of demonstrations, all on the same items."""

    name: Annotated[str, Field(description="static-K.")]
    shots: int
    items: int
    scores: Annotated[tuple[float, ...], Field(description="By the metric, a share for each seed from 1.")]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.scores) / len(self.scores)


class Narrowing(Part):
    """How many arms became few: all on the first items, the finalists on all of dev."""

    items: Annotated[int, Field(description="Dev items that every arm answered, drawn by the seed over all clusters.")]
    clusters: int
    rule: Annotated[str, Field(description="Who went on, in words.")]
    arms: Annotated[list[Arm], Field(description="Every arm on the first items.")]
    finalists: Annotated[tuple[str, ...], Field(description="Arms that went on to all of dev.")]
    fates: Annotated[dict[str, str], Field(description="Of each other arm, why it did not go on.")]


class Advice(Part):
    """Prompting arms measured on the dev split with the untuned base; ``advice-ID.json``."""

    schema_version: Literal[2] = SCHEMA_VERSION
    metric: Annotated[MetricName, Field(description="What chose the best arm.")]
    metrics: dict[MetricName, Measured]
    items: int
    clusters: int
    arms: Annotated[list[Arm], Field(description="Those that answered all of dev.")]
    best: Annotated[str, Field(description="The arm with the best score; of equal ones the one with fewest shots.")]
    best_retrieved: Annotated[str | None, Field(description="The best of those that retrieve demonstrations.")]
    narrowing: Annotated[Narrowing | None, Field(description="null where every arm answered all of dev.")]
    static: Annotated[tuple[SeedSpread, ...], Field(description="Static arms by number of demonstrations.")]
    left_out: tuple[LeftOut, ...]
    max_new_tokens: int
    engine: Annotated[EngineUsed | None, Field(description="What computed the answers; null in older advice.")] = None
    budget: Annotated[Budget | None, Field(description="Arms that --minutes left out; null: none.")] = None


class Contrast(Part):
    """Two arms on the same items: ``treatment`` minus ``control``."""

    treatment: str
    control: str
    metric: MetricName
    scored: Annotated[int, Field(description="Items that are scored in both arms: the contrast is of these.")]
    left_out: Annotated[
        dict[str, int], Field(description="Why the other items are left out, and how many for each reason.")
    ]
    clusters: Annotated[int, Field(description="Independent groups among the scored items.")]
    difference: float
    interval: Interval
    interval_method: str
    p_value: Annotated[float, Field(description="Two-sided, of no difference.")]
    p_adjusted: Annotated[
        float | None,
        Field(
            description="Holm's, over the contrasts by the deciding metric; null by a metric that is only measured "
            "beside it."
        ),
    ]
    test: Annotated[str, Field(description="The test that gave p_value, e.g. 'exact McNemar'.")]
    fixed: Annotated[int, Field(description="Items that score higher under treatment: right there only, or better.")]
    broken: Annotated[int, Field(description="Items that score lower under treatment: wrong there only, or worse.")]
    effective_items: Annotated[
        float | None,
        Field(description="Independent items that the clustered ones are worth (null for a metric of the corpus)."),
    ] = None
    minimum_detectable_effect: Annotated[
        float, Field(description="Smallest true difference that this many items would show with 80% power.")
    ]


class Fold(Part):
    """One fold of a cross-fitted evaluation: its rows are answered by an adapter that saw none of their clusters."""

    number: Annotated[int, Field(description="From 1.")]
    train_items: int
    dev_items: Annotated[int, Field(description="Rows that chose the epoch and the prompting arm.")]
    items: Annotated[int, Field(description="Rows answered, all that the fold holds out.")]
    best_prompting: Annotated[str, Field(description="Name of the prompting arm chosen on this fold's dev rows.")]
    scores: Annotated[
        dict[str, float | None],
        Field(description="Arm name to its score on this fold's items; null where none of them is scored."),
    ]
    dev_losses: Annotated[list[float], Field(description="Dev loss after each epoch; the lowest one's was kept.")]
    adapter: Annotated[str, Field(description="The digest of the adapter that answered.")]


class Evidence(Part):
    """What was measured, on what, with what."""

    schema_version: Literal[2] = SCHEMA_VERSION
    id: Annotated[
        str, Field(description="12 hex digits: a digest of all that decides the measurement; on dev with dev- before.")
    ]
    project: str
    metric: Annotated[MetricName, Field(description="The one that decides.")]
    metrics: Annotated[dict[MetricName, Measured], Field(description="All that were measured.")]
    margin: float
    design: Annotated[
        Design,
        Field(
            description="held-out: one adapter on the test split. cross-fitted: every row once, by one of several "
            "adapters that did not see it."
        ),
    ] = "held-out"
    split: Annotated[
        Literal["test", "dev"],
        Field(
            description="Whose items the arms answered. dev: the split that also chose the adapter's step and the "
            "prompt, so both look better than they are; no release is made on it. test for a cross-fitted evaluation."
        ),
    ] = "test"
    folds: Annotated[tuple[Fold, ...], Field(description="Of a cross-fitted evaluation; else empty.")] = ()
    items: int
    clusters: Annotated[int, Field(description="Independent groups among the test items; intervals resample these.")]
    train_items: Annotated[int, Field(description="Pairs trained on; cross-fitted: the mean over folds, rounded.")]
    dev_arms: Annotated[
        list[Arm],
        Field(description="Prompting arms on the dev split, where the best was chosen; empty if each fold chose."),
    ]
    narrowing: Annotated[
        Narrowing | None, Field(description="How these were picked out of more; null where all answered all of dev.")
    ] = None
    static: Annotated[tuple[SeedSpread, ...], Field(description="Static arms over their draws, on dev.")] = ()
    left_out: tuple[LeftOut, ...] = ()
    budget: Annotated[Budget | None, Field(description="Arms that --minutes left out; null: none.")] = None
    best_prompting: Annotated[
        str, Field(description="Name of the prompting arm chosen on dev; best-prompting if folds chose different ones.")
    ]
    arms: Annotated[list[Arm], Field(description="Arms on the test items.")]
    contrasts: Annotated[
        list[Contrast],
        Field(
            min_length=1,
            description="The first one decides: tuned against the best prompting arm, by the deciding metric. Those by "
            "other metrics come last.",
        ),
    ]
    engine: Annotated[
        EngineUsed | None, Field(description="What computed the answers of all arms; null in older evidence.")
    ] = None
    noise_floor: Annotated[
        NoiseFloor | None, Field(description="What changes when nothing is changed; null in a cross-fitted evaluation.")
    ] = None
    references: Annotated[
        References | None,
        Field(description="How many references the items have; null: no input has several, or older evidence."),
    ] = None
    opening: Annotated[
        TestSetAccess | None,
        Field(description="Its line in the ledger, with what was declared; null in older evidence."),
    ] = None
    openings: Annotated[
        tuple[EarlierAccess, ...],
        Field(description="Earlier openings of the same items: each one is a look at the test."),
    ] = ()
    nearness: Annotated[
        TrainSimilarity | None, Field(description="Scores by distance from the training data; null in older evidence.")
    ] = None
    output_templates: Annotated[
        OutputTemplates | None,
        Field(
            description="Scores by whether the output template was trained on; null: labels, short or alike outputs."
        ),
    ] = None
    form: Annotated[
        AnswerFormat | None,
        Field(description="The form of the answers, whatever they say; null: none, or not measured."),
    ] = None
    lineage: Annotated[
        dict[str, Any],
        Field(description="Digests and versions: dataset, split, base, template, adapter, packages."),
    ]
    human_eval: Annotated[AnswerReview | None, Field(description="What people said of the answers, blind.")] = None
    general: Annotated[
        Benchmarks | None, Field(description="What the base could do before, adapter off and on; null: not measured.")
    ] = None
    judge: Annotated[Judgement | None, Field(description="What `tunewright judge` found, or why it is vetoed.")] = None

    def arm(self, name: str) -> Arm:
        """Return the test arm called ``name``."""
        return next(a for a in self.arms if a.name == name)

    @property
    def items_text(self) -> str:
        """What the items are called: ``test item``, or ``dev item``."""
        return f"{self.split} item"

    @property
    def inputs_text(self) -> str:
        """What is added to the number of items where inputs have several references; else nothing."""
        return f", {self.references.text}" if self.references else ""

    @property
    def deciding(self) -> list[Contrast]:
        """The contrasts by the deciding metric, over which p-values are adjusted."""
        return [c for c in self.contrasts if c.metric == self.metric]


class Item(Part):
    """One test item with every arm's answer; a line of ``items.jsonl``."""

    key: Annotated[str, Field(description="The example's pair key.")]
    cluster: str
    input: str
    reference: str
    other_references: Annotated[
        tuple[str, ...] | None, Field(description="The other outputs of its input in this split; null: none.")
    ] = None
    answers: Annotated[dict[str, str], Field(description="Arm name to generated answer.")]
    scores: Annotated[
        dict[MetricName, dict[str, float]],
        Field(description="Metric to arm name to this item's own score; of the arms in which it is scored."),
    ]
    unscored: Annotated[
        dict[MetricName, dict[str, str]] | None,
        Field(description="Metric to arm name to why the item is not scored there."),
    ] = None
    nearest: Annotated[
        float | None, Field(description="Similarity of the nearest training input, from 0 to 1; null: not measured.")
    ] = None
    new_template: Annotated[
        bool | None, Field(description="Whether no training row has its output template; null: says nothing here.")
    ] = None
    fold: Annotated[int | None, Field(description="Whose adapter answered, of a cross-fitted evaluation.")] = None


def load_evidence(path: Path) -> Evidence:
    """Read ``evidence.json`` (or the folder that holds it).

    Raises:
        UserError: no such file, or not evidence of this schema.
    """
    file = path / EVIDENCE_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        _require_schema(text, file)
        return Evidence.model_validate_json(text)
    except FileNotFoundError:
        raise UserError("no evidence here", where=str(file), fix="`tunewright evaluate` makes it.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()
        raise UserError(
            f"not evidence of schema {SCHEMA_VERSION}: {' '.join(first[:3])}",
            where=str(file),
            fix="Restore the file, or remove its folder and evaluate again: answers that are there are not made anew.",
        ) from None


def _require_schema(text: str, file: Path) -> None:
    """Refuse evidence that another version of tunewright wrote, before its every field is told as a fault."""
    version = _peek(text).get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise UserError(
            f"evidence of schema {version}; this tunewright reads schema {SCHEMA_VERSION}",
            where=str(file),
            fix="Evaluate again: `tunewright evaluate` (or `crossval`). Answers that are there are not made anew.",
        )


def _peek(text: str) -> dict[str, Any]:
    """Return what the file says, whatever its schema; nothing of what is no JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def amend(folder: Path, **sections: Part) -> Evidence:
    """Put what was measured later into the folder's evidence, whole or not at all.

    Args:
        folder: an evaluation's folder.
        sections: fields of `Evidence` with their new values.
    """
    evidence = load_evidence(folder).model_copy(update=sections)
    write_json(folder / EVIDENCE_FILE, evidence.model_dump(mode="json"))
    return evidence


def find_evaluation(evaluations: Path, name: str | Path | None = None, *, dev: bool = True) -> Path:
    """Return an evaluation's folder: as given (ID, folder or evidence file), else the newest.

    Args:
        evaluations: the project's folder of evaluations.
        name: which; None: the newest.
        dev: whether the newest may be one on the dev split.

    Raises:
        UserError: there is none.
    """
    if name is not None:
        place = next((p for p in (Path(name), evaluations / name) if p.exists()), None)
        if place is None:
            known = sorted(file.parent.name for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}"))
            there = f"There are: {', '.join(known)}." if known else None
            raise UserError(f"no evaluation {str(name)!r}", where=str(evaluations), fix=there)
        return place
    files = [
        file
        for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}")
        if dev or not file.parent.name.startswith(DEV_PREFIX)
    ]
    if not files:
        raise UserError("nothing has been evaluated yet", where=str(evaluations), fix="`tunewright evaluate` does it.")
    # Only the newest one has to be of this schema; older ones may lie beside it.
    return max(files, key=_created).parent


def evidence_on(evaluations: Path, adapter: str, reporter: Reporter) -> Evidence | None:
    """Return the newest evidence on one adapter, measured on rows held out from it; None where there is none.

    Args:
        evaluations: the project's folder of evaluations.
        adapter: its digest.
        reporter: told of evidence that cannot be read.
    """
    for file in sorted(evaluations.glob(f"[!.]*/{EVIDENCE_FILE}"), key=_created, reverse=True):
        try:
            evidence = load_evidence(file)
        except UserError as error:
            reporter.warn(f"Evidence that is not looked at: {error}")
            continue
        if (evidence.design, evidence.split) == ("held-out", "test") and evidence.lineage["adapter"][
            "digest"
        ] == adapter:
            return evidence
    return None


def _created(file: Path) -> str:
    lineage = _peek(file.read_text(encoding="utf-8", errors="replace")).get("lineage")
    return str(lineage.get("created", "")) if isinstance(lineage, dict) else ""


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
