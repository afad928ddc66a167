"""The words of every message of the program, read from its source: errors, warnings and notices.

``python tests/golden/messages.py`` (``make messages``) writes them to ``messages.txt``.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
GOLDEN = Path(__file__).with_name("messages.txt")
# Methods of what reports to the user. Errors are known by their ending.
REPORTS = {"warn", "warn_once", "warning", "note", "notice", "info"}
# What an error names besides its words; and errors that are ours, which the user never meets.
UNSAID = {"where"}
OURS = {"AssertionError", "NotImplementedError", "KeyError", "AttributeError", "StopIteration"}

_LEAVES = (ast.Name, ast.Constant, ast.expr_context, ast.operator, ast.cmpop)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Name = tuple[str, str]  # of a module and in it


class _Module:
    """A file: its constants, what it imports, and each of its calls with the functions around it."""

    def __init__(self, file: Path) -> None:
        self.name = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        self.constants: dict[str, list[ast.expr]] = {}
        self.imported: dict[str, Name] = {}
        self.functions = {each.name: each for each in tree.body if isinstance(each, Function)}
        self.calls: list[tuple[ast.Call, tuple[Function, ...], str | None]] = []
        for name, value in _assignments(tree.body):
            self.constants.setdefault(name, []).append(value)
        self._walk(tree, (), "")

    def _walk(self, node: ast.AST, functions: tuple[Function, ...], of: str) -> None:
        """Keep each call with the functions around it, and the name of the error that it makes."""
        if isinstance(node, ast.Call):
            name = _last(node.func)
            error = of if name == "__init__" else name  # a class that writes its own words hands them to the one above
            said = error in REPORTS or (error.endswith(("Error", "Issue")) and error not in OURS)
            self.calls.append((node, functions, error if said else None))
        elif isinstance(node, ast.ImportFrom):
            self.imported |= {each.asname or each.name: (node.module or "", each.name) for each in node.names}
        elif isinstance(node, Function):
            functions = (*functions, node)
        elif isinstance(node, ast.ClassDef):
            of = node.name
        for field in vars(node).values():  # three times as quick as ast.iter_child_nodes
            for child in field if isinstance(field, list) else (field,):
                if isinstance(child, ast.AST) and not isinstance(child, _LEAVES):
                    self._walk(child, functions, of)

    def home(self, name: str) -> Name:
        return self.imported.get(name, (self.name, name))


def _last(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


class _Reader:
    def __init__(self) -> None:
        self.modules = {module.name: module for module in map(_Module, sorted(SOURCE.rglob("*.py")))}
        # Functions that put a parameter into a message: what their callers pass is a message too. Of each parameter,
        # what it is made into, and whether it is the first thing said.
        self.passed_on: dict[Name, dict[str, tuple[str, bool]]] = defaultdict(dict)
        self.parameters: dict[Name, list[str]] = {}
        self.returned: dict[Name, list[str] | None] = {}
        self.values: dict[Function, dict[str, list[ast.expr]]] = {}

    def messages(self) -> set[str]:
        """Return every message: what makes it, a sentence, and after `|` what solves it; values are in braces."""
        found: set[str] = set()
        for module in self.modules.values():
            for call, functions, error in module.calls:
                if error is not None:
                    arguments = [*call.args, *(each.value for each in call.keywords if each.arg not in UNSAID)]
                    found |= self._lines(module, [(error, n == 0, each) for n, each in enumerate(arguments)], functions)
        seen: dict[Name, dict[str, tuple[str, bool]]] = {}
        while new := {name: dict(each) for name, each in self.passed_on.items() if seen.get(name) != each}:
            seen |= new
            names = {name for _, name in new}
            for module in self.modules.values():
                for call, functions, _ in module.calls:
                    if (name := _last(call.func)) in names and (home := module.home(name)) in new:
                        given = dict(zip(self.parameters[home], call.args, strict=False))
                        given |= {each.arg: each.value for each in call.keywords if each.arg}
                        said = [(*new[home][name], value) for name, value in given.items() if name in new[home]]
                        found |= self._lines(module, said, functions)
        return found

    def _lines(
        self, module: _Module, said: list[tuple[str, bool, ast.expr]], functions: tuple[Function, ...]
    ) -> set[str]:
        variants, first = [], False
        for kind, leads, argument in said:
            self._note_parameters(module, kind, leads, argument, functions)
            texts = [text for text in dict.fromkeys(self._texts(module, argument, functions)) if _has_words(text)]
            if texts:
                variants.append(texts)
                first = first or leads
        lines = product(*variants if first else [["…"], *variants]) if variants else ()
        return {f"{said[0][0]}: {' | '.join(line)}".replace("\n", "\\n") for line in lines}

    def _note_parameters(
        self, module: _Module, kind: str, leads: bool, node: ast.expr, functions: tuple[Function, ...]
    ) -> None:
        """Note the parameters of the function that are the argument, or one of its alternatives."""
        names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)] if functions else []
        if names and isinstance(node, ast.Name | ast.BoolOp | ast.IfExp):
            function = functions[-1]
            order = [each.arg for each in [*function.args.posonlyargs, *function.args.args]]
            for name in names:
                if name in order or name in [each.arg for each in function.args.kwonlyargs]:
                    home = (module.name, function.name)
                    self.passed_on[home].setdefault(name, (kind, leads))
                    self.parameters[home] = [each for each in order if each not in {"self", "cls"}]

    def _texts(self, module: _Module, node: ast.expr, functions: tuple[Function, ...]) -> Iterator[str]:
        """Yield the variants of a text."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr():
                for parts in product(*(list(self._part(module, each, functions)) for each in node.values)):
                    yield "".join(parts)
            case ast.IfExp():
                yield from self._texts(module, node.body, functions)
                yield from self._texts(module, node.orelse, functions)
            case ast.BoolOp():
                for value in node.values:
                    yield from self._texts(module, value, functions)
            case ast.BinOp(op=ast.Add()):
                sides = (list(self._texts(module, side, functions)) for side in (node.left, node.right))
                yield from map("".join, product(*sides))
            case ast.Name():
                yield from self._named(module, node, functions)
            case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List() | ast.Tuple() as parts]):
                for value in parts.elts:
                    yield from self._texts(module, value, functions)
            case ast.Call(func=ast.Name(id=name)) if (returned := self._returned(module.home(name))) is not None:
                yield from returned
            case _:
                yield f"{{{ast.unparse(node)}}}"

    def _part(self, module: _Module, node: ast.expr, functions: tuple[Function, ...]) -> Iterator[str]:
        """Yield the variants of a part of an f-string."""
        if not isinstance(node, ast.FormattedValue):
            yield from self._texts(module, node, functions)
        elif isinstance(node.value, ast.IfExp | ast.Constant):
            yield from self._texts(module, node.value, functions)
        else:
            yield f"{{{ast.unparse(node.value)}}}"

    def _returned(self, home: Name) -> list[str] | None:
        """Return the texts that a function of the source returns."""
        if home not in self.returned:
            self.returned[home] = []  # of one that calls itself
            owner = self.modules.get(home[0])
            function = owner.functions.get(home[1]) if owner is not None else None
            if owner is None or function is None:
                self.returned[home] = None
            else:
                values = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
                self.returned[home] = [text for value in values for text in self._texts(owner, value, (function,))]
        return self.returned[home]

    def _named(self, module: _Module, node: ast.Name, functions: tuple[Function, ...]) -> Iterator[str]:
        """Yield the texts that a name stands for."""
        for depth, function in reversed(list(enumerate(functions))):
            if function not in self.values:
                self.values[function] = {}
                for name, value in _assignments(ast.walk(function)):
                    self.values[function].setdefault(name, []).append(value)
            if values := self.values[function].get(node.id):
                for value in values:
                    if not _contains(value, node.id):
                        yield from self._texts(module, value, functions[:depth])
                return
        home, name = module.home(node.id)
        values = self.modules[home].constants.get(name, []) if home in self.modules else []
        for value in values:
            yield from self._texts(self.modules[home], value, ())
        if not values:
            yield f"{{{node.id}}}"


def _assignments(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that is set, and to what."""
    for node in nodes:
        match node:
            case (
                ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                | ast.AugAssign(target=ast.Name(id=name), value=value)
            ):
                yield name, value
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    if isinstance(target, ast.Name):
                        yield target.id, value
                    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                        pairs = zip(target.elts, value.elts, strict=False)
                        yield from ((each.id, given) for each, given in pairs if isinstance(each, ast.Name))


def _contains(node: ast.expr, name: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))


def own_words(text: str) -> str:
    """Return a text with a line break for each interpolated value."""
    found, depth = "", 0
    for character in text:
        found += "\n" if character == "{" and depth == 0 else "" if depth or character in "{}" else character
        depth += (character == "{") - (character == "}")
    return found.replace("\\n", "\n")


def _has_words(text: str) -> bool:
    return sum(map(str.isalpha, own_words(text))) > 2


def messages() -> str:
    """Return the messages of the source, one a line, sorted."""
    return "".join(f"{line}\n" for line in sorted(_Reader().messages()))


if __name__ == "__main__":
    GOLDEN.write_text(messages(), encoding="utf-8")
