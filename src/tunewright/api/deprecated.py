"""Python names of earlier versions, which still work and name what replaced them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tunewright.engines import environment
from tunewright.serving.serve import open_state

if TYPE_CHECKING:
    from tunewright.open_project import OpenProject

Verb = TypeVar("Verb", bound=Callable[..., Any])

_IN_STATE = {
    "tenant": {
        "add": "tenants.add",
        "list": "tenants.list",
        "grant": "tenants.grant",
        "revoke": "tenants.revoke",
        "disable": "tenants.disable",
        "limit": "tenants.limit",
        "get": "tenants.get",
        "usage": "usage.sums",
        "usage_by_day": "usage.by_day",
        "requests": "usage.lines",
        "prune_usage": "usage_rollup.roll_up",
    },
    "tenant.key": {"add": "keys.create", "rotate": "keys.rotate", "revoke": "keys.revoke", "list": "keys.list"},
    "audit": {"show": "audit.lines", "verify": "verify"},
}
"""Methods by group, and the service's method in ``Project.state()`` that each of them calls."""


class DeprecatedGroup:
    """A group of methods on a project, each of which warns and calls what replaced it."""

    def __init__(self, project: OpenProject, name: str) -> None:
        self._project = project
        self._name = name

    def __getattr__(self, verb: str) -> Any:
        name = f"{self._name}.{verb}"
        if name in _IN_STATE:
            return DeprecatedGroup(self._project, name)
        if name == "engine.install":
            install = partial(environment.install, reporter=self._project.reporter)
            new = "tunewright.engines.environment.install()"
            return _warning(name, new, lambda name, **options: install(environment.find_tool(name), **options))
        if name == "engine.show":
            new = "tunewright.engines.environment.find()"
            return _warning(name, new, lambda name: environment.find(environment.find_tool(name)))
        service = _IN_STATE.get(self._name, {}).get(verb)
        if service is None:
            raise AttributeError(f"project.{self._name} has no method {verb!r}")
        instead = f"state.{service}() in `with open_state(project) as state`"
        return _warning(name, instead, lambda *given, **named: self._in_state(service, given, named))

    def _in_state(self, service: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with open_state(self._project, make=service == "tenants.add") as state:
            return attrgetter(service)(state)(*given, **named)


def _warning(name: str, instead: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        warnings.warn(f"project.{name}() is deprecated: use {instead}.", DeprecationWarning, stacklevel=2)
        return function(*given, **named)

    return call


def keywords(function: Verb, options: type[Any]) -> Verb:
    """Return a verb that also takes the fields of its options as keywords, with a warning."""
    names = {each.name for each in fields(options)}

    @wraps(function)
    def verb(*given: Any, **named: Any) -> Any:
        if old := {name: named.pop(name) for name in names & named.keys()}:
            if isinstance(old.get("suspects"), Sequence):  # `review` takes a list as `known_suspects` now
                named["known_suspects"], old["suspects"] = old["suspects"], True
            instead = f"{options.__name__}({', '.join(f'{name}={value!r}' for name, value in old.items())})"
            warnings.warn(f"Pass {instead} to {function.__name__}().", DeprecationWarning, stacklevel=2)
            named["options"] = options(**old)
        return function(*given, **named)

    return cast("Verb", verb)
