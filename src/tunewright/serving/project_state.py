"""A project's serving state, the adapters that a server of it may hold, and the constraint of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.import_options import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters, require_compatible, trained_quantization
from tunewright.adapters.trust import require_trusted
from tunewright.adapters.vllm_compat import require_batchable
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.evidence.schema import Evidence
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.chat.call_grammar import CallGrammars
    from tunewright.generation.constraints import Grammar
    from tunewright.serving.tenants import State


def has_state(project: OpenProject) -> bool:
    """Return whether there is a serving state to read."""
    from tunewright.serving.tenants import exists

    named = project.folder.config.serve.database_url
    return project.folder.serving_state.exists() if named is None else exists(named)


def open_state(project: OpenProject, *, make: bool = False, serving: bool = False) -> State:
    """Return the serving state, which the caller closes. The project's own state is created if it is missing.

    Args:
        make: also create a state elsewhere. Otherwise a mistyped path would become an empty state.
        serving: open it for a server, whose requests wait for no slow statement.

    Raises:
        UserError: the database is missing, unreachable, or of a newer tunewright.
    """
    from tunewright.serving.tenants import State, exists

    named = project.folder.config.serve.database_url
    url = named or f"sqlite:///{project.folder.serving_state.resolve()}"
    if named is not None and not exists(named):
        if not make:
            fix = "Check the path, or create a state there with `tunewright tenant add` or `tunewright deploy`."
            raise UserError("There is no serving state", where=named, fix=fix)
        project.reporter.say(f"Creating a serving state: {named}")
    return State(url, current_author(project.folder.root), serving=serving)


def all_served(project: OpenProject, names: Sequence[str] = ()) -> tuple[Quantization, dict[str, Path], int]:
    """Return the base's quantization, the adapters that a server holds by name, and the number of further ones."""
    config = project.folder.config
    if config.serve.database_url is not None or project.folder.serving_state.exists():
        with open_state(project) as state:
            if state.tenants.any():
                refuse_names(names)
                held, live = released(project, state)
                return held, {adapter.name: adapter.folder for adapter in live}, config.serve.spare_adapters
    return *choose_served(project, names), 0


def choose_served(project: OpenProject, names: Sequence[str]) -> tuple[Quantization, dict[str, Path]]:
    """Return the base's quantization, and the folders of the named adapters (default: all that fit) by name."""
    config = project.folder.config
    if not names:
        held = config.serve.quantization or config.train.quantization
        return held, {adapter.name: adapter.folder for adapter in _servable_adapters(project, held)}
    folders: dict[str, Path] = {}
    named: list[Adapter] = []
    for name in names:
        adapter_name, _, step = name.partition("@")
        adapter = find_adapter(project.folder.adapters, adapter_name)
        require_servable(project, adapter)
        named.append(adapter)
        if step:
            adapter.verify(step)
            folders[f"{adapter.name}@{step}"] = adapter.checkpoint(step)
        else:
            folders[adapter.name] = adapter.folder
    return config.serve.quantization or trained_quantization(named), folders


def _servable_adapters(project: OpenProject, held: Quantization) -> Iterator[Adapter]:
    """Yield the adapters that fit the base with this quantization, with a warning for each other adapter."""
    for adapter in list_adapters(project.folder.adapters):
        try:
            require_servable(project, adapter)
        except UserError as error:
            project.reporter.warn(f"{adapter.name} is not served: {error.what}")
            continue
        trained = trained_quantization([adapter])
        if project.folder.config.serve.quantization is None and trained != held:
            project.reporter.warn(
                f"{adapter.name} is not served: it was trained with train.quantization {trained}, and the base is "
                f"held with {held}; name it to serve it, or set serve.quantization"
            )
            continue
        yield adapter


def released(project: OpenProject, state: State) -> tuple[Quantization, list[Adapter]]:
    """Return the base's quantization for the live releases, and those of their adapters that exist here."""
    adapters = []
    for release in state.releases.live().values():
        try:
            adapters += [adapter_of(project, name, digest) for name, digest in release.adapters]
        except UserError as error:  # the server reports it again and continues without this release
            project.reporter.warn(f"{release.alias}: {error}")
    config = project.folder.config
    return config.serve.quantization or (
        trained_quantization(adapters) if adapters else config.train.quantization
    ), adapters


def adapter_of(project: OpenProject, name: str, digest: str) -> Adapter:
    """Return a release's adapter by its digest; one that is missing here is imported from ``serve.adapter_store``.

    Args:
        name: its name in the store, else only for display.
    """
    known = [adapter for adapter in list_adapters(project.folder.adapters) if adapter.digest == digest]
    # Two folders with the same weights may differ in their system prompt; prefer the name that was released.
    found = next((adapter for adapter in known if adapter.name == name), known[0] if known else None)
    if found is None:
        found = _from_store(project, name)
    if found is None or found.digest != digest:
        raise UserError(
            f"The released adapter {name} ({digest[:12]}) is missing",
            where=project.folder.config.serve.adapter_store or str(project.folder.adapters),
            fix="Copy its folder here from where it was trained, or set serve.adapter_store to a URL that has it.",
        )
    return found


def _from_store(project: OpenProject, name: str) -> Adapter | None:
    """Import an adapter from the store; None without a store."""
    url = project.folder.config.serve.adapter_store
    if url is None:
        return None
    from tunewright.adapters.foreign.importer import import_adapter
    from tunewright.core.remote_files import RemoteFiles

    project.reporter.say(f"Importing {name} from {url}")
    source = RemoteFiles(f"{url.rstrip('/')}/{name}")
    return import_adapter(project, source, ImportOptions(), by=None).adapter


def require_held(project: OpenProject, adapter: Adapter, held: Quantization) -> None:
    """Check that an adapter fits the base that is in memory."""
    require_servable(project, adapter)
    trained = trained_quantization([adapter])
    if project.folder.config.serve.quantization is None and trained != held:
        raise UserError(
            f"The adapter was trained with train.quantization {trained}, but this server holds the base with {held}",
            where=adapter.name,
            fix="Restart the server, or set serve.quantization.",
        )


def require_servable(project: OpenProject, adapter: Adapter) -> None:
    """Refuse an adapter that does not fit the base, that engines cannot batch, or that is not trusted."""
    require_compatible(adapter, project.base, project.chat)
    require_batchable(adapter.folder)
    require_trusted(adapter, TrustedKeys(project.folder.keys))


def refuse_names(names: Sequence[str]) -> None:
    """Refuse adapter names if there are tenants."""
    if names:
        raise UserError(
            "Tenants request aliases, not adapters",
            where=" ".join(names),
            fix="Name no adapters: releases decide what is served (`tunewright deploy ALIAS ADAPTER`).",
        )


def served_grammar(project: OpenProject) -> Grammar | CallGrammars:
    """Return the config's constraint, which the base can be constrained by."""
    from tunewright.chat.answers import grammar_compiler
    from tunewright.evaluation.answer_constraints import grammar_of
    from tunewright.generation.constraints import Grammar

    grammar = grammar_of(project.folder)
    if grammar is None:
        raise UserError(
            "The config has no constraint",
            where="--constrain",
            fix="Set evaluate.structured_outputs, and evaluate the adapter with it.",
        )
    if isinstance(grammar, Grammar):
        grammar_compiler(project.chat).compile(grammar)
    else:
        project.chat.tool_form  # noqa: B018 - it raises
    return grammar


def missing_evidence(name: str, evidence: Evidence | None, grammar: Grammar | CallGrammars) -> str | None:
    """Return why an adapter's evidence does not cover the constraint; None if it does."""
    arms = [] if evidence is None else [arm for arm in evidence.arms if arm.kind == "tuned" and arm.constrained]
    if evidence is None or not arms:
        return f"{name} has no evidence with constrained answers"
    if evidence.lineage.get("grammar") != grammar.digest:
        return f"{name} was evaluated with another constraint than evaluate.structured_outputs has now"
    return None
