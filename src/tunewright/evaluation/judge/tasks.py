"""The items' tasks in the form that the judge and other models receive, from the evaluated dataset version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.versions import load_version
from tunewright.evaluation.judge.replies import Conversation
from tunewright.evidence.schema import Evidence, Item


def test_prompts(dataset: Path, evidence: Evidence, items: Sequence[Item]) -> list[Conversation]:
    """Return each item's chat prompt: its messages up to the answer, the system prompt included.

    Raises:
        UserError: the evaluated dataset version is missing.
    """
    messages = _messages(dataset, evidence)
    return [tuple({"role": m.role, "content": m.content} for m in messages[item.key]) for item in items]


def with_tasks(dataset: Path, evidence: Evidence, items: Sequence[Item], reporter: Reporter) -> list[Item]:
    """Return the items with the system prompt in their input, or unchanged if the dataset is missing."""
    try:
        messages = _messages(dataset, evidence)
    except UserError as error:
        reporter.warn(
            f"The judge gets each item's input without a system prompt, since the rows are not here ({error.what}); "
            "judge.criteria can say what the task is."
        )
        return list(items)
    return [item.model_copy(update={"input": task_text(messages[item.key])}) for item in items]


def task_text(messages: Sequence[Message]) -> str:
    """Return a prompt as one text, with speakers named where they are not obvious."""
    if [message.role for message in messages if message.role != "system"] == ["user"]:
        return "\n\n".join(message.content for message in messages)
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def _messages(dataset: Path, evidence: Evidence) -> dict[str, tuple[Message, ...]]:
    version = load_version(dataset, str(evidence.lineage["dataset"]))
    return {member.key: member.example.prompt for member in version.domain}
