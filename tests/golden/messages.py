"""The words of every message of the program, read from its source: errors, warnings and notices.

``python tests/golden/messages.py`` (``make messages``) writes them to ``messages.txt``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
GOLDEN = Path(__file__).with_name("messages.txt")
# Methods of what reports to the user. Classes of errors are known by their ending, or because they are raised.
REPORTS = {"warn", "warning", "note", "notice", "info"}
# What an error names besides its words, and errors that are ours, which the user never meets.
UNSAID = {"where"}
OURS = {"AssertionError", "NotImplementedError", "KeyError", "AttributeError", "StopIteration"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Name = tuple[str, str]  # of a module and in it


class _Module:
    """A file: its constants, what it imports, and each of its calls with the functions around it."""

    def __init__(self, file: Path) -> None:
        self.name = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        self.constants: dict[str, ast.expr] = {}
        self.imported: dict[str, Name] = {}
        self.calls: list[tuple[ast.Call, list[Function], bool]] = []
        for statement in tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                self.constants |= {target.id: statement.value for target in targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {each.asname or each.name: (node.module, each.name) for each in node.names}
        self._walk(tree, [], None, raised=False)

    def _walk(self, node: ast.AST, functions: list[Function], of: str | None, *, raised: bool) -> None:
        if isinstance(node, ast.Call):
            # A class of errors that writes its own words hands them to the one above it.
            own = ast.unparse(node.func) == "super().__init__" and (of or "").endswith("Error")
            self.calls.append((node, functions, raised or own))
        inner = [*functions, node] if isinstance(node, Function) else functions
        of = node.name if isinstance(node, ast.ClassDef) else of
        for child in ast.iter_child_nodes(node):
            self._walk(child, inner, of, raised=isinstance(node, ast.Raise))


class _Reader:
    def __init__(self) -> None:
        modules = [_Module(file) for file in sorted(SOURCE.rglob("*.py"))]
        self.modules = {module.name: module for module in modules}
        # Functions that put a parameter into a message: what their callers pass is a message too.
        self.passed_on: dict[Name, set[str]] = {}
        self.parameters: dict[Name, list[str]] = {}

    def messages(self) -> set[str]:
        """Return every message: a sentence, and after `|` what solves it; an interpolated value in braces."""
        while True:
            known = {name: set(parameters) for name, parameters in self.passed_on.items()}
            found = {
                line
                for module in self.modules.values()
                for call, functions, said in module.calls
                for line in self._lines(module, call, functions, said)
            }
            if known == self.passed_on:
                return found

    def _lines(self, module: _Module, call: ast.Call, functions: list[Function], said: bool) -> Iterator[str]:
        parts = []
        for argument in self._words(module, call, said):
            texts = [text for text in self._texts(module, argument, functions) if _has_words(text)]
            if texts:
                parts.append(list(dict.fromkeys(texts)))
        if parts:
            yield from (" | ".join(line).replace("\n", "\\n") for line in product(*parts))

    def _words(self, module: _Module, call: ast.Call, said: bool) -> list[ast.expr]:
        """Return the arguments of a call that reach the user."""
        name = ast.unparse(call.func).split(".")[-1]
        passed = self.passed_on.get(module.imported.get(name, (module.name, name)))
        if passed is not None:
            order = self.parameters[module.imported.get(name, (module.name, name))]
            given = dict(zip(order, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
            return [value for parameter, value in given.items() if parameter in passed]
        method = isinstance(call.func, ast.Attribute) and name in REPORTS
        if name in OURS or not (said or method or name.endswith(("Error", "Issue"))):
            return []
        return [*call.args, *(each.value for each in call.keywords if each.arg not in UNSAID)]

    def _texts(self, module: _Module, node: ast.expr, functions: list[Function]) -> Iterator[str]:
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
            case _:
                yield f"{{{ast.unparse(node)}}}"

    def _part(self, module: _Module, node: ast.expr, functions: list[Function]) -> Iterator[str]:
        """Yield the variants of a part of an f-string."""
        if not isinstance(node, ast.FormattedValue):
            yield from self._texts(module, node, functions)
        elif isinstance(node.value, ast.IfExp | ast.Constant):
            yield from self._texts(module, node.value, functions)
        else:
            yield f"{{{ast.unparse(node.value)}}}"

    def _named(self, module: _Module, node: ast.Name, functions: list[Function]) -> Iterator[str]:
        """Yield the texts that a name stands for."""
        for depth, function in reversed(list(enumerate(functions))):
            values = list(_assigned(function, node.id))
            if values:
                for value in values:
                    yield from self._texts(module, value, functions[:depth])
                return
            arguments = [each.arg for each in [*function.args.posonlyargs, *function.args.args]]
            named = [each.arg for each in function.args.kwonlyargs]
            if node.id in [*arguments, *named]:
                key = (module.name, function.name)
                self.passed_on.setdefault(key, set()).add(node.id)
                self.parameters[key] = [each for each in arguments if each not in {"self", "cls"}]
                return
        home, name = module.imported.get(node.id, (module.name, node.id))
        owner = self.modules.get(home)
        if owner is not None and name in owner.constants:
            yield from self._texts(owner, owner.constants[name], [])
        else:
            yield f"{{{node.id}}}"


def _assigned(function: Function, name: str) -> Iterator[ast.expr]:
    """Yield what a function assigns to a name."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name and not _names(node.value, name):
                    yield node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    yield from (value for each, value in pairs if isinstance(each, ast.Name) and each.id == name)


def _names(node: ast.expr, name: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))


def _has_words(text: str) -> bool:
    """Return whether a text has words of its own next to its interpolated values."""
    depth, letters = 0, 0
    for character in text:
        depth += (character == "{") - (character == "}")
        letters += depth == 0 and character.isalpha()
    return letters > 2


def messages() -> str:
    """Return the messages of the source, one a line, sorted."""
    return "".join(f"{line}\n" for line in sorted(_Reader().messages()))


if __name__ == "__main__":
    GOLDEN.write_text(messages(), encoding="utf-8")
