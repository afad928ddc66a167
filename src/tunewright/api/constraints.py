"""The config's constraint where answers are served: what was evaluated constrained is served constrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunewright.api.context import ProjectContext
from tunewright.core.errors import UserError
from tunewright.evidence.schema import Evidence

if TYPE_CHECKING:
    from tunewright.chat.call_grammar import CallGrammars
    from tunewright.generation.constraints import Grammar


def served_grammar(opened: ProjectContext) -> Grammar | CallGrammars:
    """Return the config's constraint, which the base can be constrained by.

    Raises:
        UserError: the config has no constraint, it cannot be compiled, or the base has no form of calls.
    """
    from tunewright.chat.answers import grammar_compiler
    from tunewright.evaluation.answer_constraints import grammar_of
    from tunewright.generation.constraints import Grammar

    grammar = grammar_of(opened.folder)
    if grammar is None:
        raise UserError(
            "The config has no constraint",
            where="--constrain",
            fix="Set evaluate.structured_outputs, and evaluate the adapter with it.",
        )
    if isinstance(grammar, Grammar):
        grammar_compiler(opened.chat).compile(grammar)
    else:
        opened.chat.tool_form  # noqa: B018 - it raises
    return grammar


def missing_evidence(name: str, evidence: Evidence | None, grammar: Grammar | CallGrammars) -> str | None:
    """Return why an adapter's evidence does not cover the constraint; None if it does.

    Args:
        name: the adapter's.
        evidence: its newest.
        grammar: the constraint.
    """
    arms = [] if evidence is None else [arm for arm in evidence.arms if arm.kind == "tuned" and arm.constrained]
    if evidence is None or not arms:
        return f"{name} has no evidence with constrained answers"
    if evidence.lineage.get("grammar") != grammar.digest:
        return f"{name} was evaluated with another constraint than evaluate.structured_outputs has now"
    return None
