"""A judge in a shadow's review: it answers the differing pairs, and people's verdicts on some of them correct it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright.config import JudgeConfig
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.text import count_of
from tunewright.evaluation.judge.questions import JudgeQuestion, pairwise, vote
from tunewright.evaluation.judge.runner import JudgeEstimate, conversation, require_some, total_estimate, warn_of_family
from tunewright.evidence.shadow import ShadowStatus
from tunewright.model_io.client import Endpoint
from tunewright.model_io.replies import Budget, Reply, cost
from tunewright.open_project import OpenProject
from tunewright.serving.options import ShadowJudgeOptions, ShadowReviewOptions
from tunewright.serving.serve import open_state
from tunewright.serving.shadow_review import ReviewState, input_text, read_review, status
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.shadow_reviews import DeclaredJudge, Judgement, PairTexts, ShadowTrial

_PEOPLE = 0.2
_VERDICTS = {"A": ("shadow", "live"), "B": ("live", "shadow"), "tie": ("both", "both")}
"""The better answer by the judge's verdict, in both orders."""


def judge(project: OpenProject, alias: str, options: ShadowJudgeOptions = ShadowJudgeOptions()) -> ShadowStatus:
    """Have the config's judge answer the differing pairs of an alias's newest shadow, blind and in both orders.

    People judge a share of the pairs, drawn in advance. Replies are stored as verdicts, without their text, so that a
    stopped call resumes and nothing outlives the deletion of a request.

    Args:
        alias: its name.
        options: the contracts that permit sending recorded requests, and the share that people judge.

    Raises:
        UserError: no judge in the config, no contract that permits it, changed terms, or the endpoint fails.
    """
    project.folder.config.judge.require()
    with open_state(project) as state:
        questions = _questions(project, state, alias, options)
        if questions.asked:
            _require_permission(questions.contracts, options.contracts, len(questions.asked), questions.judge)
            _ask(project, state, questions)
        else:
            project.reporter.say(f"No pair of {alias} waits for the judge.")
    return status(project, alias)


def estimate_judge(
    project: OpenProject, alias: str, options: ShadowJudgeOptions = ShadowJudgeOptions()
) -> JudgeEstimate:
    """Return the calls, tokens and cost of :meth:`judge` without sending anything.

    Nothing is declared, and no contract or key of the endpoint is needed. The audit log says that the requests' texts
    were read.
    """
    project.folder.config.judge.require()
    with open_state(project) as state:
        questions = _questions(project, state, alias, options, declare=False)
        calls = _endpoint(project, questions.read.trial).estimate(map(conversation, questions.asked.values()))
    return total_estimate(0, calls.calls, [calls])


@dataclass(frozen=True)
class _Questions:
    """The questions that a shadow's judge has not answered."""

    read: ReviewState
    judge: DeclaredJudge
    asked: dict[tuple[str, bool], JudgeQuestion]
    """By the response's id; True: the candidate's answer is shown second."""
    contracts: dict[str, str]
    """The contract of each tenant whose requests they contain."""


def _questions(
    project: OpenProject, state: State, alias: str, options: ShadowJudgeOptions, *, declare: bool = True
) -> _Questions:
    settings = project.folder.config.judge
    read = read_review(project, state, alias, ShadowReviewOptions(), declare=declare)
    declared = _declared(read.trial, settings, options.people)
    wanted = replace(read, trial=replace(read.trial, judge=declared)).settling().unjudged
    if not wanted or len(read.settled) >= read.trial.most_units:
        return _Questions(read, declared, {}, {})
    warn_of_family(declared.model, project.folder.config.base_model, project.reporter)
    known = {(each.response_id, each.swapped) for each in read.judgements}
    texts = state.shadow_reviews.texts(read.trial, KeyFile(project.folder.record_key))
    asked = {
        (key, swapped): _question(texts[key], swapped, settings.criteria)
        for key in wanted
        for swapped in (False, True)
        if key in texts and (key, swapped) not in known
    }
    return _Questions(read, declared, asked, {texts[key].tenant: texts[key].contract for key, _ in asked})


def _endpoint(project: OpenProject, trial: ShadowTrial) -> Endpoint:
    settings = project.folder.config.judge
    purse = Budget(settings.budget, "judge.budget")
    purse.pay(trial.spent)
    return Endpoint(settings, "judge", None, purse, project.reporter)


def _ask(project: OpenProject, state: State, questions: _Questions) -> None:
    """Ask the judge, and store each verdict as soon as its reply is complete."""
    settings, reviews = project.folder.config.judge, state.shadow_reviews
    read, declared, asked = questions.read, questions.judge, questions.asked
    endpoint = _endpoint(project, read.trial)
    endpoint.require_key()
    reviews.send(read.trial, declared, sorted(set(questions.contracts.values())), len(asked))
    project.reporter.say(
        f"Recorded requests of {', '.join(sorted(questions.contracts))} are sent to {declared.model} at {declared.url}"
    )
    places: dict[str, list[tuple[str, bool]]] = {}
    for place, question in asked.items():
        places.setdefault(endpoint.journal.key(conversation(question)), []).append(place)
    unread: list[Judgement] = []
    reasons: list[str | None] = [None] * sum(each.verdict is not None for each in read.judgements)

    def take(key: str, reply: Reply) -> None:
        said = vote(asked[places[key][0]], reply)
        reasons.append(said.unscored)
        price = cost(settings, reply.prompt_tokens, reply.completion_tokens) or 0.0
        better = None if said.verdict is None else _VERDICTS[said.verdict]
        made = [Judgement(response_id, swapped, better and better[swapped]) for response_id, swapped in places[key]]
        if better is None:
            unread.extend(made)  # if no reply can be read, none is stored
        reviews.judge(read.trial, [] if better is None else made, price)

    endpoint.ask("Judging", list(map(conversation, asked.values())), take)
    require_some(reasons, f"the answers in the shadow of {read.trial.alias}")
    reviews.judge(read.trial, unread)
    if unread:
        why = ", ".join(sorted({reason for reason in reasons if reason}))
        project.reporter.warn(
            f"{count_of(len(unread), 'answer')} of {declared.model} had no verdict ({why}): these "
            "pairs count as ties, which people's verdicts correct."
        )


def _declared(trial: ShadowTrial, settings: JudgeConfig, people: float | None) -> DeclaredJudge:
    """Return the judge with its terms, which are those of the first call."""
    model, url = str(settings.model), str(settings.base_url)
    if model in (trial.alias, trial.candidate, trial.live):
        what = f"The judge {model} is one of the adapters that it would compare"
        raise UserError(what, where="judge.model", fix="Take another model.")
    before = trial.judge
    share = _PEOPLE if before is None else before.share
    if people is not None and not 0 < people < 1:
        raise UserError(f"People cannot judge a share of {people:g}", where="--people", fix="Choose 20%, say.")
    asked = digest([pairwise("", None, "", "", settings.criteria).text])
    now = DeclaredJudge(model, url, asked, share if people is None else people)
    if before is not None and before != now:
        named = {"model": "judge.model", "url": "judge.base_url", "instructions": "judge.criteria", "share": "--people"}
        changed = next(name for name in named if getattr(before, name) != getattr(now, name))
        was = "other instructions" if changed == "instructions" else f"{getattr(before, changed)}"
        was = f"{100 * before.share:.4g}%" if changed == "share" else was
        what = f"The judge of {trial.alias} {trial.release} began with {was}, which cannot change during a shadow"
        raise UserError(what, where=named[changed], fix="Restore it, or start another shadow.")
    return now


def _require_permission(
    sent: dict[str, str], contracts: Sequence[str], questions: int, declared: DeclaredJudge
) -> None:
    """Check that each tenant's contract was named: recorded requests leave the project only by this choice."""
    missing = {tenant: contract for tenant, contract in sent.items() if contract not in contracts}
    if missing:
        named = ", ".join(f"{tenant} (recorded under {contract})" for tenant, contract in sorted(missing.items()))
        flags = " ".join(f"--contract {contract!r}" for contract in sorted(set(sent.values())))
        raise UserError(
            f"{count_of(questions, 'question')} with recorded requests of {named} would be sent to {declared.model} at "
            f"{declared.url}",
            where="--contract",
            fix=f"If the contract permits it, add {flags}.",
        )


def _question(texts: PairTexts, swapped: bool, criteria: str | None) -> JudgeQuestion:
    first, second = (texts.live, texts.shadow) if swapped else (texts.shadow, texts.live)
    return pairwise(input_text(texts.request), None, first, second, criteria)
