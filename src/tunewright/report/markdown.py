"""The verdict as GitHub Markdown for a pull request comment: a pure function of the evidence."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tunewright.evidence.benchmarks import Suite, suite_text
from tunewright.evidence.causes import ProjectFacts, decided
from tunewright.evidence.common import Interval
from tunewright.evidence.replacement import Replacement
from tunewright.evidence.schema import Arm, Contrast, Evidence
from tunewright.metrics import metric_label, p_text, points_text
from tunewright.report.text import cause_text, headline, metric_order, noise_line, suite_result

_MARKUP = re.compile(r"[\\`*_\[\]<>|~&#@$]")
_OPENS_A_LIST = re.compile(r"^(\d+(?=[.)](\s|$))|(?=[-+]))(.)")
# GitHub detects mentions, issues, addresses and emojis in the rendered text, where backslash escapes no longer
# show.
_REFERS = re.compile(r"[@#](?=\w)|\bGH-(?=\d)|:(?=//|[a-z+-][\w+-]*:)|\bwww\.(?=\w)", re.IGNORECASE)
_BREAK = "\u200b"  # zero width


def verdict_markdown(evidence: Evidence, known: ProjectFacts | None = None) -> str:
    """Return the verdict with its reasons, causes and measurements, and the inputs of the evaluation.

    Text from users is always shown literally: it cannot add markup, notify anybody or link to an issue.
    """
    result = decided(evidence, known)
    measured, *reasons = result.reasons
    in_table = {suite_text(suite) for suite in evidence.regressions.suites} if evidence.regressions else set()
    blocks = [
        f"## {headline(result)}: {plain(evidence.project)}",
        plain(measured),
        bullets([plain(reason) for reason in reasons if reason not in in_table]),
        "Known causes:" if result.causes else "",
        bullets([plain(cause_text(cause)) for cause in result.causes]),
        *(incumbent_block(each) for each in result.replacements),
        arms_table(evidence),
        contrasts_table(evidence),
        suites_table(evidence.regressions.suites) if evidence.regressions else "",
        plain(noise_line(evidence.noise_floor)) if evidence.noise_floor else "",
        _made_with(evidence),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def plain(text: str) -> str:
    """Return ``text`` on one line, escaped so that Markdown shows it literally.

    Markup is escaped. A zero-width space keeps GitHub from detecting a mention, an issue or an address. Control
    characters, which could reverse the line's direction, become the replacement character.
    """
    line = " ".join(text.split())
    line = "".join("\ufffd" if unicodedata.category(each) in {"Cc", "Cf", "Cs"} else each for each in line)
    line = _MARKUP.sub(r"\\\g<0>", _REFERS.sub(rf"\g<0>{_BREAK}", line))
    return _OPENS_A_LIST.sub(r"\1\\\3", line)


def bullets(lines: Sequence[str]) -> str:
    """Return a list of lines that are Markdown already."""
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already; all columns but the first are right-aligned."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def incumbent_block(replacement: Replacement) -> str:
    """Return the outcome for one incumbent with its reasons."""
    head = f"**Incumbent {plain(replacement.incumbent.name)}: {replacement.outcome}**"
    return "\n\n".join([head, bullets([plain(reason) for reason in replacement.reasons])])


def arms_table(evidence: Evidence) -> str:
    """Return each arm's scores with their intervals."""
    head = ["Arm"]
    for metric in metric_order(evidence):
        head += [plain(metric_label(metric)), "95% interval"]
    return table([*head, "Prompt tokens"], [_arm(evidence, arm) for arm in evidence.arms])


def _arm(evidence: Evidence, arm: Arm) -> list[str]:
    cells = [plain(arm.name)]
    for metric in metric_order(evidence):
        score = arm.score(metric)
        percent = "%" if evidence.metrics[metric].kind == "right or wrong" else ""
        cells += [f"{100 * score.value:.1f}{percent}", _interval(score.interval)]
    return [*cells, f"{arm.prompt_tokens:.0f}"]


def contrasts_table(evidence: Evidence) -> str:
    """Return the differences of arms; the first one decides."""
    head = ("Contrast", "Metric", "Points", "95% interval", "p", "p, Holm", "Better", "Worse")
    return table(head, [_contrast(evidence, contrast) for contrast in evidence.contrasts])


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


def suites_table(suites: Sequence[Suite]) -> str:
    """Return the regression benchmarks; empty without any."""
    if not suites:
        return ""
    head = ("General ability", "Items", "Off", "On", "Worse by", "At most (95%)", "Margin", "Result")
    return table(head, [_suite(suite) for suite in suites])


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
    """Return the identifiers to check the comment against: the evidence's ID and digests of its inputs."""
    lineage = evidence.lineage
    parts = [f"Evidence {plain(evidence.id)}"]
    for name in ("created", "dataset", "base", "adapter"):
        value = lineage.get(name)
        digest = value.get("digest") if isinstance(value, dict) else value
        if isinstance(digest, str):
            parts.append(f"{name} {plain(digest if name == 'created' else digest[:12])}")
    if evidence.engine is not None:
        parts.append(f"engine {plain(evidence.engine.text)}")
    return f"{', '.join(parts)}; margin {100 * evidence.margin:g} points."
