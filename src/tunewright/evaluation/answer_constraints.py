"""Constraints of constrained answers: one grammar for all rows, or the calls of each row's functions."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_length, grammar_compiler
from tunewright.chat.call_grammar import CallGrammars, call_grammar
from tunewright.chat.tool_calls import declared_functions
from tunewright.config.project import ProjectFolder
from tunewright.data.examples import Example, Message
from tunewright.generation.constraints import Constraint, Grammar, GrammarCompiler

_MOST = 512
"""Compiled grammars that are kept."""


def grammar_of(project: ProjectFolder) -> Grammar | CallGrammars | None:
    """Return the grammar of the project's constrained answers."""
    constrain = project.config.evaluate.structured_outputs
    if constrain is None:
        return None
    return CallGrammars(constrain.tools) if constrain.tools else Grammar.from_config(constrain, project.root)


class AnswerConstraints:
    """Compiled grammars for one base."""

    def __init__(self, chat: ChatFormat, grammar: Grammar | CallGrammars) -> None:
        self._chat = chat
        self._grammar = grammar
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return grammar_compiler(self._chat)

    @cached_property
    def _shared(self) -> Constraint:
        assert isinstance(self._grammar, Grammar)
        return self._compiler.compile(self._grammar)

    def of_row(self, functions: Message | None) -> Constraint | None:
        """Return the constraint on a row's answer.

        ``functions`` is the row's message of role ``tools``; without it calls are not constrained (None).
        """
        if isinstance(self._grammar, Grammar):
            return self._shared
        if functions is None:
            return None
        if functions.content not in self._compiled:
            grammar = call_grammar(self._chat, declared_functions([functions]), self._grammar.choice)
            self._compiled[functions.content] = self._compiler.compile(grammar)
            if len(self._compiled) > _MOST:
                self._compiled.popitem(last=False)
        return self._compiled[functions.content]

    def allow(self, example: Example) -> bool:
        """Return whether a constrained answer can equal the example's ideal output."""
        if isinstance(self._grammar, Grammar):
            return self._shared.matches(example.output)
        first = example.messages[0]
        constraint = self.of_row(first if first.role == "tools" else None)
        if constraint is None:
            return True
        row = self._chat.encode(example.messages)
        answer = row.ids[-answer_length(row.loss_mask) :]
        return constraint.accepts([token for token in answer if token not in self._chat.stop_ids])
