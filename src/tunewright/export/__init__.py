"""Exports of an adapter, each compared with the trained model; here the options of the verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tunewright.core.options import Option

FileType = Literal["f16", "q8_0", "q5_k_m", "q4_k_m"]
Scheme = Literal["fp8", "w4a16"]

_Type = Annotated[
    FileType, Option("16 bits, 8 bits, or llama.cpp's mixtures of about 5.7 and 4.9 bits.", name="--type")
]


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """The content of a GGUF file, and its number type."""

    merged: Annotated[bool, Option("Write base and adapter to one file, not the adapter alone as LoRA.")] = False
    file_type: _Type = "f16"
    """With q5_k_m and q4_k_m, an adapter's own file stays in f16: the type applies to its base."""


@dataclass(frozen=True, kw_only=True)
class OllamaOptions:
    """The GGUF files of a folder for Ollama."""

    lora: Annotated[bool, Option("Separate files (FROM and ADAPTER), not merged; for Ollama before 0.34.1.")] = False
    file_type: _Type = "f16"


@dataclass(frozen=True, kw_only=True)
class CompressedOptions:
    """The numbers of a compressed model."""

    scheme: Annotated[Scheme, Option("8-bit floats, or 4-bit integers by GPTQ on training rows.")] = "fp8"


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """The published files, the statements of their card, and their destination."""

    merged: Annotated[bool, Option("Publish the merged model, not the adapter in PEFT's form.")] = False
    base_model: Annotated[str | None, Option("Hub id of the base.", default="base_model, if it is a hub id")] = None
    model_license: Annotated[
        str | None, Option("License as the hub names it, such as apache-2.0.", name="--license")
    ] = None
    push: Annotated[str | None, Option("Commit the folder to this repository (OWNER/NAME).", default="no push")] = None
    public: Annotated[bool, Option("With --push: make a new repository public.")] = False
