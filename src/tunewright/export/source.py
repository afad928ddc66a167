"""The adapter that is exported, with everything in its project that decides the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.adapters.compatibility import require_compatible
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.system_prompt import SystemPrompt, system_prompt
from tunewright.data.examples import Message
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.open_project import OpenProject


@dataclass(frozen=True)
class Source:
    """An adapter of an open project, to be exported."""

    project: OpenProject
    adapter: Adapter

    @classmethod
    def find(cls, project: OpenProject, adapter: str | None) -> Source:
        """Return an adapter by its name or the beginning of it; None: the newest.

        Raises:
            UserError: no such adapter, or it does not fit the base or the chat format.
        """
        found = find_adapter(project.folder.adapters, adapter)
        require_compatible(found, project.base, project.chat)
        return cls(project, found)

    @cached_property
    def version(self) -> DatasetVersion:
        """The version that the adapter was trained on; of a foreign adapter, whose data is unknown, the current one,
        whose prompts serve as well to compare an artifact with the trained model."""
        return load_version(self.project.folder.dataset, self.adapter.dataset)

    @cached_property
    def system_prompt(self) -> SystemPrompt:
        """The adapter's trained system prompt, or the reason for its absence."""
        return system_prompt(self.adapter, self.project.folder.dataset)

    @property
    def dev_prompts(self) -> list[Sequence[Message]]:
        """The dev prompts of the adapter's dataset; none if its dataset is unknown."""
        if "dataset" not in self.adapter.lineage:
            return []
        return [member.example.prompt for member in self.version.domain_of("dev")]

    def target(self, what: str, to: str | Path | None) -> Path:
        """Return the folder to create: ``to``, or one in the project's exports."""
        return self.project.folder.exports / f"{self.adapter.name}-{what}" if to is None else Path(to).expanduser()

    def inputs(self, kind: str, **settings: Any) -> dict[str, Any]:
        """Return the inputs that determine the artifact."""
        system = self.system_prompt.text
        return {
            **({} if system is None else {"system_prompt": system}),
            "adapter": self.adapter.digest,
            "base": self.project.base.digest,
            "template": self.project.chat.digest,
            "dataset": self.adapter.dataset or self.version.digest,
            "kind": kind,
            **settings,
        }

    def notes(self, *, template: bool = True) -> tuple[str, ...]:
        """Return notes on precision and system prompt; ``template``: the artifact includes a chat template."""
        foreign = (
            ()
            if "config" in self.adapter.lineage
            else ("bfloat16 is assumed: the adapter's lineage does not name the precision of its training",)
        )
        prompt = self.system_prompt
        if prompt.text is not None and template:
            note = f"its chat template adds the trained system prompt if there is no other: {prompt.shown}"
        elif prompt.text is not None:
            note = f"the adapter's file alone has no system prompt: send the trained one: {prompt.text}"
        elif prompt.why_none is not None:
            note = f"no system prompt is written into it: {prompt.why_none}"
        else:
            return foreign
        return (*foreign, note)
