"""Setup of a server: adapters, base quantization and authentication."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.compatibility import require_compatible, trained_quantization
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.registry import Adapter, adapter_digest, find_adapter, list_adapters
from tunewright.adapters.system_prompt import SystemPrompt, system_prompt
from tunewright.adapters.trust import require_trusted
from tunewright.adapters.vllm_compat import require_batchable
from tunewright.api.adapters import adapter_importer
from tunewright.api.constraints import missing_evidence, served_grammar
from tunewright.api.context import ProjectContext
from tunewright.config import Config, EngineName, Quantization
from tunewright.core.errors import UserError
from tunewright.evidence.schema import evidence_on

if TYPE_CHECKING:
    from tunewright.serving.gateway.app_factory import Service
    from tunewright.serving.gateway.auth import ServedAdapter
    from tunewright.serving.tenants import State

_M_ARENA_MAX = -8  # of glibc's malloc.h


def serve(
    project: ProjectContext,
    adapters: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    metrics_port: int | None = None,
    metrics_host: str | None = None,
    auth: bool = True,
    engine: EngineName | None = None,
    replicas: int | None = None,
    max_replicas: int | None = None,
    system_prompts: bool = True,
    constrain: bool = False,
) -> Service:
    """Return a server, loaded but not yet started.

    Without tenants it serves the base and the adapters (by default all that fit the base) to this machine, without
    keys. ``NAME@step-N`` is an earlier checkpoint. Named adapters decide if the base is quantized, as they were
    trained on it, unless ``serve.quantization`` is set; otherwise the config decides.

    With tenants it answers only their API keys, from the releases of their aliases.

    Args:
        adapters: names; empty with tenants.
        host: overrides the config.
        port: overrides the config.
        metrics_port: overrides the config.
        metrics_host: overrides the config.
        engine: overrides the config.
        replicas: overrides the config.
        max_replicas: overrides the config.
        auth: False accepts every client that can reach the address, without a key; only without tenants.
        system_prompts: add the adapter's trained system prompt to requests without one; False only
            without tenants.
        constrain: constrain the adapters' answers by the config's ``evaluate.structured_outputs``; only without
            tenants, whose releases have their own constraint.

    Raises:
        UserError: a named adapter does not fit the base or the other adapters, or the address can be reached from
            other machines without tenants. With ``constrain``: the config has no constraint.
    """
    given = {
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        "engine": engine,
        "replicas": replicas,
        "max_replicas": max_replicas,
    }
    own = {name: value for name, value in given.items() if value is not None}
    config = project.folder.config
    served = config.model_copy(update={"serve": config.serve.model_copy(update=own)})
    return _open_service(project, adapters, served, auth=auth, system_prompts=system_prompts, constrain=constrain)


def _open_service(
    opened: ProjectContext,
    names: Sequence[str],
    config: Config,
    *,
    auth: bool,
    system_prompts: bool,
    constrain: bool,
) -> Service:
    _share_one_arena()
    if config.serve.database_url is not None or opened.folder.serving_state.exists():
        state = opened.state(serving=True)
        try:
            if state.tenants.any():
                if not auth:
                    raise UserError("Tenants exist, so every request needs an API key", where="--no-auth")
                if not system_prompts:
                    raise UserError(
                        "Tenants exist, so each release sets whether its system prompt is added",
                        where="--no-system-prompt",
                        fix="Use `tunewright deploy ALIAS ADAPTER --no-system-prompt`.",
                    )
                if constrain:
                    raise UserError(
                        "Tenants exist, so each release sets whether its answers are constrained",
                        where="--constrain",
                        fix="Use `tunewright deploy ALIAS ADAPTER --constrain`.",
                    )
                return _for_tenants(opened, state, names, config)
        except BaseException:
            state.close()
            raise
        state.close()
    if auth:
        _require_private(config.serve.host)
    from tunewright.serving.gateway.app_factory import Service
    from tunewright.serving.gateway.auth import ServedAdapter

    held, folders = choose_served(opened, names)
    rules = _constraints(opened, folders) if constrain else {}
    served = {}
    for name, folder in folders.items():
        prompt = system_prompt(Adapter(opened.folder.adapters / name.partition("@")[0]), opened.folder.dataset)
        if prompt.text is not None and not system_prompts:
            prompt = SystemPrompt(None, "left out by --no-system-prompt")
        served[name] = ServedAdapter(folder, prompt, rules.get(name))
    return Service(config, opened.base, opened.chat, held, served, opened.reporter)


def _constraints(opened: ProjectContext, folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the rule of each adapter's answers, with a warning for each that was not evaluated with it.

    Raises:
        UserError: the config has no constraint, or it cannot be compiled.
    """
    grammar = served_grammar(opened)
    for name, folder in folders.items():
        evidence = evidence_on(opened.folder.evaluations, adapter_digest(folder), opened.reporter)
        if missing := missing_evidence(name, evidence, grammar):
            opened.reporter.warn(f"{missing}. Its answers are constrained all the same.")
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


def _for_tenants(opened: ProjectContext, state: State, names: Sequence[str], config: Config) -> Service:
    refuse_names(names)
    held, trained = released(opened, state)

    from tunewright.serving.gateway.auth import ServedAdapter

    def locate(name: str, digest: str) -> ServedAdapter:
        adapter = adapter_of(opened, name, digest)
        require_held(opened, adapter, held)
        return ServedAdapter(adapter.folder, system_prompt(adapter, opened.folder.dataset))

    from tunewright.serving.gateway.app_factory import Service, TenantSource

    served = TenantSource(state, locate, {adapter.name: adapter.folder for adapter in trained})
    return Service(config, opened.base, opened.chat, held, served, opened.reporter)


def refuse_names(names: Sequence[str]) -> None:
    """Refuse adapter names if there are tenants.

    Raises:
        UserError: there are tenants.
    """
    if names:
        raise UserError(
            "Tenants request aliases, not adapters",
            where=" ".join(names),
            fix="Name no adapters: releases decide what is served (`tunewright deploy ALIAS ADAPTER`).",
        )


def released(opened: ProjectContext, state: State) -> tuple[Quantization, list[Adapter]]:
    """Return the base's quantization for the live releases, and those of their adapters that exist here.

    Raises:
        UserError: the adapters were trained with different quantizations, and the config does not choose one.
    """
    adapters = []
    for release in state.releases.live().values():
        try:
            adapters += [adapter_of(opened, name, digest) for name, digest in release.adapters]
        except UserError as error:  # the server reports it again and continues without this release
            opened.reporter.warn(f"{release.alias}: {error}")
    config = opened.folder.config
    return config.serve.quantization or (
        trained_quantization(adapters) if adapters else config.train.quantization
    ), adapters


def adapter_of(opened: ProjectContext, name: str, digest: str) -> Adapter:
    """Return a release's adapter by its digest; one that is missing here is imported from ``serve.adapter_store``.

    Args:
        name: its name in the store, else only for display.

    Raises:
        UserError: the adapter is missing, or the one in the store is another or fails a check.
    """
    known = [adapter for adapter in list_adapters(opened.folder.adapters) if adapter.digest == digest]
    # Two folders with the same weights may differ in their system prompt; prefer the name that was released.
    found = next((adapter for adapter in known if adapter.name == name), known[0] if known else None)
    if found is None:
        found = _from_store(opened, name)
    if found is None or found.digest != digest:
        raise UserError(
            f"The released adapter {name} ({digest[:12]}) is missing",
            where=opened.folder.config.serve.adapter_store or str(opened.folder.adapters),
            fix="Copy its folder here from where it was trained, or set serve.adapter_store to a URL that has it.",
        )
    return found


def _from_store(opened: ProjectContext, name: str) -> Adapter | None:
    """Import an adapter from the store; None without a store."""
    url = opened.folder.config.serve.adapter_store
    if url is None:
        return None
    from tunewright.adapters.foreign.importer import ImportStatement
    from tunewright.core.remote_files import RemoteFiles

    opened.reporter.say(f"Importing {name} from {url}")
    source = RemoteFiles(f"{url.rstrip('/')}/{name}")
    return adapter_importer(opened).import_adapter(source, ImportStatement(by=None)).adapter


def _require_private(host: str) -> None:
    """Refuse to serve without authentication on an address that other machines can reach.

    Raises:
        UserError: other machines can reach the address.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return  # not an address; binding to it reports the error
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        raise UserError(
            f"Other machines can reach {host}, and without tenants the server answers all of them",
            where="serve.host",
            fix="Add a tenant with `tunewright tenant add NAME`, or allow all requests with --no-auth.",
        )


def choose_served(opened: ProjectContext, names: Sequence[str]) -> tuple[Quantization, dict[str, Path]]:
    """Return the base's quantization, and the folders of the named adapters (default: all that fit) by name.

    Raises:
        UserError: a named adapter does not fit, or cannot be served together with the others.
    """
    config = opened.folder.config
    if not names:
        held = config.serve.quantization or config.train.quantization
        return held, {adapter.name: adapter.folder for adapter in _servable_adapters(opened, held)}
    folders: dict[str, Path] = {}
    named: list[Adapter] = []
    for name in names:
        adapter_name, _, step = name.partition("@")
        adapter = find_adapter(opened.folder.adapters, adapter_name)
        _require_servable(opened, adapter)
        named.append(adapter)
        if step:
            adapter.verify(step)
            folders[f"{adapter.name}@{step}"] = adapter.checkpoint(step)
        else:
            folders[adapter.name] = adapter.folder
    return config.serve.quantization or trained_quantization(named), folders


def _servable_adapters(opened: ProjectContext, held: Quantization) -> Iterator[Adapter]:
    """Yield the adapters that fit the base with this quantization, with a warning for each other adapter."""
    for adapter in list_adapters(opened.folder.adapters):
        try:
            _require_servable(opened, adapter)
        except UserError as error:
            opened.reporter.warn(f"{adapter.name} is not served: {error.what}")
            continue
        trained = trained_quantization([adapter])
        if opened.folder.config.serve.quantization is None and trained != held:
            opened.reporter.warn(
                f"{adapter.name} is not served: it was trained with train.quantization {trained}, and the base is "
                f"held with {held}; name it to serve it, or set serve.quantization"
            )
            continue
        yield adapter


def require_held(opened: ProjectContext, adapter: Adapter, held: Quantization) -> None:
    """Check that an adapter fits the base that is in memory.

    Args:
        held: the base's quantization.

    Raises:
        UserError: the adapter does not fit or is not trusted; or it was trained on another quantization, and the config
            has no ``serve.quantization``.
    """
    _require_servable(opened, adapter)
    trained = trained_quantization([adapter])
    if opened.folder.config.serve.quantization is None and trained != held:
        raise UserError(
            f"The adapter was trained with train.quantization {trained}, but this server holds the base with {held}",
            where=adapter.name,
            fix="Restart the server, or set serve.quantization.",
        )


def _require_servable(opened: ProjectContext, adapter: Adapter) -> None:
    require_compatible(adapter, opened.base, opened.chat)
    require_batchable(adapter.folder)
    require_trusted(adapter, TrustedKeys(opened.folder.keys))
