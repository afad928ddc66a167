"""The schema of ``evidence.json``, the input of every verdict; readable without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.config import DemonstrationOrder, MetricName, RetrieverName
from tunewright.evidence.authors_split import AuthorsSplit
from tunewright.evidence.benchmarks import Benchmarks
from tunewright.evidence.common import (
    AnswerFormat,
    ArmScore,
    Budget,
    EngineUsed,
    GeneratedEffect,
    NoiseFloor,
    OutputTemplates,
    Part,
    References,
    StoredPrompt,
    TrainSimilarity,
)
from tunewright.evidence.common import Contrast as Contrast
from tunewright.evidence.human_eval import AnswerReview
from tunewright.evidence.incumbents import Drop, Incumbents
from tunewright.evidence.judge import Judgement
from tunewright.evidence.logged_access import Design, EarlierAccess, LoggedAccess
from tunewright.evidence.prompt_optimization import OptimizedPrompt
from tunewright.metrics import Kind

SCHEMA_VERSION: Literal[3] = 3
MEASUREMENT_VERSION = 2
"""Part of the inputs that name advice and evaluations: increment it when they would measure something else."""

ArmKind = Literal[
    "zero-shot", "static", "retrieved", "tuned", "tuned-retrieved", "parent", "mixed", "incumbent", "free"
]


class Arm(Part):
    """A way of answering, measured on one split."""

    name: Annotated[
        str,
        Field(
            description="zero-shot, static-K-seed-N, retrieved-K, tuned, parent, best-prompting, incumbent-NAME, or "
            "free-NAME."
        ),
    ]
    kind: Annotated[
        ArmKind,
        Field(
            description="Kind of arm. parent: the adapter that tuned started from. mixed: the folds differ. "
            "incumbent: a hosted model. free: no language model."
        ),
    ]
    shots: Annotated[int, Field(description="Demonstrations in the prompt.")]
    seed: Annotated[int | None, Field(description="Index of the draw of static demonstrations, from 1.")] = None
    retriever: Annotated[RetrieverName | None, Field(description="Method that retrieves the demonstrations.")] = None
    mmr: Annotated[
        float | None, Field(description="Weight of similarity against diversity; null: similarity alone.")
    ] = None
    order: Annotated[DemonstrationOrder, Field(description="Order of retrieved demonstrations.")] = "similar_last"
    instruction: Annotated[
        int, Field(description="0: the pairs' own instructions; else an index into evaluate.instructions, from 1.")
    ] = 0
    optimized: Annotated[
        str | None, Field(description="Digest of the optimized instruction in place of the pairs' own; null: none.")
    ] = None
    constrained: Annotated[bool, Field(description="Decoding was constrained by evaluate.structured_outputs.")] = False
    items: int
    scores: Annotated[dict[MetricName, ArmScore], Field(description="Scores by every metric of the config.")]
    truncated: Annotated[int, Field(description="Answers cut at the token limit.")]
    prompt_tokens: Annotated[float, Field(description="Mean prompt length in tokens.")]
    shared_tokens: Annotated[
        int, Field(description="Prompt tokens shared by all prompts, which a server's prefix cache holds.")
    ] = 0
    answer_tokens: Annotated[
        float | None,
        Field(description="Mean answer length in tokens, including the end token; null in older evidence."),
    ] = None

    def score(self, metric: MetricName) -> ArmScore:
        """Return this arm's score by ``metric``."""
        return self.scores[metric]


class Measured(Part):
    """A metric with its definition."""

    kind: Annotated[
        Kind,
        Field(
            description="right or wrong: items score 0 or 1. mean: from 0 to 1. corpus: from the counts of all "
            "items together."
        ),
    ]
    definition: Annotated[str, Field(description="Exact definition; for sacrebleu's metrics its signature.")]


class LeftOut(Part):
    """An arm that could not be measured."""

    name: str
    why: str


class FreeArms(Part):
    """Arms that need no language model, on answers that are labels or short; the best on dev is compared.

    The comparisons are declared, and apart from the contrasts: they do not change an adjusted p-value.
    """

    why: Annotated[str, Field(description="Why free arms can answer, in words.")]
    dev: Annotated[list[Arm], Field(description="The free arms on dev.")]
    best: Annotated[str, Field(description="The free arm with the best score on dev; of equal ones the simplest.")]
    left_out: tuple[LeftOut, ...]
    tuned: Annotated[
        Drop | None,
        Field(description="The tuned arm's (or pilot's) score minus the best free arm's; null: not compared."),
    ] = None
    prompting: Annotated[
        Drop | None, Field(description="The best prompting arm's score minus the best free arm's; null: not compared.")
    ] = None

    @property
    def best_on_dev(self) -> Arm:
        """The best free arm, on dev."""
        return next(arm for arm in self.dev if arm.name == self.best)

    @property
    def enough(self) -> bool:
        """True if the best free arm is shown to be not worse than tuned and than the best prompting arm."""
        return all(drop is not None and drop.outcome == "replace" for drop in (self.tuned, self.prompting))


_FREE = Field(description="Arms without a model; null: none fits the answers, or an older file.")


class SeedSpread(Part):
    """A static arm over its draws of demonstrations, on the same items."""

    name: Annotated[str, Field(description="static-K.")]
    shots: int
    items: int
    scores: Annotated[tuple[float, ...], Field(description="Score by the metric for each seed from 1, as a share.")]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return sum(self.scores) / len(self.scores)


class Narrowing(Part):
    """Selection of finalists: all arms answer the first items, the finalists answer all of dev."""

    items: Annotated[int, Field(description="Dev items answered by every arm, sampled by the seed over all clusters.")]
    clusters: int
    rule: Annotated[str, Field(description="The selection rule, in words.")]
    arms: Annotated[list[Arm], Field(description="Every arm on the first items.")]
    finalists: Annotated[tuple[str, ...], Field(description="The finalists, which answered all of dev.")]
    fates: Annotated[dict[str, str], Field(description="Arm name to the reason why it is not a finalist.")]


class Advice(Part):
    """Prompting arms measured on the dev split with the untuned base; ``advice-ID.json``."""

    schema_version: Literal[2] = 2
    metric: Annotated[MetricName, Field(description="Metric that selected the best arm.")]
    metrics: dict[MetricName, Measured]
    items: int
    clusters: int
    arms: Annotated[list[Arm], Field(description="Arms that answered all of dev.")]
    best: Annotated[str, Field(description="The arm with the best score; of equal ones the one with the fewest shots.")]
    best_retrieved: Annotated[str | None, Field(description="The best arm with retrieved demonstrations.")]
    narrowing: Annotated[Narrowing | None, Field(description="null if every arm answered all of dev.")]
    static: Annotated[tuple[SeedSpread, ...], Field(description="Static arms by number of demonstrations.")]
    left_out: tuple[LeftOut, ...]
    max_new_tokens: int
    engine: Annotated[
        EngineUsed | None, Field(description="Engine that computed the answers; null in older advice.")
    ] = None
    budget: Annotated[Budget | None, Field(description="Arms that --minutes left out; null: none.")] = None
    free: Annotated[FreeArms | None, _FREE] = None


class Fold(Part):
    """A fold of a cross-validation: its rows are answered by an adapter that saw none of their clusters."""

    number: Annotated[int, Field(description="Index of the fold, from 1.")]
    train_items: int
    dev_items: Annotated[int, Field(description="Rows that selected the epoch and the prompting arm.")]
    items: Annotated[int, Field(description="Rows answered: all rows that the fold holds out.")]
    best_prompting: Annotated[str, Field(description="Prompting arm selected on this fold's dev rows.")]
    scores: Annotated[
        dict[str, float | None],
        Field(description="Arm name to its score on this fold's items; null if no item is scored."),
    ]
    dev_losses: Annotated[
        list[float], Field(description="Dev loss after each epoch; the epoch with the lowest was selected.")
    ]
    adapter: Annotated[str, Field(description="Digest of the adapter that answered.")]


class Evidence(Part):
    """The measurements and inputs of an evaluation."""

    schema_version: Annotated[Literal[2, 3], Field(description="2: no prompts are stored.")] = SCHEMA_VERSION
    id: Annotated[
        str,
        Field(
            description="12 hex digits of a digest of everything that determines the measurement; on dev with the "
            "prefix dev-."
        ),
    ]
    project: str
    metric: Annotated[MetricName, Field(description="The deciding metric.")]
    metrics: Annotated[dict[MetricName, Measured], Field(description="All measured metrics.")]
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
            description="Split of the items. dev: the split that also selected the adapter's step and the prompt, "
            "so both look better than they are; it cannot justify a release. A cross-fitted evaluation "
            "says test."
        ),
    ] = "test"
    folds: Annotated[tuple[Fold, ...], Field(description="Folds of a cross-fitted evaluation; else empty.")] = ()
    items: int
    clusters: Annotated[int, Field(description="Independent clusters among the test items; intervals resample these.")]
    train_items: Annotated[int, Field(description="Training pairs; cross-fitted: the mean over folds, rounded.")]
    generated_train_items: Annotated[int, Field(description="Those of them that a teacher has written.")] = 0
    dev_arms: Annotated[
        list[Arm],
        Field(
            description="Prompting arms on the dev split, where the best was selected; empty if each fold selected "
            "its own."
        ),
    ]
    narrowing: Annotated[
        Narrowing | None, Field(description="Selection of these arms from more; null if all answered all of dev.")
    ] = None
    static: Annotated[tuple[SeedSpread, ...], Field(description="Static arms over their draws, on dev.")] = ()
    left_out: tuple[LeftOut, ...] = ()
    budget: Annotated[Budget | None, Field(description="Arms that --minutes left out; null: none.")] = None
    untried: Annotated[
        tuple[str, ...],
        Field(description="Where the config tried less in prompting arms than by default; empty in older evidence."),
    ] = ()
    best_prompting: Annotated[
        str, Field(description="Prompting arm selected on dev; best-prompting if folds selected different ones.")
    ]
    arms: Annotated[list[Arm], Field(description="Arms on the test items.")]
    contrasts: Annotated[
        list[Contrast],
        Field(
            min_length=1,
            description="The first one decides: tuned against the best prompting arm, by the deciding metric. Those "
            "by other metrics come last.",
        ),
    ]
    engine: Annotated[
        EngineUsed | None, Field(description="Engine that computed the answers of all arms; null in older evidence.")
    ] = None
    prompt_optimization: Annotated[
        OptimizedPrompt | None,
        Field(description="Prompt optimization on the same data and base; null: no optimizer was run."),
    ] = None
    noise_floor: Annotated[
        NoiseFloor | None,
        Field(description="Differences between two runs of the same arm; null in a cross-fitted evaluation."),
    ] = None
    references: Annotated[
        References | None,
        Field(description="Counts of references; null: no input has several, or older evidence."),
    ] = None
    opening: Annotated[
        LoggedAccess | None,
        Field(
            description="This evaluation's line in the access log, with the declared contrasts; null in older evidence."
        ),
    ] = None
    openings: Annotated[
        tuple[EarlierAccess, ...],
        Field(description="Earlier accesses to the same items; each one is a look at the test split."),
    ] = ()
    train_similarity: Annotated[
        TrainSimilarity | None, Field(description="Scores by similarity to the training data; null in older evidence.")
    ] = None
    output_templates: Annotated[
        OutputTemplates | None,
        Field(
            description="Scores by known and new output templates; null for labels, and for short or similar outputs."
        ),
    ] = None
    authors_split: Annotated[
        AuthorsSplit | None,
        Field(description="The split that the authors of the rows made; null: it was drawn, or older evidence."),
    ] = None
    form: Annotated[
        AnswerFormat | None,
        Field(description="Format of the answers, whatever their content; null: no format, or not measured."),
    ] = None
    lineage: Annotated[
        dict[str, Any],
        Field(description="Digests and versions: dataset, split, base, template, adapter, packages."),
    ]
    human_eval: Annotated[AnswerReview | None, Field(description="Blind preferences of people.")] = None
    human_eval_incumbents: Annotated[
        dict[str, AnswerReview],
        Field(description="Incumbent to blind preferences of people between its answers and the tuned ones."),
    ] = Field(default_factory=dict)
    regressions: Annotated[
        Benchmarks | None, Field(description="Regression benchmarks with the adapter off and on; null: not measured.")
    ] = None
    incumbents: Annotated[
        Incumbents | None, Field(description="Models of evaluate.incumbents against the adapter; null: none.")
    ] = None
    free: Annotated[FreeArms | None, _FREE] = None
    generated_effect: Annotated[
        GeneratedEffect | None,
        Field(description="Effect of the generated training rows (`data generated-effect`); null: not measured."),
    ] = None
    judge: Annotated[
        Judgement | None, Field(description="Findings of `tunewright judge`, or the reason of its veto.")
    ] = None

    def arm(self, name: str) -> Arm:
        """Return the test arm called ``name``."""
        return next(a for a in self.arms if a.name == name)

    @property
    def items_text(self) -> str:
        """Name of the items: ``test item``, or ``dev item``."""
        return f"{self.split} item"

    @property
    def inputs_text(self) -> str:
        """Suffix of the item count for inputs with several references; else empty."""
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
        tuple[str, ...] | None, Field(description="Further outputs of the item's input in this split; null: none.")
    ] = None
    answers: Annotated[dict[str, str], Field(description="Arm name to generated answer.")]
    scores: Annotated[
        dict[MetricName, dict[str, float]],
        Field(description="Metric to arm name to this item's score, for the arms in which it is scored."),
    ]
    unscored: Annotated[
        dict[MetricName, dict[str, str]] | None,
        Field(description="Metric to arm name to the reason why the item is not scored."),
    ] = None
    nearest: Annotated[
        float | None, Field(description="Similarity of the nearest training input, from 0 to 1; null: not measured.")
    ] = None
    new_template: Annotated[
        bool | None,
        Field(description="True if no training row has the item's output template; null: not informative here."),
    ] = None
    fold: Annotated[int | None, Field(description="In a cross-fitted evaluation, the fold whose adapter answered.")] = (
        None
    )
    prompts: Annotated[
        dict[str, StoredPrompt] | None,
        Field(description="Arm name to its prompt, for the arms that answered; null in older evidence."),
    ] = None
