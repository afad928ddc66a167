"""Blind review of the answers of an adapter in the shadow."""

from __future__ import annotations

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.serving.shadow_review import ShadowReview
from tunewright.studio.pages.compare import taken_back
from tunewright.studio.visit import Handlers, Visit, path_of, verdict_of


def shadow_page(visit: Visit) -> Response:
    """Show the next pair of answers that differ."""
    blind, alias = _review(visit), visit.place["alias"]
    return visit.page(
        "compare.html.j2",
        f"Shadow of {alias}",
        path=path_of("deploy", alias, "review"),
        shadow=alias,
        progress=blind.progress,
        keys=blind.verdict_keys,
        pair=blind.next(),
        result=None,
    )


def judge_shadow_pair(visit: Visit) -> Response:
    """Record a verdict, or take the latest one back."""
    blind, action = _review(visit), visit.form.get("action", "")
    back = path_of("deploy", visit.place["alias"], "review")
    if action == "undo":
        return visit.go(back, taken_back(blind))
    pair = blind.next()
    if pair is None or pair.key != visit.form.get("key"):
        return visit.go(back, "That pair was judged or deleted meanwhile. Nothing was recorded for it now.")
    try:
        blind.judge(pair, verdict_of(blind, action))
    except UserError as error:  # the request was deleted between the two
        return visit.go(back, str(error))
    return visit.go(back)


def _review(visit: Visit) -> ShadowReview:
    """Return the session's pass over the shadow, with the requests that have come since."""
    alias, reviewer = visit.place["alias"], visit.session.reviewer
    newest = visit.project.releases(alias)[-1].number
    # Texts are read again only after new pairs have come, because each reading is in the audit log.
    deciding = newest, visit.project.shadow.status(alias).pairs
    found: ShadowReview = visit.cache.once(
        ("shadow", alias, reviewer), deciding, lambda: visit.project.shadow.review(alias, reviewer=reviewer)
    )
    found.refresh()
    return found


HANDLERS: Handlers = {
    ("GET", "/deploy/{alias}/review"): shadow_page,
    ("POST", "/deploy/{alias}/review"): judge_shadow_pair,
}
