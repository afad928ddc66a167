"""Lineage and training records of a foreign adapter: unproven claims, parsed so that nothing in them can do harm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tunewright.adapters.manifest import Digest
from tunewright.config import Quantization
from tunewright.core.errors import UserError, first_fault
from tunewright.core.strict_json import strict_object
from tunewright.core.unicode import mark_fault

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that a terminal may read as commands, except line ends and tabs."""


class _Claim(BaseModel):
    """The checked part of a lineage; further keys are kept and never read."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


class _Base(_Claim):
    spec: str
    commit: str | None
    digest: Digest
    files: dict[str, Digest]


class _Chat(_Claim):
    kind: Literal["own", "plain"]
    template: str | None
    date: str | None
    special_tokens: dict[str, Any]
    end_tokens: list[str]
    probe: str


class _Split(_Claim):
    digest: Digest
    examples: int


class _Source(_Claim):
    name: str


class _Mix(_Claim):
    drawn: int
    source: _Source


class _Dataset(_Claim):
    digest: Digest
    splits: dict[Literal["train", "dev", "test"], _Split] = Field(min_length=3)
    mix: _Mix | None = None


def _few_marks(text: str) -> str:
    if fault := mark_fault(text):
        raise ValueError(fault)
    return text


class _SystemPrompt(_Claim):
    text: Annotated[str, AfterValidator(_few_marks)] | None
    rows: int
    without: int
    distinct: int


class _Train(_Claim):
    target_modules: list[str]
    lora_r: int
    lora_alpha: int
    learning_rate: float
    epochs: int
    batch_size: int
    quantization: Quantization = "none"
    require_vllm_compatible: bool = True


class _Config(_Claim):
    train: _Train


class _LeftOut(_Claim):
    key: Digest
    tokens: int


class _Rendering(_Claim):
    left_out: list[_LeftOut]


class _Epoch(_Claim):
    dev_loss: float


class _Training(_Claim):
    kept_step: int
    seconds: float
    device: str
    epochs: list[_Epoch]


class _Lineage(_Claim):
    digest: Digest
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?\+00:00$")]
    base: _Base
    template_digest: Digest
    chat: _Chat
    inputs_digest: Digest
    dataset: _Dataset
    config: _Config
    seed: int
    rendering: dict[str, _Rendering]
    training: _Training
    packages: dict[str, str]
    system_prompt: _SystemPrompt | None = None


def check_lineage(data: bytes, where: str) -> None:
    """Check that ``data`` is a lineage as tunewright writes it.

    Raises:
        UserError: naming the key that is not.
    """
    _require_harmless(strict_object(data, where), where)
    try:
        _Lineage.model_validate_json(data)
    except ValidationError as error:
        what = f"Not a lineage of this version of tunewright: {first_fault(error)[:200]}"
        raise UserError(what, where=where) from None


def check_history(path: Path, where: str) -> None:
    """Check that ``path`` has training metrics, one JSON object a line.

    Raises:
        UserError: naming the line that is not.
    """
    for number, row in _rows(path, where):
        if not all(value is None or type(value) in (int, float) for value in row.values()):
            raise UserError("Not a line of metrics: all values must be numbers", where=f"{where}:{number}")


def check_replay(path: Path, where: str) -> None:
    """Check that ``path`` has conversations, one JSON object a line.

    Raises:
        UserError: naming the line that is not.
    """
    for number, row in _rows(path, where):
        turns = row.get("messages")
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise UserError("Not a conversation", where=f"{where}:{number}")


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        and turn.keys() <= {"role", "content", "weight"}
    )


def _rows(path: Path, where: str) -> list[tuple[int, dict[str, Any]]]:
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [(n, strict_object(line, f"{where}:{n}")) for n, line in enumerate(lines, start=1) if lines != [b""]]


def _require_harmless(document: dict[str, Any], where: str) -> None:
    left: list[Any] = [document]
    while left:
        inner = left.pop()
        if isinstance(inner, str) and (found := _CONTROL.search(inner)):
            raise UserError(f"A text has the control character {ord(found[0]):#04x}", where=where)
        if isinstance(inner, dict):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            left += inner
