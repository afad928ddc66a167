"""All questions to the judge about an evaluation, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tunewright.evaluation.judge.prompts import Question, Vote, correctness, outcome, pairwise
from tunewright.evaluation.judge.rows import ArmCorrectness, ArmPreference, JudgedItem, Pair
from tunewright.evidence.schema import Item
from tunewright.metrics import normalised

# CommonMark, with the two extensions that models write.
_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])

_BLOCK_ENDS = {"paragraph_close", "heading_close", "tr_close"}
_CELL_ENDS = {"th_close", "td_close"}


def without_markdown(text: str) -> str:
    """Return the words of ``text`` without headings' marks, emphasis, bullets, rules, fences and table lines.

    Numbers of ordered lists stay: "1986. A good year" is a list to CommonMark. A link keeps its text, an image its
    description. Text without markdown is returned unchanged, apart from outer white space.
    """
    tokens = _PARSER.parse(text)
    if not any(_is_markup(token) for token in tokens):
        return text.strip()
    out: list[str] = []
    for token in tokens:
        if token.type == "list_item_open" and token.info:
            out.append(f"{token.info}{token.markup} ")
        elif token.type == "inline":
            out.append(_inline(token.children or ()))
        elif token.type in {"fence", "code_block", "html_block"}:
            out.append(token.content if token.content.endswith("\n") else f"{token.content}\n")
        elif token.type in _CELL_ENDS:
            out.append(" ")
        elif token.type in _BLOCK_ENDS:
            out.append("\n")
    return "".join(out).strip()


def _is_markup(token: Token) -> bool:
    if token.type == "inline":
        return any(child.type not in {"text", "softbreak", "html_inline"} for child in token.children or ())
    return token.type not in {"paragraph_open", "paragraph_close", "html_block"}


def _inline(tokens: Sequence[Token]) -> str:
    out = []
    for token in tokens:
        if token.type in {"softbreak", "hardbreak"}:
            out.append("\n")
        elif token.type == "image":
            out.append(_inline(token.children or ()))
        else:  # tokens that open or close emphasis or a link have no content
            out.append(token.content)
    return "".join(out)


Votes = Callable[[Question], Vote]


@dataclass(frozen=True)
class Candidate:
    """One item with the compared answers; an arm without an answer has a reason in its place."""

    item: Item
    answers: Mapping[str, str]
    lacking: Mapping[str, str]


@dataclass(frozen=True)
class JudgeRequests:
    """The questions about all items.

    Deterministic results come first: an answer equal to the reference is correct, and equal answers tie. The judge is
    not asked about these.
    """

    candidates: Sequence[Candidate]
    treatment: str
    opponents: Sequence[str]
    criteria: str | None

    @property
    def questions(self) -> list[Question]:
        """The questions to ask, in the items' order."""
        asked: list[Question] = []

        def listen(question: Question) -> Vote:
            asked.append(question)
            return Vote(None, "not asked yet", "")

        self.count(listen)
        return asked

    def count(self, votes: Votes) -> list[JudgedItem]:
        """Return the items' rows; ``votes`` is called with each question to ask."""
        return [self._row(candidate, votes) for candidate in self.candidates]

    def _row(self, candidate: Candidate, votes: Votes) -> JudgedItem:
        return JudgedItem(
            key=candidate.item.key,
            correctness={arm: self._answered(candidate, arm, votes) for arm in (self.treatment, *self.opponents)},
            pairs={opponent: self._pair(candidate, opponent, votes) for opponent in self.opponents},
        )

    def _answered(self, candidate: Candidate, arm: str, votes: Votes) -> ArmCorrectness:
        if arm in candidate.lacking:
            return ArmCorrectness(correct=None, unscored=candidate.lacking[arm])
        item, answer = candidate.item, candidate.answers[arm]
        if normalised(answer) == normalised(item.reference):
            return ArmCorrectness(correct=True, exact=True)
        vote = votes(correctness(item.input, item.reference, answer, self.criteria))
        correct = None if vote.verdict is None else vote.verdict == "correct"
        return ArmCorrectness(correct=correct, unscored=vote.unscored, reply=vote.reply)

    def _pair(self, candidate: Candidate, opponent: str, votes: Votes) -> Pair:
        if opponent in candidate.lacking:
            return Pair(plain=ArmPreference(outcome=None, unscored=candidate.lacking[opponent]))
        texts = (candidate.item.reference, candidate.answers[self.treatment], candidate.answers[opponent])
        stripped = tuple(map(without_markdown, texts))
        has_markdown = any(text.strip() != plain for text, plain in zip(texts, stripped, strict=True))
        return Pair(
            plain=self._compared(votes, candidate.item.input, *texts),
            stripped=self._compared(votes, candidate.item.input, *stripped) if has_markdown else None,
        )

    def _compared(self, votes: Votes, task: str, reference: str, ours: str, theirs: str) -> ArmPreference:
        if normalised(ours) == normalised(theirs):
            return ArmPreference(outcome="tie", equal=True)
        both = (
            votes(pairwise(task, reference, ours, theirs, self.criteria)),
            votes(pairwise(task, reference, theirs, ours, self.criteria)),
        )
        replies = tuple(each.reply for each in both)
        missing = next((each.unscored for each in both if each.unscored), None)
        if missing is not None:
            return ArmPreference(outcome=None, unscored=missing, replies=replies)
        result, flipped = outcome(*both)
        return ArmPreference(outcome=result, flipped=flipped, replies=replies)
