"""Exports of an adapter, each compared with the trained model; here the options of publishing one on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tunewright.core.options import Option


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
