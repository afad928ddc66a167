"""The effect of generated rows: two stored evaluations of one test split, of adapters with and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.review.edits import unaccepted_keys
from tunewright.data.versions import load_version
from tunewright.evaluation.access_log import amendable, load_checked
from tunewright.evaluation.arms import TUNED
from tunewright.evidence.common import GeneratedEffect
from tunewright.evidence.files import load_items
from tunewright.evidence.schema import Evidence
from tunewright.evidence.scoring import contrast, score_arms, score_of
from tunewright.metrics import open_scorers

_SAME = ("dataset", "test_split", "base", "template_digest", "decoding")
_WITHOUT = "without"


def measure_effect(project: ProjectFolder, ours: Path, theirs: Path, reporter: Reporter) -> GeneratedEffect:
    """Compare two evaluations on the test items of people, and add the finding to the first one's evidence.

    Nothing is answered again: the answers are the stored answers of the evaluations.
    """
    log, folder = amendable(ours, project.evaluations)
    evidence = log.load(folder)
    other = load_checked(theirs, project.evaluations, reporter)
    _require_comparable(evidence, other)
    version = load_version(project.dataset, str(evidence.lineage["dataset"]))
    training = [m for m in version.domain_of("train") if m.generated]
    if not training:
        raise UserError("No training row of this version is generated", where=str(ours))
    people = {m.key: m for m in version.domain_of("test") if not m.generated}
    mine = {item.key: item.answers[TUNED.name] for item in load_items(folder) if item.key in people}
    other_items = {item.key: item.answers[TUNED.name] for item in load_items(theirs) if item.key in people}
    keys = sorted(mine.keys() & other_items.keys())
    if not keys:
        fix = "Evaluate both adapters on the same dataset version."
        raise UserError("The two evaluations share no human-written test row", where=str(ours), fix=fix)
    scorer = open_scorers(project.config.evaluate, project.root)[0]
    if scorer.name != evidence.metric:
        raise UserError(
            f"The evaluations were decided by {evidence.metric}, but the config's metric is {scorer.name}",
            where="evaluate.metric",
            fix="Set it to the evaluations' metric, or evaluate both adapters again.",
        )
    answers = {TUNED.name: [mine[key] for key in keys], _WITHOUT: [other_items[key] for key in keys]}
    clusters = [people[key].cluster for key in keys]
    scored = score_arms([scorer], [people[key].example for key in keys], clusters, answers)
    seed = project.config.seed
    arms = scored.by_metric[scorer.name]
    found = contrast(
        treatment=TUNED.name,
        control=_WITHOUT,
        ours=arms[TUNED.name],
        theirs=arms[_WITHOUT],
        clusters=scored.clusters,
        seed=seed,
    )
    doubtful = unaccepted_keys(project.dataset, version.manifest, {m.key for m in training})
    effect = GeneratedEffect(
        generated=len(training),
        accepted=len(training) - len(doubtful),
        people=sum(not m.generated for m in version.domain_of("train")),
        without=other.id,
        adapter=str(other.lineage["adapter"]["name"]),
        metric=scorer.name,
        items=found.scored,
        score_with=score_of(arms[TUNED.name], scored.clusters, seed),
        score_without=score_of(arms[_WITHOUT], scored.clusters, seed),
        difference=found.difference,
        interval=found.interval,
        interval_method=found.interval_method,
        p_value=found.p_value,
        test=found.test,
    )
    log.amend(folder, generated_effect=effect)
    return effect


def _require_comparable(ours: Evidence, theirs: Evidence) -> None:
    for evidence, wanted in ((ours, True), (theirs, False)):
        if evidence.design != "held-out" or evidence.split != "test":
            what = f"Evaluation {evidence.id} is not one of `tunewright evaluate` on the test split"
            raise UserError(what, fix="Name an evaluation of the test split.")
        if bool(_train(evidence).get("generated", True)) is not wanted:
            raise UserError(
                f"The adapter of evaluation {evidence.id} was trained {'without' if wanted else 'with'} generated rows",
                fix="Name the evaluation with them first, then the one of an adapter trained with train.generated: "
                "false.",
            )
    differ = [name for name in _SAME if ours.lineage.get(name) != theirs.lineage.get(name)]
    differ += ["metric"] if ours.metric != theirs.metric else []
    mine, other = _train(ours), _train(theirs)
    keys = sorted((mine.keys() | other.keys()) - {"generated"})
    differ += [f"train.{name}" for name in keys if mine.get(name) != other.get(name)]
    if differ:
        raise UserError(
            f"Evaluations {ours.id} and {theirs.id} differ in more than the generated rows: {', '.join(differ)}",
            fix="Train and evaluate both adapters on one version with one config, apart from train.generated.",
        )


def _train(evidence: Evidence) -> dict[str, Any]:
    config = evidence.lineage.get("adapter", {}).get("lineage", {}).get("config") or {}
    return dict(config.get("train", {}))
