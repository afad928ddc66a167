"""The JSON documents of a foreign adapter, parsed so that nothing in them can do harm.

``adapter_config.json`` may only be plain LoRA on a Llama's or Mistral's linear layers. Its keys are the keys of
peft 0.21's ``LoraConfig``. Keys that make peft import a module, match a regular expression, add layers or change
the base are refused by name. Every unknown key is also refused. Lineage and training records are unproven claims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tunewright.adapters.lora_weights import MAX_RANK, rank_and_scale
from tunewright.adapters.manifest import Digest
from tunewright.config import Quantization, ReasoningMode
from tunewright.config.train import Target
from tunewright.core.errors import UserError, first_fault
from tunewright.core.strict_json import strict_object
from tunewright.core.text import mark_fault
from tunewright.models.families import ATTENTION, MLP, OUTSIDE_TEXT, Shape, module_name

_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_mapping": ((None,), "names a class to import"),
    "megatron_config": ((None,), "is for layers of Megatron"),
    "megatron_core": ((None, "megatron.core"), "names a module to import"),
    "layer_replication": ((None,), "replicates layers, which changes the base"),
    "use_dora": ((False, None), "is DoRA, which cannot be served here"),
    "bias": (("none",), "adds trained biases"),
    "lora_bias": ((False, None), "adds biases to the LoRA weights"),
    "modules_to_save": ((None, []), "adds complete layers"),
    "trainable_token_indices": ((None,), "adds token embeddings"),
    "target_parameters": ((None, []), "adapts bare parameters"),
    "exclude_modules": ((None, [], OUTSIDE_TEXT), "can be a regular expression"),
    "layers_pattern": ((None, [], ""), "is a regular expression"),
    "alora_invocation_tokens": ((None,), "is activated LoRA"),
    "use_qalora": ((False, None), "is QALoRA"),
    "use_bdlora": ((False, None), "is block-diagonal LoRA"),
    "fan_in_fan_out": ((False,), "is for layers with transposed weights"),
    "ensure_weight_tying": ((False, None), "ties weights of layers that no adapter here has"),
    "loftq_config": ((None, {}), "is an initialization that changes the base"),
    "corda_config": ((None,), "is an initialization that changes the base"),
    "eva_config": ((None,), "is an initialization that reads data"),
    "lora_ga_config": ((None,), "is an initialization that reads data"),
    "velora_config": ((None,), "is another kind of adapter"),
    "monteclora_config": ((None,), "is another kind of adapter"),
    "arrow_config": ((None,), "is another kind of adapter"),
    "kasa_config": ((None,), "is another kind of adapter"),
}
"""Keys that may only have a value without effect, and the effect of any other value."""

_MODULE = r"^(model\.)?(language_model\.)?(layers\.[0-9]{1,4}\.)?((self_attn|mlp)\.)?[a-z]{1,4}_proj$"

Pattern = Annotated[str, Field(pattern=_MODULE)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


def _number(value: Any) -> Any:
    """Convert an integer to a float; booleans and texts are kept and refused later."""
    return float(value) if type(value) is int else value


class _Document(BaseModel):
    """The keys with an effect, under peft's names and in peft's order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task_type: Literal["CAUSAL_LM"] | None = None
    peft_type: Literal["LORA"]
    peft_version: Annotated[str, Field(max_length=64)] | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=1024)] | None = None
    revision: Annotated[str, Field(max_length=256)] | None = None
    inference_mode: bool = False
    r: Rank
    target_modules: Annotated[list[Target], Field(min_length=1, max_length=7)]
    lora_alpha: Annotated[Alpha, BeforeValidator(_number)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)] = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: int | list[Annotated[int, Field(ge=0)]] | None = None
    rank_pattern: dict[Pattern, Rank] = {}
    alpha_pattern: dict[Pattern, Annotated[Alpha, BeforeValidator(_number)]] = {}
    qalora_group_size: int = 16


_WHY = {
    "target_modules": "a list of linear layers of a Llama or Mistral, not a regular expression",
    "init_lora_weights": "true, false or gaussian; use true for any initialization that leaves the base unchanged",
    "rank_pattern": f"a map from linear layers' names to ranks up to {MAX_RANK}, without regular expressions",
    "alpha_pattern": "a map from linear layers' names to numbers above 0, without regular expressions",
    "r": f"a rank from 1 to {MAX_RANK}",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
}


@dataclass(frozen=True)
class ForeignConfig:
    """A configuration that passed the checks."""

    document: _Document
    shape: Shape
    architecture: str

    @cached_property
    def modules(self) -> dict[str, str]:
        """The base's adapted modules: full names to the names of their kinds."""
        chosen = self.document.layers_to_transform
        layers = {chosen} if isinstance(chosen, int) else set(chosen or range(self.shape.layers))
        part = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
        targets = sorted(set(self.document.target_modules))
        return {
            module_name(self.architecture, f"model.layers.{i}.{part[t]}.{t}"): t
            for i in sorted(layers)
            for t in targets
        }

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return the rank of the adapter's weights on a module, and the factor of BA."""
        return rank_and_scale(self.document.model_dump(), module)


def read_config(data: bytes, shape: Shape, architecture: str, where: str) -> ForeignConfig:
    """Parse and check a configuration for a base of this shape and architecture."""
    given = strict_object(data, where)
    for key, (allowed, why) in _OFF.items():
        # Equal and of one type, so that 0 is not false.
        same = [type(given.get(key)) is type(value) and given.get(key) == value for value in allowed]
        if key in given and not any(same):
            raise UserError(f"This key {why}", where=f"{where}, {key}")
    effective = {key: value for key, value in given.items() if key not in _OFF}
    try:
        document = _Document.model_validate(effective)
    except ValidationError as error:
        raise _refusal(error, where) from None
    config = ForeignConfig(document, shape, architecture)
    absent = sorted(set(document.target_modules) - set(shape.names))
    if absent:
        raise UserError(f"The base has no linear layer {absent[0]}", where=f"{where}, target_modules")
    chosen = document.layers_to_transform
    layers = [chosen] if isinstance(chosen, int) else chosen or []
    if outside := [layer for layer in layers if not 0 <= layer < shape.layers]:
        problem = f"Layer {outside[0]} does not exist: the base has layers 0 to {shape.layers - 1}"
        raise UserError(problem, where=f"{where}, layers_to_transform")
    return config


def _refusal(error: ValidationError, where: str) -> UserError:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return UserError(f"The key {key[:60]!a} is not allowed", where=where, fix="Remove it if it has no effect.")
    if first["type"] == "missing":
        return UserError("The key is missing", where=f"{where}, {key}")
    return UserError(f"Expected {_WHY[key]}" if key in _WHY else str(first["msg"]), where=f"{where}, {key}")


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


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str | None = None
    weight: Any = None


class _Replayed(_Claim):
    messages: list[_Turn]


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


class _Reasoning(_Claim):
    mode: ReasoningMode
    rows: int


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
    reasoning: _Reasoning | None = None


def check_lineage(data: bytes, where: str) -> None:
    """Check that ``data`` is a lineage as tunewright writes it, and that its texts have no control characters."""
    left: list[Any] = [strict_object(data, where)]
    while left:
        inner = left.pop()
        if isinstance(inner, str) and (found := _CONTROL.search(inner)):
            raise UserError(f"A text has the control character {ord(found[0]):#04x}", where=where)
        if isinstance(inner, dict):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            left += inner
    try:
        _Lineage.model_validate_json(data)
    except ValidationError as error:
        what = f"Not a lineage of this version of tunewright: {first_fault(error)[:200]}"
        raise UserError(what, where=where) from None


def check_history(path: Path, where: str) -> None:
    """Check that ``path`` has training metrics, one JSON object a line."""
    for number, row in _rows(path, where):
        if not all(value is None or type(value) in (int, float) for value in row.values()):
            raise UserError("Not a line of metrics: all values must be numbers", where=f"{where}:{number}")


def check_replay(path: Path, where: str) -> None:
    """Check that ``path`` has conversations, one JSON object a line."""
    for number, row in _rows(path, where):
        try:
            _Replayed.model_validate({"messages": row.get("messages")})
        except ValidationError:
            raise UserError("Not a conversation", where=f"{where}:{number}") from None


def _rows(path: Path, where: str) -> list[tuple[int, dict[str, Any]]]:
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [(n, strict_object(line, f"{where}:{n}")) for n, line in enumerate(lines, start=1) if lines != [b""]]
