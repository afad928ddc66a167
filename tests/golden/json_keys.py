"""Keys that each command's `--json` prints, and its exit codes, read from the source.

A command prints what it gives `Session.show`. The reader evaluates this expression, and those of the `return`
statements, as far as dict displays, annotations of functions and fields of classes lead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
Function = ast.FunctionDef | ast.AsyncFunctionDef
# Calls whose result has the keys of their first argument.
_SAME = {"asdict", "dict", "list", "tuple", "sorted", "keywords", "cast", "sum", "next"}
# Annotations that stand for what they hold, by the place of it.
_HOLDERS = {"list": 0, "tuple": 0, "Sequence": 0, "Iterable": 0, "Iterator": 0, "Annotated": 0, "Collection": 0,
            "dict": 1, "Mapping": 1, "set": 0, "frozenset": 0, "Generator": 0}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A class or function of the source, in its module."""

    module: str
    node: Any


@dataclass
class Keys:
    """A mapping: its keys with what lies below each, and the classes whose fields are keys too."""

    own: dict[str, Keys] = field(default_factory=dict)
    classes: list[Made] = field(default_factory=list)
    parts: list[Keys] = field(default_factory=list)
    """Of a tuple."""

    def __or__(self, other: Keys) -> Keys:
        own = {name: self.own.get(name, _NO_KEYS) | other.own.get(name, _NO_KEYS) for name in self.own | other.own}
        new = [each for each in other.classes if each not in self.classes]
        return Keys(own, [*self.classes, *new], self.parts or other.parts) if self.own or self.classes else other


_NO_KEYS = Keys()
Scope = dict[str, Any]


class Reader:
    """Names of each module, and values of expressions."""

    def __init__(self, **changed: str) -> None:
        """Read the source; `changed` are other texts of modules, whose names have `_` for each dot."""
        self.trees, self.names = {}, {}
        for module, (tree, names) in _source().items():
            text = changed.get(module.removeprefix("tunewright.").replace(".", "_"))
            self.trees[module] = tree if text is None else ast.parse(text)
            self.names[module] = names if text is None else _names(module, self.trees[module])
        self._running: set[tuple[str, ast.AST]] = set()

    def find(self, module: str, name: str) -> Made | str | None:
        """Return what a name stands for in a module: a class, function or value, or the name of a module."""
        found = self.names[module].get(name)
        if not isinstance(found, tuple):
            return found
        below = f"{found[0]}.{found[1]}"
        return below if below in self.trees else self.find(*found) if found[0] in self.trees else None

    def function(self, module: str, qualified: str) -> Made:
        """Return a function of a module, or one inside of it."""
        node: ast.AST = self.trees[module]
        for name in qualified.split(".<locals>."):
            node = next(each for each in ast.walk(node) if isinstance(each, Function) and each.name == name)
        return Made(module, node)

    def printed(self, made: Made) -> Keys:
        """Return the keys of what a function, or a function that it calls, gives `Session.show`."""
        found = Keys()
        if not isinstance(made.node, Function) or (made.module, made.node) in self._running:
            return found
        self._running.add((made.module, made.node))
        scope = self._scope(made)
        for call in (each for each in ast.walk(made.node) if isinstance(each, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "show" and _is_session(call.func.value):
                found |= self.keys(call.args[0], made.module, scope)
            elif isinstance(call.func, ast.Name) and any(map(_is_session, call.args)):
                called = self.find(made.module, call.func.id)
                if isinstance(called, Made) and isinstance(called.node, Function):
                    found |= self.printed(called)
        self._running.discard((made.module, made.node))
        return found

    def keys(self, node: ast.expr | None, module: str, scope: Scope) -> Keys:
        """Return the keys of an expression's value."""
        found = self.value(node, module, scope)
        return found if isinstance(found, Keys) else Keys()

    def value(self, node: ast.expr | None, module: str, scope: Scope) -> Any:
        """Return an expression's value: `Keys` of an instance or mapping; `Made`; or the name of a module."""
        match node:
            case ast.Dict():
                found = Keys()
                for key, each in zip(node.keys, node.values, strict=True):
                    below = self.keys(each, module, scope)
                    name = str(key.value) if isinstance(key, ast.Constant) else None
                    found |= below if name is None or "." in name else Keys({name: below})
                return found
            case ast.List() | ast.Tuple() | ast.BoolOp():
                parts = [self.value(each, module, scope) for each in getattr(node, "values", getattr(node, "elts", ()))]
                if parts and isinstance(parts[0], Made):
                    return parts[0]
                return reduce(or_, (each for each in parts if isinstance(each, Keys)), Keys())
            case ast.IfExp():
                return self.keys(node.body, module, scope) | self.keys(node.orelse, module, scope)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                inner = dict(scope)
                for part in node.generators:
                    _bind(part.target, self.value(part.iter, module, inner), inner)
                return self.keys(node.value if isinstance(node, ast.DictComp) else node.elt, module, inner)
            case ast.Name():
                if node.id in scope:
                    bound = scope[node.id]
                    if isinstance(bound, ast.expr):
                        scope[node.id] = Keys()  # of a name that is made from itself
                        scope[node.id] = bound = self.value(bound, module, scope)
                    return bound
                return self._found(self.find(module, node.id))
            case ast.Subscript() | ast.Starred() | ast.NamedExpr() | ast.Await():
                found = self.value(node.value, module, scope)
                place = getattr(getattr(node, "slice", None), "value", None)
                if isinstance(found, Keys) and isinstance(place, int) and place < len(found.parts):
                    return found.parts[place]
                return found.own.get(place, found) if isinstance(found, Keys) and isinstance(place, str) else found
            case ast.Attribute():
                return self._attribute(self.value(node.value, module, scope), node.attr)
            case ast.Call():
                return self._called(node, module, scope)
        return None

    def _found(self, made: Made | str | None) -> Any:
        """Return what a name of a module stands for: of an assignment, its value."""
        if isinstance(made, Made) and isinstance(made.node, ast.expr):
            return self.value(made.node, made.module, {})
        return made

    def _attribute(self, of: Any, name: str) -> Any:
        if isinstance(of, str):
            return self._found(self.find(of, name))
        if isinstance(of, Keys):
            for owner in of.classes:
                found = self._member(owner, name)
                if found is not None:
                    return found
            return of.own.get(name)
        return None

    def _member(self, owner: Made, name: str) -> Any:
        """Return a field's or property's value, or a method, of a class or its bases."""
        for node in owner.node.body:
            if isinstance(node, Function) and node.name == "__init__":
                for each in ast.walk(node):
                    if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == f"self.{name}":
                        return self.value(each.value, owner.module, self._scope(Made(owner.module, node), owner))
            if isinstance(node, Function) and node.name == name:
                names = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
                bound = Made(owner.module, node)
                return self.returned(bound, owner) if names & {"property", "cached_property"} else bound
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
                return self.annotated(node.annotation, owner.module)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
                return self.value(node.value, owner.module, {})
        for base in self.bases(owner):
            if (found := self._member(base, name)) is not None:
                return found
        return None

    def bases(self, owner: Made) -> Iterator[Made]:
        for base in owner.node.bases:
            found = self.find(owner.module, ast.unparse(base).partition("[")[0])
            if isinstance(found, Made) and isinstance(found.node, ast.ClassDef):
                yield found

    def _called(self, node: ast.Call, module: str, scope: Scope) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id in _SAME and node.args:
            return self.value(node.args[-1 if node.func.id == "cast" else 0], module, scope)
        of = self.value(node.func.value, module, scope) if isinstance(node.func, ast.Attribute) else None
        if isinstance(of, Keys) and isinstance(node.func, ast.Attribute):
            for owner in of.classes:
                method = self._member(owner, node.func.attr)
                if isinstance(method, Made):
                    return self.returned(method, owner)
            return of if node.func.attr in {"model_dump", "values", "items", "get", "pop"} else None
        called = self.value(node.func, module, scope)
        if isinstance(called, Made) and isinstance(called.node, ast.ClassDef):
            return Keys(classes=[called])
        return self.returned(called) if isinstance(called, Made) else called

    def returned(self, made: Made, owner: Made | None = None) -> Keys:
        """Return what a function returns: by its annotation, or by its statements where that names no class."""
        if not isinstance(made.node, Function):
            return Keys()
        found = self.annotated(made.node.returns, made.module)
        mark = (made.module, made.node)
        if found.classes or mark in self._running or "dict[" not in ast.unparse(made.node.returns or ast.Constant(0)):
            return found
        self._running.add(mark)
        scope = self._scope(made, owner)
        for each in ast.walk(made.node):
            if isinstance(each, ast.Return):
                found |= self.keys(each.value, made.module, scope)
        self._running.discard(mark)
        return found

    def exits(self, made: Made, owner: Made | None = None) -> set[int]:
        """Return the numbers that a function returns; None is 0."""
        mark = (made.module, made.node)
        if not isinstance(made.node, Function) or mark in self._running:
            return set()
        self._running.add(mark)
        scope = self._scope(made, owner)
        returns = [each.value for each in ast.walk(made.node) if isinstance(each, ast.Return)]
        found = {0}.union(*(self._numbers(each, made.module, scope) for each in returns))
        self._running.discard(mark)
        return found

    def _numbers(self, node: ast.expr | None, module: str, scope: Scope) -> set[int]:
        """Return the numbers that an expression may be."""
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return {number}
            case ast.IfExp():
                return self._numbers(node.body, module, scope) | self._numbers(node.orelse, module, scope)
            case ast.Dict():
                return set().union(*(self._numbers(each, module, scope) for each in node.values))
            case ast.Subscript():
                return self._numbers(node.value, module, scope)
            case ast.Name():
                made = self.find(module, node.id)
                return self._numbers(made.node, made.module, {}) if isinstance(made, Made) else set()
            case ast.Attribute(attr="exit_code"):
                owners = self.keys(node.value, module, scope).classes
                of = [(owner, each) for owner in owners for each in owner.node.body]
                properties = [pair for pair in of if isinstance(pair[1], Function) and pair[1].name == "exit_code"]
                return set().union(*(self.exits(Made(owner.module, each), owner) for owner, each in properties))
            case ast.Call(func=ast.Name(id=name)):
                made = self.find(module, name)
                return self.exits(made) if isinstance(made, Made) else set()
        return set()

    def annotated(self, annotation: ast.expr | None, module: str) -> Keys:
        """Return the classes that an annotation names, without what holds them."""
        found = Keys()
        match annotation:
            case ast.BinOp():
                return self.annotated(annotation.left, module) | self.annotated(annotation.right, module)
            case ast.Subscript(value=ast.Name(id=name)) if name in _HOLDERS:
                inside = annotation.slice
                parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
                if name == "tuple" and "..." not in map(ast.unparse, parts):
                    return Keys(parts=[self.annotated(each, module) for each in parts])
                return self.annotated(parts[min(_HOLDERS[name], len(parts) - 1)], module)
            case ast.Constant(value=str(text)):
                return self.annotated(ast.parse(text, mode="eval").body, module)
            case ast.Name() | ast.Attribute():
                made = self.value(annotation, module, {}) if isinstance(annotation, ast.Attribute) else None
                made = made or self.find(module, ast.unparse(annotation))
                if isinstance(made, Made) and isinstance(made.node, ast.ClassDef):
                    found.classes.append(made)
                elif isinstance(made, Made) and isinstance(made.node, ast.expr) and made.node is not annotation:
                    return self.annotated(made.node, made.module)
        return found

    def _scope(self, made: Made, owner: Made | None = None) -> Scope:
        """Return the names of a function: parameters by annotation, others by what they are set to."""
        scope: Scope = {}
        arguments = made.node.args
        for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            scope[each.arg] = self.annotated(each.annotation, made.module)
        if owner is not None:
            scope["self"] = Keys(classes=[owner])
        for node in ast.walk(made.node):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    _bind(target, node.value, scope)
            elif isinstance(node, ast.AnnAssign) and node.value:
                _bind(node.target, node.value, scope)
            elif isinstance(node, ast.For):
                _bind(node.target, node.iter, scope)
            elif isinstance(node, ast.NamedExpr):
                _bind(node.target, node.value, scope)
            elif isinstance(node, ast.With):
                for item in node.items:
                    if item.optional_vars:
                        _bind(item.optional_vars, item.context_expr, scope)
        return scope


def _is_session(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "run"


def _bind(target: ast.expr, value: Any, scope: Scope) -> None:
    if isinstance(target, ast.Name):
        scope.setdefault(target.id, value)
    elif isinstance(target, ast.Tuple):
        several = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
        for place, each in enumerate(target.elts):
            if isinstance(value, Keys):
                _bind(each, value.parts[place] if place < len(value.parts) else value, scope)
            else:
                _bind(each, value.elts[place] if several else ast.Subscript(value, ast.Constant(place)), scope)


@cache
def _source() -> dict[str, tuple[ast.Module, dict[str, Any]]]:
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found[module] = (tree, _names(module, tree))
    return found


def _names(module: str, tree: ast.Module) -> dict[str, Any]:
    """Return what each name of a module stands for: a module and a name in it, or what is defined here."""
    names: dict[str, Any] = {}
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: (node.module, each.name) for each in node.names}
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names[node.name] = Made(module, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = Made(module, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            names[node.target.id] = Made(module, node.value)
    return names


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every statement in a module: a fifth of the time of ast.walk, which also visits expressions."""
    for name in ("body", "orelse", "finalbody", "handlers"):
        for each in getattr(node, name, ()):
            yield each
            yield from _statements(each)
