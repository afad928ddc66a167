"""Commands on existing evaluations: judge, review, verdict and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tunewright.adapters.registry import list_adapters
from tunewright.api.context import ProjectContext
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.review.reviews import read_reviews
from tunewright.data.review.samples import outcome
from tunewright.data.versions.members import read_places
from tunewright.data.versions.store import version_folder
from tunewright.data.versions.version import read_manifest
from tunewright.evaluation.access_log import AccessLog, amendable, load_checked
from tunewright.evidence.causes import Labels, ProjectFacts, decided
from tunewright.evidence.learning_curve import find_curve
from tunewright.evidence.logged_access import LoggedAccess
from tunewright.evidence.schema import Evidence, Item, find_evaluation, load_items
from tunewright.evidence.verdict import Verdict

if TYPE_CHECKING:
    from tunewright.advisor.signals import Signals
    from tunewright.evaluation.human_eval.session import BlindReview, ComparisonProgress
    from tunewright.evaluation.item_prompts import ArmPrompt
    from tunewright.evaluation.judge.rows import JudgedItem
    from tunewright.evaluation.judge.runner import Estimate, Judge, JudgeResult
    from tunewright.evaluation.kept_preferences import KeptPreferences
    from tunewright.evaluation.row_answers import RowAnswers
    from tunewright.evidence.human_eval import AnswerReview


T = TypeVar("T")


def known_of(project: ProjectFolder, evidence: Evidence, reporter: Reporter) -> ProjectFacts:
    """Return the project's facts about the evaluation's adapter and data.

    Missing facts are left out. Unreadable ones are left out with a warning: evidence is enough for a verdict.
    """
    from tunewright.advisor.explanations import calls_cost

    def readable(read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except UserError as error:
            reporter.warn(f"Ignored for the causes of the verdict: {error}")
            return None

    advice = readable(lambda: _matching_advice(project, evidence))
    digest = evidence.lineage.get("adapter", {}).get("digest")
    adapter = next((a for a in list_adapters(project.adapters) if a.digest == digest), None)
    even = advice.break_even if advice else None
    same_arm = even is not None and even.prompting.arm == evidence.contrasts[0].control
    return ProjectFacts(
        history=adapter.history if adapter else (),
        curve=readable(lambda: find_curve(project.curves, evidence)),
        labels=_labels(project.dataset, str(evidence.lineage.get("dataset"))),
        cost=calls_cost(even) if even is not None and same_arm else None,
    )


def _matching_advice(project: ProjectFolder, evidence: Evidence) -> Signals | None:
    from tunewright.advisor.signals import find_matching_advice

    AccessLog(project.evaluations).require(*project.advice.glob("[!.]*.json"))
    return find_matching_advice(project.advice, evidence)


def _labels(dataset: Path, version: str) -> Labels | None:
    """Return the numbers of conflicting and of wrong rows in a version; None without the version."""
    try:
        places = {key: place for key, place in read_places(dataset, version).items() if not place.mixed}
        manifest = read_manifest(version_folder(dataset, version))
        reviews = read_reviews(dataset)
    except UserError:
        return None  # evidence alone is enough for a verdict
    found = outcome(reviews, version, sorted(places))
    if found is None:
        return Labels(len(places), manifest.counts.conflicts)
    return Labels(len(places), manifest.counts.conflicts, found.checked, found.wrong)


REPORT_FILE = "report.html"


class EvaluationsApi(ProjectContext):
    """Methods on a project's evaluations, given as ID, folder or evidence file; the newest by default.

    :class:`Project` inherits them, since they are top-level commands.
    """

    def human_eval(
        self,
        evaluation: str | Path | None = None,
        *,
        reviewer: str | None = None,
        items: int | None = None,
        against: str | None = None,
    ) -> BlindReview:
        """Return a blind review of an evaluation's answers, resumed where its reviewer stopped.

        Args:
            evaluation: ID, folder or evidence file (None: the newest).
            reviewer: the reviewer's name (None: git's user.name, or the login name).
            items: size of the sample, if none has been drawn yet (None: 50).
            against: incumbent whose answers are compared with the tuned ones (None: the best prompting arm's).

        Raises:
            UserError: no evaluation, no incumbent of that name, no reviewer's name, or a sample of another size exists.
                Also if a file of the evaluation was changed after it was written.
        """
        from tunewright.data.versions.version import current_author
        from tunewright.evaluation.human_eval.session import BlindReview

        folder = _folder(self.evaluation(evaluation, dev=False))
        load_checked(folder, self.folder.evaluations, self.reporter)
        name = current_author(self.folder.root) if reviewer is None else reviewer
        if name is None:
            raise UserError("Found neither a git user name nor a login name", where="--reviewer", fix="Pass a name.")
        return BlindReview(folder, name, self.reporter, items=items, against=against)

    def human_eval_progress(self, evaluation: str | Path | None = None) -> list[ComparisonProgress]:
        """Return how far each reviewer of an evaluation is, by comparison; it says nothing about the verdicts.

        Raises:
            UserError: no evaluation, or a file of the review was changed.
        """
        from tunewright.evaluation.human_eval.session import reviewers_progress

        return reviewers_progress(_folder(self.evaluation(evaluation, dev=False)))

    def row_answers(self, *, newest: int = 5) -> RowAnswers:
        """Return the adapter's stored answers to rows, from the ``newest`` evaluations. Nothing is generated."""
        from tunewright.evaluation.row_answers import evaluated_files, row_answers

        evaluations = self.folder.evaluations
        return row_answers(evaluated_files(evaluations)[:newest], evaluations, self.reporter)

    def human_eval_results(self, evaluation: str | Path | None = None, *, against: str | None = None) -> AnswerReview:
        """Add all reviewers' verdicts to the evidence and return them: preference, agreement, estimate for all items.

        A judge of the same evaluation is compared with the reviewers and sharpens their estimate. Results against an
        incumbent have a section of their own, which decides nothing.

        Args:
            evaluation: ID, folder or evidence file (None: the newest).
            against: incumbent of the comparison (None: the best prompting arm).

        Raises:
            UserError: no evaluation, no incumbent of that name, or no reviews. Also if a file of the evaluation was
                changed after it was written.
        """
        from tunewright.evaluation.human_eval.results import accepted_judge, review_results

        access_log, folder = amendable(self.evaluation(evaluation, dev=False), self.folder.evaluations)
        evidence = access_log.load(folder)
        if against is not None:
            section = review_results(folder, against=against)
            known = evidence.human_eval_incumbents
            if known.get(against) != section:
                access_log.amend(folder, human_eval_incumbents={**known, against: section})
            return section
        section = review_results(folder, accepted_judge(folder, evidence, self.reporter))
        if evidence.human_eval != section:
            access_log.amend(folder, human_eval=section)
        return section

    def keep_preferences(
        self, evaluation: str | Path | None = None, *, source: Literal["person", "judge"]
    ) -> KeptPreferences:
        """Keep an evaluation's preferences with the dataset as pairs for preference tuning.

        Args:
            evaluation: ID, folder or evidence file (None: the newest).
            source: people's blind verdicts, or the judge's where both orders agree.

        Raises:
            UserError: nothing was judged, the judge failed its controls, or a file of the evaluation was changed.
        """
        from tunewright.evaluation.kept_preferences import keep_preferences

        folder = _folder(self.evaluation(evaluation, dev=False))
        return keep_preferences(self.folder.dataset, self.folder.evaluations, folder, source, self.reporter)

    def verdict(self, evaluation: str | Path | None = None) -> Verdict:
        """Return ship, don't ship or can't tell, from an evaluation's evidence alone.

        The causes of a *don't ship* also use the project's records of the adapter and the data.

        Raises:
            UserError: no evaluation, or a file of the evaluation or a line of the access log was changed or is missing.
        """
        evidence = self._evidence(evaluation)
        return decided(evidence, known_of(self.folder, evidence, self.reporter))

    def access_log(self) -> list[LoggedAccess]:
        """Return every access to the test split, oldest first, after checking the log and the files that it binds.

        Raises:
            UserError: a line or an evaluation's file was changed or is missing; the first one is named.
        """
        access_log = AccessLog(self.folder.evaluations)
        access_log.require_all()
        return access_log.openings

    def verdict_markdown(self, evaluation: str | Path | None = None) -> str:
        """Return the verdict and its measurements as GitHub Markdown, for a pull request comment.

        Raises:
            UserError: as :meth:`verdict`.
        """
        from tunewright.report.markdown import verdict_markdown

        evidence = self._evidence(evaluation)
        return verdict_markdown(evidence, known_of(self.folder, evidence, self.reporter))

    def judge(self, evaluation: str | Path | None = None) -> JudgeResult:
        """Let the config's judge compare the tuned answers with the best prompting arm's.

        The judge is tested first. If it fails its controls, its judgements are discarded and the evidence says so.

        Raises:
            UserError: no judge in the config, too few items to test it, or the endpoint fails.
        """
        return self._judge(evaluation).judge()

    def judged_items(self, evaluation: str | Path | None = None) -> list[JudgedItem]:
        """Return each judged item of an evaluation: the judge's verdicts and its replies.

        Raises:
            UserError: as :meth:`verdict`, or nothing was judged.
        """
        from tunewright.evaluation.judge.rows import load_judged

        self._evidence(evaluation)  # which checks the file of the judged items too
        return load_judged(_folder(self.evaluation(evaluation)))

    def estimate_judge(self, evaluation: str | Path | None = None) -> Estimate:
        """Return the calls, tokens and cost of :meth:`judge` without sending anything."""
        return self._judge(evaluation).estimate()

    def _judge(self, evaluation: str | Path | None) -> Judge:
        from tunewright.evaluation.judge.runner import Judge

        return Judge(self.folder, self.evaluation(evaluation, dev=False), self.reporter)

    def report(self, evaluation: str | Path | None = None) -> Path:
        """Write an evaluation's HTML report next to its evidence.

        It includes the project's newest learning curve and advice on the same data and base, if they exist.

        Raises:
            UserError: as :meth:`verdict`, or stored advice was changed after it was written.
        """
        from tunewright.evidence.learning_curve import find_curve
        from tunewright.report.html import write_report

        evidence = self._evidence(evaluation)
        folder = _folder(self.evaluation(evaluation))
        history: list[dict[str, Any]] = []
        if evidence.design == "held-out":  # cross-validated evidence contains the dev losses of each fold
            adapters = {a.digest: a for a in list_adapters(self.folder.adapters)}
            adapter = adapters.get(evidence.lineage["adapter"]["digest"])
            if adapter is None:
                self.reporter.warn("The evaluated adapter was removed: the report has no loss curve.")
            else:
                history = adapter.history
        out = folder / REPORT_FILE
        curve, advice = (
            find_curve(self.folder.curves, evidence),
            _matching_advice(self.folder, evidence),
        )
        known = known_of(self.folder, evidence, self.reporter)
        write_report(evidence, load_items(folder), history, out, curve, advice, known)
        return out

    def evaluation(self, evaluation: str | Path | None = None, *, dev: bool = True) -> Path:
        """Return an evaluation's folder.

        Args:
            evaluation: ID, folder or evidence file (None: the newest).
            dev: let the newest be an evaluation on the dev split.

        Raises:
            UserError: no such evaluation, or a line of the access log was changed or is missing.
        """
        if evaluation is None:
            AccessLog(self.folder.evaluations)  # completes an interrupted write, which may be the newest
        return find_evaluation(self.folder.evaluations, evaluation, dev=dev)

    def evidence(self, evaluation: str | Path | None = None) -> tuple[Evidence, list[Item]]:
        """Return an evaluation's evidence and its items, checked against the access log.

        Raises:
            UserError: as :meth:`verdict`.
        """
        evidence = self._evidence(evaluation)
        return evidence, load_items(_folder(self.evaluation(evaluation)))

    def item_prompts(self, evaluation: str | Path | None, key: str) -> list[ArmPrompt]:
        """Return the prompt of each arm for one item: its tokens, and the demonstrations in it.

        The prompts are built again as they were for the evaluation, and looked up in the journal of answers.

        Args:
            evaluation: ID, folder or evidence file (None: the newest).
            key: the item's pair key.

        Raises:
            UserError: as :meth:`verdict`; or another dataset version, base or chat template.
        """
        from tunewright.evaluation.item_prompts import item_prompts

        evidence = self._evidence(evaluation)
        return item_prompts(self.folder, evidence, key, self.base, self.chat, self.reporter)

    def _evidence(self, evaluation: str | Path | None) -> Evidence:
        """Return an evaluation's evidence, checked against the access log."""
        if evaluation is None:
            self.access_log()  # any evaluation could have been the newest, had its time not been changed
        place = self.evaluation(evaluation)
        evidence = load_checked(place, self.folder.evaluations, self.reporter)
        if evaluation is None:
            access_log = AccessLog(self.folder.evaluations)
            for removed in access_log.removed_since(str(evidence.lineage.get("created", ""))):
                self.reporter.warn(
                    f"The evidence of evaluation {removed} is missing. {evidence.id}, which is older, is used instead."
                )
        return evidence


def _folder(evaluation: Path) -> Path:
    """Return the folder of an evaluation that was given as its evidence file."""
    return evaluation if evaluation.is_dir() else evaluation.parent
