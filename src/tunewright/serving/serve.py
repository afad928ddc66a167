"""A server of a project: its serving state, the adapters that it may hold, their constraint, and its setup."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lineage import SystemPrompt, system_prompt
from tunewright.adapters.lora_weights import require_batchable
from tunewright.adapters.registry import (
    Adapter,
    adapter_digest,
    find_adapter,
    list_adapters,
    require_compatible,
    require_trusted,
    trained_quantization,
)
from tunewright.config import Config, Quantization
from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.evidence.files import evidence_on
from tunewright.evidence.schema import Evidence
from tunewright.open_project import OpenProject
from tunewright.serving.options import EngineOptions, ServeOptions

if TYPE_CHECKING:
    from tunewright.chat.call_grammar import CallGrammars
    from tunewright.gate.results import IsolationResult
    from tunewright.generation.constraints import Grammar
    from tunewright.serving.engine_service import EngineService
    from tunewright.serving.gateway.auth import ServedAdapter
    from tunewright.serving.gateway.server import Service
    from tunewright.serving.tenants import State

_M_ARENA_MAX = -8  # of glibc's malloc.h


def serve(project: OpenProject, adapters: Sequence[str] = (), options: ServeOptions = ServeOptions()) -> Service:
    """Return a server, loaded but not yet started.

    Without tenants it serves the base and the adapters (by default all that fit the base) to this machine, without
    keys. ``NAME@step-N`` is an earlier checkpoint. Named adapters decide if the base is quantized, as they were
    trained on it, unless ``serve.quantization`` is set; otherwise the config decides.

    With tenants it answers only their API keys, from the releases of their aliases.

    Args:
        adapters: names; empty with tenants.
        options: override the config. With tenants, each release has its own constraint and system prompt.

    Raises:
        UserError: a named adapter does not fit the base or the other adapters, or the address can be reached from
            other machines without tenants. With ``constrain``: the config has no constraint.
    """
    config = project.folder.config
    names = ("host", "port", "metrics_port", "metrics_host", "engine")
    own = {name: value for name in names if (value := getattr(options, name)) is not None}
    config = config.model_copy(update={"serve": config.serve.model_copy(update=own)})
    _share_one_arena()
    if config.serve.database_url is not None or project.folder.serving_state.exists():
        state = open_state(project, serving=True)
        try:
            if state.tenants.any():
                if not options.auth:
                    raise UserError("Tenants exist, so every request needs an API key", where="--no-auth")
                if not options.system_prompts:
                    raise UserError(
                        "Tenants exist, so each release sets whether its system prompt is added",
                        where="--no-system-prompt",
                        fix="Use `tunewright deploy ALIAS ADAPTER --no-system-prompt`.",
                    )
                if options.constrain:
                    raise UserError(
                        "Tenants exist, so each release sets whether its answers are constrained",
                        where="--constrain",
                        fix="Use `tunewright deploy ALIAS ADAPTER --constrain`.",
                    )
                return _for_tenants(project, state, adapters, config)
        except BaseException:
            state.close()
            raise
        state.close()
    if options.auth:
        fix = "Add a tenant with `tunewright tenant add NAME`, or allow all requests with --no-auth."
        _require_private(config.serve.host, "without tenants the server", "serve.host", fix)
    from tunewright.serving.gateway.auth import ServedAdapter
    from tunewright.serving.gateway.server import Service

    held, folders = choose_served(project, adapters)
    if not folders:
        project.reporter.warn("There is no adapter that fits the base: only the base is served.")
    rules: dict[str, str] = {}
    if options.constrain:
        grammar = served_grammar(project)
        for name, folder in folders.items():
            evidence = evidence_on(project.folder.evaluations, adapter_digest(folder), project.reporter)
            if missing := missing_evidence(name, evidence, grammar):
                project.reporter.warn(f"{missing}. Its answers are constrained all the same.")
        rules = dict.fromkeys(folders, grammar.rule)
    served = {}
    for name, folder in folders.items():
        prompt = system_prompt(Adapter(project.folder.adapters / name.partition("@")[0]), project.folder.dataset)
        if prompt.text is not None and not options.system_prompts:
            prompt = SystemPrompt(None, "left out by --no-system-prompt")
        served[name] = ServedAdapter(folder, prompt, rules.get(name))
    return Service(config, project.base, project.chat, held, served, project.reporter)


def self_test(
    project: OpenProject,
    adapters: Sequence[str] = (),
    options: ServeOptions = ServeOptions(),
) -> IsolationResult:
    """Run the isolation test on the base and the adapters that :meth:`serve` would serve.

    The prompts are dev items of the current version, if there is one, and general questions. With
    ``serve.engines`` each engine is tested; the result is from the first one that is not isolated,
    or else from the last one. Of the options, only the engine has an effect.

    Raises:
        UserError: as for :meth:`serve`, or no adapter.
    """
    from tunewright.gate.prompts import isolation_prompts
    from tunewright.serving.release_tests import IsolationRunner, engines_under_test

    config = project.folder.config
    held, folders, spare = all_served(project, adapters)
    prompts = isolation_prompts(project)
    for on in engines_under_test(project, held, options.engine or config.serve.engine):
        result = IsolationRunner(on, folders, spare).run(prompts)
        if on.remote is not None:
            project.reporter.say(f"{on.config.serve.engines[0]}: {result.verdict}")
        if result.verdict == "not isolated":
            break
    return result


def serve_engine(project: OpenProject, options: EngineOptions = EngineOptions()) -> EngineService:
    """Return one engine for servers on other machines, loaded but not yet started: see ``serve.engines``.

    It holds the adapters of all live releases; without tenants, all that fit the base.

    Raises:
        UserError: other machines can reach the address, and the environment has no token.
    """
    from tunewright.engines.remote import TOKEN
    from tunewright.serving.engine_service import EngineService

    if not os.environ.get(TOKEN):
        fix = f"Set {TOKEN} to the same secret here and for `tunewright serve`, such as `openssl rand -hex 32`."
        _require_private(options.host, "without a token the engine", "--host", fix)
    held, folders, _ = all_served(project)

    def locate(name: str, digest: str) -> Path:
        adapter_name, _, step = name.partition("@")
        if not step:
            adapter = adapter_of(project, name, digest)
        else:
            adapter = find_adapter(project.folder.adapters, adapter_name)
            adapter.verify(step)
        require_held(project, adapter, held)
        return adapter.checkpoint(step) if step else adapter.folder

    return EngineService(project, held, folders, locate, options)


def _share_one_arena() -> None:
    """Let all threads allocate from one arena of glibc's.

    By default each thread has its own, and other threads cannot use memory that is freed in it.
    After half an hour of mixed load, these arenas held 10 MB of free memory
    (docs/benchmarks/soak.md). Small blocks are still cached by thread.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # neither musl nor macOS has mallopt
        libc.mallopt(_M_ARENA_MAX, 1)


def _for_tenants(project: OpenProject, state: State, names: Sequence[str], config: Config) -> Service:
    refuse_names(names)
    held, trained = released(project, state)

    from tunewright.serving.gateway.auth import ServedAdapter

    def locate(name: str, digest: str) -> ServedAdapter:
        adapter = adapter_of(project, name, digest)
        require_held(project, adapter, held)
        return ServedAdapter(adapter.folder, system_prompt(adapter, project.folder.dataset))

    from tunewright.serving.gateway.server import Service, TenantSource
    from tunewright.serving.tenants.record_keys import KeyFile

    record_key = None
    if config.gateway.record:  # checked before the base is loaded, which takes minutes if it is large
        record_key = KeyFile(project.folder.record_key)
        state.records.require_keys(record_key)
    served = TenantSource(state, locate, {adapter.name: adapter.folder for adapter in trained}, record_key)
    return Service(config, project.base, project.chat, held, served, project.reporter)


def _require_private(host: str, who: str, where: str, fix: str) -> None:
    """Refuse to answer everyone on an address that other machines can reach."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return  # not an address; binding to it reports the error
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        raise UserError(f"Other machines can reach {host}, and {who} answers all of them", where=where, fix=fix)


def has_state(project: OpenProject) -> bool:
    """Return whether there is a serving state to read."""
    from tunewright.serving.tenants.database import exists

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
    from tunewright.serving.tenants import State
    from tunewright.serving.tenants.database import exists

    named = project.folder.config.serve.database_url
    url = named or f"sqlite:///{project.folder.serving_state.resolve()}"
    if named is not None and not exists(named):
        if not make:
            fix = "Check the path, or create a state there with `tunewright tenant add` or `tunewright deploy`."
            raise UserError("There is no serving state", where=named, fix=fix)
        project.reporter.say(f"Creating a serving state: {named}")
    return State(url, current_author(project.folder.root), project.clock, serving=serving)


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
    """Return the base's quantization for the live releases, and their adapters that exist here."""
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
    """Return a release's adapter by its digest; import a missing adapter from ``serve.adapter_store``."""
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
