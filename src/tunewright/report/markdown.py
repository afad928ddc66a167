"""The verdict as GitHub markdown, to be posted on a pull request: a pure function of the evidence."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tunewright.evidence.base import Interval
from tunewright.evidence.benchmarks import Suite
from tunewright.evidence.causes import Known, decided
from tunewright.evidence.regression_rule import suite_text
from tunewright.evidence.schema import Arm, Contrast, Evidence
from tunewright.metrics import metric_label, p_text, points_text
from tunewright.report.wording import cause_text, headline, metric_order, noise_line, suite_result

_MARKUP = re.compile(r"[\\`*_\[\]<>|~&#@$]")
_OPENS_A_LIST = re.compile(r"^(\d+(?=[.)](\s|$))|(?=[-+]))(.)")
# Names, issues, addresses and emojis are seen by GitHub in the finished text, where a backslash is no longer.
_REFERS = re.compile(r"[@#](?=\w)|\bGH-(?=\d)|:(?=//|[a-z+-][\w+-]*:)|\bwww\.(?=\w)", re.IGNORECASE)
_BREAK = "\u200b"  # of no width


def verdict_markdown(evidence: Evidence, known: Known | None = None) -> str:
    """Return the verdict with its reasons and causes, what was measured in tables, and what it was measured with.

    Whatever users' text holds, it is shown as text: it makes no markup, notifies nobody and refers to no issue.
    """
    result = decided(evidence, known)
    measured, *reasons = result.reasons
    in_table = {suite_text(suite) for suite in evidence.general.suites} if evidence.general else set()
    blocks = [
        f"## {headline(result)}: {plain(evidence.project)}",
        plain(measured),
        _list([plain(reason) for reason in reasons if reason not in in_table]),
        "Why, as far as it can be known:" if result.causes else "",
        _list([plain(cause_text(cause)) for cause in result.causes]),
        _arms(evidence),
        _contrasts(evidence),
        _suites(evidence.general.suites) if evidence.general else "",
        plain(noise_line(evidence.noise_floor)) if evidence.noise_floor else "",
        _made_with(evidence),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def plain(text: str) -> str:
    """``text`` on one line, as markdown that shows it as it is.

    Markup is escaped; a break of no width keeps GitHub from seeing a name, an issue or an address; and control
    characters, which could turn the line's direction, become the replacement character.
    """
    line = " ".join(text.split())
    line = "".join("\ufffd" if unicodedata.category(each) in {"Cc", "Cf", "Cs"} else each for each in line)
    line = _MARKUP.sub(r"\\\g<0>", _REFERS.sub(rf"\g<0>{_BREAK}", line))
    return _OPENS_A_LIST.sub(r"\1\\\3", line)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are markdown already; all but the first column stand to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def _arms(evidence: Evidence) -> str:
    head = ["Arm"]
    for metric in metric_order(evidence):
        head += [plain(metric_label(metric)), "95% interval"]
    return _table([*head, "Prompt tokens"], [_arm(evidence, arm) for arm in evidence.arms])


def _arm(evidence: Evidence, arm: Arm) -> list[str]:
    cells = [plain(arm.name)]
    for metric in metric_order(evidence):
        score = arm.score(metric)
        percent = "%" if evidence.metrics[metric].kind == "right or wrong" else ""
        cells += [f"{100 * score.value:.1f}{percent}", _interval(score.interval)]
    return [*cells, f"{arm.prompt_tokens:.0f}"]


def _contrasts(evidence: Evidence) -> str:
    head = ("Contrast", "Metric", "Points", "95% interval", "p", "p, Holm", "Better", "Worse")
    return _table(head, [_contrast(evidence, contrast) for contrast in evidence.contrasts])


def _contrast(evidence: Evidence, contrast: Contrast) -> list[str]:
    name = plain(f"{contrast.treatment} − {contrast.control}")
    return [
        f"**{name}**" if contrast is evidence.contrasts[0] else name,
        plain(metric_label(contrast.metric)),
        points_text(contrast.difference),
        f"{points_text(contrast.interval.low)} to {points_text(contrast.interval.high)}",
        _p_value(contrast.p_value),
        "" if contrast.p_adjusted is None else _p_value(contrast.p_adjusted),
        f"{contrast.fixed}",
        f"{contrast.broken}",
    ]


def _p_value(p_value: float) -> str:
    return plain(p_text(p_value).removeprefix("p ").removeprefix("= "))


def _suites(suites: Sequence[Suite]) -> str:
    if not suites:
        return ""
    head = ("What the base could do before", "Items", "Off", "On", "Worse by", "At most (95%)", "Margin", "Result")
    return _table(head, [_suite(suite) for suite in suites])


def _suite(suite: Suite) -> list[str]:
    def amount(value: float) -> str:
        return f"{value:.3f} nats" if suite.unit == "nats per token" else f"{round(100 * value, 1) + 0.0:.1f}"

    return [
        plain(suite.name),
        f"{suite.items:,}",
        amount(suite.base),
        amount(suite.tuned),
        amount(suite.drop),
        amount(suite.limit),
        "none" if suite.margin is None else amount(suite.margin),
        plain(suite_result(suite)),
    ]


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _made_with(evidence: Evidence) -> str:
    """Return what the comment can be checked against: the evidence's id, and digests of what it was measured with."""
    lineage = evidence.lineage
    told = [f"Evidence {plain(evidence.id)}"]
    for name in ("created", "dataset", "base", "adapter"):
        value = lineage.get(name)
        digest = value.get("digest") if isinstance(value, dict) else value
        if isinstance(digest, str):
            told.append(f"{name} {plain(digest if name == 'created' else digest[:12])}")
    if evidence.engine is not None:
        told.append(f"engine {plain(evidence.engine.text)}")
    return f"{', '.join(told)}; margin {100 * evidence.margin:g} points."
