"""Custom metrics: a Python function in the project's folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, Unscored, mean_score

_RETURNS = "It returns a number from 0 to 1, or None for an item that cannot be scored."


def custom_metric(name: MetricName, function: str, root: Path) -> Scorer:
    """Return a scorer of the mean of ``function(answer, reference, example)`` over the items for which it is not None.

    If an input has several references, the function is called with each, and the item's score is the best result.

    Args:
        name: name of the metric.
        function: module:function.
        root: the project's folder. It is put at the end of Python's path, so that the module can import its neighbours.

    Raises:
        UserError: there is no such module or function, or its import fails.
    """
    file = module_file(function, root)
    call = _find(_load(file, function), function)

    def item(pair: Pair) -> ItemScore | Unscored:
        try:
            value = call(pair.answer, pair.reference, pair.example)
        except Exception as error:  # a user's code can raise anything
            raise UserError(
                f"{function} raised {type(error).__name__} ({error}) for {_told(pair)}",
                where="evaluate.metric",
                fix=f"Correct {file}. For an item that it cannot score, return None.",
            ) from error
        if value is None:
            return Unscored(f"{function} returned None")
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise UserError(f"{function} returned {value!r} for {_told(pair)}", where="evaluate.metric", fix=_RETURNS)
        return mean_score(float(value))

    definition = f"the mean of {function} ({file.name}, SHA-256 {file_digest(file)[:12]})"
    return Scorer(name, "mean", definition, 2, item)


def module_file(function: str, root: Path) -> Path:
    """Return the file of ``module:function`` in the project's folder.

    Raises:
        UserError: there is no such file.
    """
    module, _, _ = function.partition(":")
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise UserError(f"No module {module!r} in the project's folder", where="evaluate.metric", fix=f"Create {file}.")
    return file


def file_digest(file: Path) -> str:
    """Return the SHA-256 of the module's file: another file makes another evaluation."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _load(file: Path, function: str) -> ModuleType:
    root = file
    for _ in function.partition(":")[0].split("."):
        root = root.parent
    if str(root) not in sys.path:
        sys.path.append(str(root))
    # Not by its bare name: a project's `metrics.py` must not clash with an installed package or another project's.
    name = f"tunewright_project_{file_digest(file)[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code can raise anything
        del sys.modules[name]
        raise UserError(f"Importing it raised {type(error).__name__} ({error})", where=str(file)) from error
    return module


def _find(module: ModuleType, function: str) -> Callable[..., object]:
    _, _, name = function.partition(":")
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"The module has no function {name!r}", where=str(module.__file__))
    called: Callable[..., object] = found
    return called


def _told(pair: Pair) -> str:
    text = pair.example.input_text
    return f"example {pair.example.pair_key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"
