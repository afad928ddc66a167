"""The verbs on evaluations that are there: reading, judging, reviewing, deciding, showing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import list_adapters
from tunewright.api.context import ProjectContext
from tunewright.api.known import known_of
from tunewright.core.errors import UserError
from tunewright.evaluation.access_log import Ledger
from tunewright.evidence.causes import decided
from tunewright.evidence.schema import Evidence, amend, find_evaluation, load_evidence, load_items
from tunewright.evidence.test_set_access import TestSetAccess
from tunewright.evidence.verdict import Verdict

if TYPE_CHECKING:
    from tunewright.evaluation.human_eval.session import BlindReview
    from tunewright.evaluation.judge.runner import Estimate, Judge, JudgeResult
    from tunewright.evidence.human_eval import AnswerReview

REPORT_FILE = "report.html"


class EvaluationsApi:
    """What can be done with a project's evaluations, each as given (ID, folder or evidence file) or the newest.

    The command line has these verbs at its top, so they are the road's own: it inherits them.
    """

    def __init__(self, opened: ProjectContext) -> None:
        self._context = opened

    def review(
        self, evaluation: str | Path | None = None, *, reviewer: str | None = None, items: int | None = None
    ) -> BlindReview:
        """A blind review of an evaluation's answers (the newest by default), to go on where its reviewer left it.

        Args:
            evaluation: which.
            reviewer: whose verdicts they are (None: git's user.name, or the login name).
            items: how many to ask about, where no sample has been drawn yet (None: 50).

        Raises:
            UserError: no evaluation, nobody's name, or another sample than the one there is.
        """
        from tunewright.data.versions.author import current_author
        from tunewright.evaluation.human_eval.session import BlindReview

        folder = _folder(self.evaluation(evaluation, dev=False))
        name = current_author(self._context.folder.root) if reviewer is None else reviewer
        if name is None:
            raise UserError("you have no name in git and no login name", where="--reviewer", fix="Give a name.")
        return BlindReview(folder, name, self._context.reporter, items=items)

    def review_results(self, evaluation: str | Path | None = None) -> AnswerReview:
        """What all reviewers said, put into the evidence: preference, agreement, and what follows for all test items.

        Where a judge was heard on the same evaluation, it is compared with people and helps them.

        Raises:
            UserError: no evaluation, or nobody has reviewed it.
        """
        from tunewright.evaluation.human_eval.judged import heard_judge
        from tunewright.evaluation.human_eval.results import review_results

        folder = _folder(self.evaluation(evaluation, dev=False))
        section = review_results(folder, heard_judge(folder, load_evidence(folder), self._context.reporter))
        amend(folder, review=section)
        return section

    def verdict(self, evaluation: str | Path | None = None) -> Verdict:
        """Ship, don't ship or can't tell, from an evaluation's evidence alone (the newest by default).

        The causes of a *don't ship* also come from what the project has on the adapter and the data.

        Raises:
            UserError: there is none, or it is one of the project's and the ledger is not whole.
        """
        evidence = self._evidence(evaluation)
        return decided(evidence, known_of(self._context.folder, evidence, self._context.reporter))

    def ledger(self) -> list[TestSetAccess]:
        """Return every opening of the test split, the first one first.

        Raises:
            UserError: naming the first line that was changed or is missing.
        """
        return Ledger(self._context.folder.evaluations).openings

    def verdict_markdown(self, evaluation: str | Path | None = None) -> str:
        """Return the verdict with what was measured, as GitHub markdown for a comment on a pull request.

        Raises:
            UserError: as :meth:`verdict`.
        """
        from tunewright.report.markdown import verdict_markdown

        evidence = self._evidence(evaluation)
        return verdict_markdown(evidence, known_of(self._context.folder, evidence, self._context.reporter))

    def judge(self, evaluation: str | Path | None = None) -> JudgeResult:
        """Have the config's judge compare the tuned answers with the best prompting arm's (the newest by default).

        The judge is tested first; one that fails its controls is not heard, and the evidence says only that.

        Raises:
            UserError: no judge in the config, too few items to test it on, or an endpoint that fails.
        """
        return self._judge(evaluation).judge()

    def estimate_judge(self, evaluation: str | Path | None = None) -> Estimate:
        """Calls, tokens and cost that :meth:`judge` would take; nothing is sent."""
        return self._judge(evaluation).estimate()

    def _judge(self, evaluation: str | Path | None) -> Judge:
        from tunewright.evaluation.judge.runner import Judge

        return Judge(self._context.folder, self.evaluation(evaluation, dev=False), self._context.reporter)

    def report(self, evaluation: str | Path | None = None) -> Path:
        """Write an evaluation's HTML report beside its evidence (the newest by default), which is all it takes.

        The project's newest learning curve and advice on the same data and base are shown too, if there are any.
        """
        from tunewright.advisor.signals import fitting_advice
        from tunewright.evidence.learning_curve import find_curve
        from tunewright.report.html import write_report

        folder = _folder(self.evaluation(evaluation))
        evidence = load_evidence(folder)
        history: list[dict[str, Any]] = []
        if evidence.design == "held-out":  # cross-fitted evidence has each fold's dev losses itself
            adapters = {a.digest: a for a in list_adapters(self._context.folder.adapters)}
            adapter = adapters.get(evidence.lineage["adapter"]["digest"])
            if adapter is None:
                self._context.reporter.warn("The evaluated adapter is no longer here: the report has no loss curve.")
            else:
                history = adapter.history
        out = folder / REPORT_FILE
        curve, advice = (
            find_curve(self._context.folder.curves, evidence),
            fitting_advice(self._context.folder.advice, evidence),
        )
        known = known_of(self._context.folder, evidence, self._context.reporter)
        write_report(evidence, load_items(folder), history, out, curve, advice, known)
        return out

    def evaluation(self, evaluation: str | Path | None = None, *, dev: bool = True) -> Path:
        """Return an evaluation's folder: as given (ID, folder or evidence file), else the newest.

        Args:
            evaluation: which.
            dev: whether the newest may be one on the dev split.

        Raises:
            UserError: there is none.
        """
        return find_evaluation(self._context.folder.evaluations, evaluation, dev=dev)

    def _evidence(self, evaluation: str | Path | None) -> Evidence:
        """Return an evaluation's evidence; of the project's own, only with the whole ledger."""
        place = self.evaluation(evaluation)
        if self._context.folder.evaluations.resolve() in place.resolve().parents:
            self.ledger()
        return load_evidence(place)


def _folder(evaluation: Path) -> Path:
    """Return an evaluation's folder, where its evidence was named."""
    return evaluation if evaluation.is_dir() else evaluation.parent
