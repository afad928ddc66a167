"""Parity of an artifact with the trained model: figures and limits.

Every artifact answers the same held-out prompts as the trained model (the base as quantized in training, with the
adapter). It also scores the trained model's answers token by token. Only rounding may differ.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunewright.config import MetricName
from tunewright.evidence.common import Part
from tunewright.metrics import score_text
from tunewright.render.blocks import Block, Lead, table

TOP = 100
"""The trained model's likeliest tokens at a place whose log-probabilities are compared. No decoding reaches the tokens
below them, and engines list only a limited number.
"""

Precision = Literal["16-bit", "8-bit", "fp8", "5-bit", "4-bit"]


class Figures(Part):
    """Measurements of an artifact against the trained model."""

    prompts: Annotated[int, Field(description="Held-out prompts that were answered.")]
    places: Annotated[int, Field(description="Places of the trained model's answers at which distributions compare.")]
    arithmetic: Annotated[str, Field(description="Device and precision of the artifact.")]
    max_logit: Annotated[
        float,
        Field(description="Largest change of a log-probability, among the 100 likeliest tokens of each place."),
    ]
    kl: Annotated[float, Field(description="Mean KL divergence from the trained model to the artifact, nats.")]
    effect: Annotated[float, Field(description="The same from the trained model to its base: what the adapter does.")]
    lost: Annotated[
        float, Field(description="kl / effect: 0 where both agree, 1 for the base itself, or of no effect at all.")
    ]
    from_base: Annotated[float, Field(description="The same from the base to the artifact.")]
    top1: Annotated[float, Field(description="Share of the places at which both find the same token likeliest.")]
    greedy: Annotated[float, Field(description="Share of the prompts with the same greedy answer, token by token.")]
    metric: MetricName
    score: Annotated[float, Field(description="The artifact's score by the config's metric on these prompts.")]
    trained_score: Annotated[float, Field(description="The trained model's.")]
    rendered: Annotated[int, Field(description="Prompts that the artifact itself renders to the ids of training.")]
    functions: Annotated[
        int, Field(description="Conversations with function calls and results that were rendered as well.")
    ] = 0
    functions_rendered: Annotated[int, Field(description="Those rendered to the ids of training.")] = 0


class Limits(Part):
    """Limits of the differences from the trained model; docs/how-to/export.md has the reasons."""

    max_logit: float
    kl: float
    lost: float
    top1: float
    greedy: float
    score: float


EFFECT = 1e-3
"""Nats: an adapter that changes the base's distributions by less has no effect that could be lost or kept."""

FEW = 2
"""Number of places, or prompts, that may differ in any case: one near tie in 30 places is already 3%."""

LIMITS: dict[Precision, Limits] = {
    "16-bit": Limits(max_logit=1.0, kl=0.002, lost=0.02, top1=0.98, greedy=0.9, score=0.05),
    "8-bit": Limits(max_logit=3.0, kl=0.02, lost=0.05, top1=0.95, greedy=0.8, score=0.1),
    # A number in FP8 has 3 bits after the first, so that single log-probabilities move as far as with 5-bit integers.
    "fp8": Limits(max_logit=6.0, kl=0.02, lost=0.05, top1=0.95, greedy=0.8, score=0.1),
    "5-bit": Limits(max_logit=5.0, kl=0.05, lost=0.08, top1=0.9, greedy=0.7, score=0.1),
    "4-bit": Limits(max_logit=8.0, kl=0.1, lost=0.1, top1=0.85, greedy=0.6, score=0.1),
}


def shortcomings(figures: Figures, limits: Limits) -> list[str]:
    """Return why an artifact fails, one sentence each; empty if it passes."""
    found = []
    if figures.effect < EFFECT:
        found.append(
            f"the adapter has no effect on these prompts (KL from the base {figures.effect:.1e} nats; at least "
            f"{EFFECT:g} needed)"
        )
    elif figures.lost > limits.lost:
        found.append(
            f"it lost {100 * figures.lost:.1f}% of the adapter's effect (KL {figures.kl:.2g} of {figures.effect:.2g} "
            f"nats; {100 * limits.lost:g}% allowed)" + (": it is the base" if figures.from_base < EFFECT else "")
        )
    if figures.kl > limits.kl:
        found.append(f"mean KL {figures.kl:.2g} nats, {limits.kl:g} allowed")
    if figures.max_logit > limits.max_logit:
        found.append(f"a log-probability moved by {figures.max_logit:.2f}, {limits.max_logit:g} allowed")
    if _too_many(figures.top1, limits.top1, figures.places):
        found.append(f"the likeliest token is the same at {100 * figures.top1:.1f}%, {100 * limits.top1:g}% needed")
    if _too_many(figures.greedy, limits.greedy, figures.prompts):
        found.append(f"{100 * figures.greedy:.1f}% of the greedy answers are the same, {100 * limits.greedy:g}% needed")
    if figures.trained_score - figures.score > limits.score:
        own, trained = (score_text(figures.metric, score) for score in (figures.score, figures.trained_score))
        found.append(f"it scores {own} where the trained model scores {trained}")
    if figures.rendered < figures.prompts:
        found.append(
            f"it renders {figures.prompts - figures.rendered} of {figures.prompts} prompts to other tokens than "
            "training did"
        )
    if figures.functions_rendered < figures.functions:
        found.append(
            f"it renders {figures.functions - figures.functions_rendered} of {figures.functions} conversations with "
            "functions to other tokens than training would"
        )
    return found


def _too_many(same: float, needed: float, of: int) -> bool:
    """Return whether more differ than allowed."""
    return round((1 - same) * of) > max((1 - needed) * of, FEW)


def figures_blocks(found: Figures, limits: Limits) -> tuple[Block, ...]:
    """Return the figures next to their limits."""
    own, trained = (score_text(found.metric, score) for score in (found.score, found.trained_score))
    rows = [
        ("mean KL, nats", f"{found.kl:.2g}", f"{limits.kl:g}"),
        ("of the adapter's effect lost", f"{100 * found.lost:.2g}%", f"{100 * limits.lost:g}%"),
        ("largest change of a log-probability", f"{found.max_logit:.2g}", f"{limits.max_logit:g}"),
        ("same likeliest token", f"{100 * found.top1:.1f}%", f"{100 * limits.top1:g}%"),
        ("same greedy answer", f"{100 * found.greedy:.1f}%", f"{100 * limits.greedy:g}%"),
        ("score", own, f"{trained} - {100 * limits.score:g}"),
        ("prompts rendered as in training", f"{found.rendered}", f"{found.prompts}"),
    ]
    if found.functions:
        rows.append(("conversations with functions, likewise", f"{found.functions_rendered}", f"{found.functions}"))
    rows.append(("KL from the base, nats", f"{found.from_base:.2g}", ""))
    title = f"Compared with the trained model on {found.prompts} dev prompts ({found.places} answer tokens)"
    return Lead(title), table(title, ("", "Measured", "Allowed"), rows)
