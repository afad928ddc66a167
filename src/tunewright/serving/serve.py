"""Setup of a server: adapters, base quantization and authentication."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.lineage import SystemPrompt, system_prompt
from tunewright.adapters.registry import Adapter, adapter_digest, find_adapter
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.evidence.files import evidence_on
from tunewright.open_project import OpenProject
from tunewright.serving.options import EngineOptions, ServeOptions
from tunewright.serving.project_state import (
    adapter_of,
    all_served,
    choose_served,
    missing_evidence,
    open_state,
    refuse_names,
    released,
    require_held,
    served_grammar,
)

if TYPE_CHECKING:
    from tunewright.gate.results import IsolationResult
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
    rules = _constraints(project, folders) if options.constrain else {}
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

    The prompts are dev items of the current version, if there is one, and general questions. With ``serve.engines``
    each engine is tested; the result is that of the first one that is not isolated, or of the last one. Of the options,
    only the engine has an effect.

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


def _constraints(project: OpenProject, folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the rule of each adapter's answers, with a warning for each that was not evaluated with it."""
    grammar = served_grammar(project)
    for name, folder in folders.items():
        evidence = evidence_on(project.folder.evaluations, adapter_digest(folder), project.reporter)
        if missing := missing_evidence(name, evidence, grammar):
            project.reporter.warn(f"{missing}. Its answers are constrained all the same.")
    return dict.fromkeys(folders, grammar.rule)


def _share_one_arena() -> None:
    """Let all threads allocate from one arena of glibc's.

    By default each thread has its own, and memory that it frees there is of no use to the others. After half an hour
    of mixed load, these arenas held 10 MB of free memory (docs/benchmarks/soak.md). Small blocks are still cached by
    thread.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # neither musl nor macOS has it
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

    served = TenantSource(state, locate, {adapter.name: adapter.folder for adapter in trained})
    return Service(config, project.base, project.chat, held, served, project.reporter)


def _require_private(host: str, who: str, where: str, fix: str) -> None:
    """Refuse to answer everyone on an address that other machines can reach."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return  # not an address; binding to it reports the error
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        raise UserError(f"Other machines can reach {host}, and {who} answers all of them", where=where, fix=fix)
