"""Incumbents as arms: their frozen answers scored like any arm's, and the adapter against each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.config import MetricName
from tunewright.config.project import ProjectFolder
from tunewright.core.io import file_digest
from tunewright.core.progress import Reporter
from tunewright.data.trace import places_by_key, source_name
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.answer_journal import Answer
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import TUNED
from tunewright.evaluation.frozen_answers import FrozenSet, IncumbentEstimate, IncumbentModel, Split
from tunewright.evaluation.incumbent_costs import incumbent_serving, measured_tuned
from tunewright.evidence.common import ArmScore
from tunewright.evidence.incumbents import Incumbent, Incumbents, measured_drop
from tunewright.evidence.logged_access import Declared
from tunewright.evidence.prompts import PromptMessages, StoredPrompt
from tunewright.evidence.schema import Arm
from tunewright.evidence.scoring import ScoredArms, leave_out, score_arm, score_of
from tunewright.metrics import score_all, score_text


def incumbent_models(project: ProjectFolder, reporter: Reporter) -> list[IncumbentModel]:
    """Return the config's incumbents."""
    return [IncumbentModel(project, config, reporter) for config in project.config.evaluate.incumbents]


def estimate_incumbents(
    project: ProjectFolder, version: DatasetVersion, splits: Sequence[Split], reporter: Reporter
) -> list[IncumbentEstimate]:
    """Estimate the calls of each incumbent on these splits; nothing is sent."""
    members = [m for split in splits for m in version.examples(split)]
    return [model.estimate(members) for model in incumbent_models(project, reporter)]


def require_ready(project: ProjectFolder, version: DatasetVersion, splits: Sequence[Split], reporter: Reporter) -> None:
    """Check the keys and files of all incumbents, before anything is paid or computed.

    Raises:
        UserError: a key or a file is missing.
    """
    for model in incumbent_models(project, reporter):
        _trained_on(model, project, version)
        for split in splits:
            model.require_ready(version.examples(split))


def _trained_on(model: IncumbentModel, project: ProjectFolder, version: DatasetVersion) -> set[str]:
    """Return the pair keys of rows from the files that a model was itself trained on.

    Raises:
        UserError: no row was read from such a file.
    """
    if not model.config.trained_on:
        return set()
    source_of = {
        key: place.rpartition(":")[0] for key, place in places_by_key(project.dataset, version.manifest).items()
    }
    sources, where = sorted(set(source_of.values())), f"{model.endpoint.where}.trained_on"
    files = {source_name(file, sources, project.root, where) for file in model.config.trained_on}
    return {key for key, source in source_of.items() if source in files}


def incumbent_inputs(arm_runner: ArmRunner, split: Split) -> dict[str, Any]:
    """Return the incumbents' part of everything that decides an evaluation; nothing without incumbents."""
    models = incumbent_models(arm_runner.project, arm_runner.reporter)
    if not models:
        return {}
    members = arm_runner.version.examples(split)
    unfrozen = {model.config.name: left for model in models if (left := model.unfrozen(members))}
    return {
        "incumbents": [model.identity for model in models],
        "non_inferiority_margin": arm_runner.settings.non_inferiority_margin,
        **({"unfrozen": unfrozen} if unfrozen else {}),
    }


def declared_incumbents(arm_runner: ArmRunner, metric: MetricName) -> tuple[Declared, ...]:
    """Return the contrasts of tuned against each incumbent, to declare before the test split is opened."""
    margin = arm_runner.settings.non_inferiority_margin
    return tuple(
        Declared(
            treatment=TUNED.name, control=f"incumbent-{each.name}", metric=metric, margin=None,
            non_inferiority_margin=margin,
        )
        for each in arm_runner.settings.incumbents
    )  # fmt: skip


class IncumbentArms:
    """The incumbents of one evaluation.

    Args:
        arm_runner: holds the rows and the metrics.
        split: the split that is compared. On test, dev is answered first.
    """

    def __init__(self, arm_runner: ArmRunner, split: Split) -> None:
        self.arm_runner = arm_runner
        self.split = split
        self.members = arm_runner.version.examples(split)
        self.models = incumbent_models(arm_runner.project, arm_runner.reporter)
        self._dev: dict[str, ArmScore] = {}
        self._frozen: dict[str, FrozenSet] = {}

    def try_dev(self) -> None:
        """Have each incumbent answer dev and report its score, so that a wrong setting shows before test is opened.

        Raises:
            UserError: as for :meth:`ask`, or no answer can be scored.
        """
        rows = self.arm_runner.version.examples("dev")
        for model in self.models:
            frozen = model.answers(rows, "dev")
            if not frozen.given:
                continue
            scorer = self.arm_runner.scorers[0]
            kept = [place for place in range(len(rows)) if place not in frozen.gaps]
            texts = [answer.answer for answer in frozen.given]
            scores = score_all(scorer, texts, [rows[p].example for p in kept], [m.example for m in rows])
            score = score_of(scores, [rows[p].cluster for p in kept], self.arm_runner.project.config.seed)
            self._dev[model.arm] = score
            self.arm_runner.reporter.say(f"{model.arm} on dev: {score_text(scorer.name, score.value)}")

    def ask(self) -> dict[str, list[Answer]]:
        """Return the answers to the split by arm; an item without one has an empty text and is left out by `scored`.

        Raises:
            UserError: an endpoint fails or a budget is used up; replies are kept.
        """
        self._frozen = {model.arm: model.answers(self.members, self.split) for model in self.models}
        return {
            arm: [
                Answer("", False, (), 0)
                if answer is None or answer.gap is not None
                else Answer(answer.answer, answer.finish == "length", (), answer.completion_tokens)
                for answer in frozen.answers
            ]
            for arm, frozen in self._frozen.items()
        }

    def prompts(self, messages: PromptMessages) -> dict[str, list[StoredPrompt | None]]:
        """Return each item's request by arm, None without an answer; ``messages`` gets the messages."""
        return {
            model.arm: [
                None
                if place in self._frozen[model.arm].gaps
                else StoredPrompt(messages=messages.add(model.messages(m.example)))
                for place, m in enumerate(self.members)
            ]
            for model in self.models
        }

    def scored(self, scored: ScoredArms) -> ScoredArms:
        """Return the scores without those of items that an incumbent did not answer."""
        for arm, frozen in self._frozen.items():
            scored = scored.leaving_out(arm, frozen.gaps)
        return scored

    def arms(self, scored: ScoredArms) -> list[Arm]:
        """Return the incumbents' arms.

        Raises:
            UserError: no answer can be scored.
        """
        return [self._arm(name, frozen, scored) for name, frozen in self._frozen.items()]

    def _arm(self, name: str, frozen: FrozenSet, scored: ScoredArms) -> Arm:
        given = frozen.given
        count = max(len(given), 1)
        arm = score_arm(
            name=name,
            kind="incumbent",
            shots=0,
            scores=scored.of_arm(name),
            clusters=scored.clusters,
            truncated=sum(answer.finish == "length" for answer in given),
            prompt_tokens=sum(answer.prompt_tokens for answer in given) / count,
            seed=self.arm_runner.project.config.seed,
        )
        return arm.model_copy(update={"answer_tokens": sum(answer.completion_tokens for answer in given) / count})

    def section(self, scored: ScoredArms, adapter: Adapter, tuned: Arm) -> Incumbents | None:
        """Return the evidence's section; None without incumbents.

        Args:
            scored: all arms' scores, from :meth:`scored`.
            adapter: the adapter, which is timed here.
            tuned: its arm.
        """
        if not self.models:
            return None
        arms = next(iter(scored.by_metric.values()))
        compared = [self._compared(model, arms, scored.clusters) for model in self.models]
        return Incumbents(tuned=measured_tuned(self.arm_runner, adapter, self.members, tuned), compared=tuple(compared))

    def _compared(self, model: IncumbentModel, arms: Mapping[str, Any], clusters: Sequence[str]) -> Incumbent:
        frozen, config = self._frozen[model.arm], model.config
        given = frozen.given
        times = sorted(answer.time for answer in given if answer.time is not None)
        serving = incumbent_serving(config, frozen)
        gaps = list(frozen.gaps.values())
        ours, theirs = arms[TUNED.name], arms[model.arm]
        margin, seed = self.arm_runner.settings.non_inferiority_margin, self.arm_runner.project.config.seed
        known = _trained_on(model, self.arm_runner.project, self.arm_runner.version)
        seen = {place: "trained on" for place, m in enumerate(self.members) if m.key in known}
        unseen = None
        if 0 < len(seen) < len(self.members):
            unseen = measured_drop(ours, leave_out(theirs, seen), clusters, margin, seed)
        return Incumbent(
            name=config.name,
            arm=model.arm,
            model=str(config.model),
            url=str(config.base_url),
            file=os.path.relpath(frozen.path, model.folder.parent),
            file_digest=file_digest(frozen.path),
            versions=frozen.versions,
            first=times[0] if times else "",
            last=times[-1] if times else "",
            gaps={reason: gaps.count(reason) for reason in dict.fromkeys(gaps)},
            truncated=sum(answer.finish == "length" for answer in given),
            prompt_tokens=sum(answer.prompt_tokens for answer in given),
            completion_tokens=sum(answer.completion_tokens for answer in given),
            estimated=sum(answer.estimated for answer in given),
            cost=None if serving.cost_per_1000 is None else serving.cost_per_1000 * len(given) / 1000,
            serving=serving,
            dev=self._dev.get(model.arm),
            drop=measured_drop(ours, theirs, clusters, margin, seed),
            seen=len(seen),
            unseen=unseen,
        )
