"""What the reference is generated from: the only place here that names modules of tunewright."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import tunewright.serving
from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import Manifest as AdapterManifest
from tunewright.api import Project, ProjectAdapters, ProjectData, ProjectExport, ProjectShadow
from tunewright.cli import GROUPS as MODULES
from tunewright.cli import commands
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.options import Option
from tunewright.data.options import AddOptions, ColumnMapping, RemoveOptions
from tunewright.data.readers.row_errors import CODES as ROW_ERRORS
from tunewright.data.versions.version import Manifest as VersionManifest
from tunewright.evaluation.training_runs import TrainingRuns
from tunewright.evidence.learning_curve import Curve
from tunewright.evidence.prompt_optimization import OptimizedPrompt
from tunewright.evidence.schema import Advice, Evidence, Item
from tunewright.evidence.verdict import Verdict
from tunewright.export import CompressedOptions, GgufOptions, HubOptions, OllamaOptions
from tunewright.pipeline import RunResult
from tunewright.serving.gateway.app import ROUTES
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.messages_api import MessagesRequest, error_document
from tunewright.serving.gateway.responses_api import ResponsesRequest
from tunewright.serving.gateway.schemas import (
    MAX_FEEDBACK_BYTES,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
)
from tunewright.serving.options import (
    DeployOptions,
    EngineOptions,
    ReleaseTestOptions,
    ServeOptions,
    ShadowPlanOptions,
)
from tunewright.serving.tenants import State
from tunewright.serving.tenants.audit import Audit
from tunewright.serving.tenants.feedback import Feedback
from tunewright.serving.tenants.releases import Releases
from tunewright.serving.tenants.tenants import Keys, Tenants
from tunewright.serving.tenants.usage import Usage, UsageRollup
from tunewright.training.options import MemoryOptions, SweepOptions

__all__ = [
    "API",
    "COMMANDS",
    "DOCUMENTS",
    "GROUPS",
    "MAX_FEEDBACK_BYTES",
    "MODULES",
    "OPTIONS",
    "REQUESTS",
    "ROUTES",
    "ROW_ERRORS",
    "SERVING_SOURCE",
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "Config",
    "FeedbackRequest",
    "MessagesRequest",
    "Option",
    "ResponsesRequest",
    "error_document",
    "parse_request",
]

COMMANDS: Any = typer.main.get_command(commands())
SERVING_SOURCE = Path(tunewright.serving.__path__[0])


def functions_of(group: type) -> tuple[Any, ...]:
    """Return the functions of a project that a class has as methods."""
    return tuple(each for each in vars(group).values() if inspect.isfunction(each) and "." not in each.__qualname__)


REQUESTS: dict[str, type[ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest]] = {
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/responses": ResponsesRequest,
    "POST /v1/messages": MessagesRequest,
}
"""Models of requests by route."""

OPTIONS = (
    AddOptions,
    ColumnMapping,
    CompressedOptions,
    DeployOptions,
    EngineOptions,
    GgufOptions,
    HubOptions,
    ImportOptions,
    MemoryOptions,
    OllamaOptions,
    SweepOptions,
    ReleaseTestOptions,
    RemoveOptions,
    ServeOptions,
    ShadowPlanOptions,
)
"""Options classes, whose fields are documented by their `Option`."""

GROUPS = {
    "project": Project,
    "project.data": ProjectData,
    "project.adapters": ProjectAdapters,
    "project.export": ProjectExport,
    "project.shadow": ProjectShadow,
}
"""Classes whose methods are verbs, by the expression that returns them."""

API: dict[str, tuple[Any, ...]] = {
    "The project": (
        Project,
        *functions_of(Project),
        DeployOptions,
        ReleaseTestOptions,
        ServeOptions,
        EngineOptions,
        MemoryOptions,
        SweepOptions,
    ),
    "project.data": (ProjectData, *functions_of(ProjectData), AddOptions, ColumnMapping, RemoveOptions),
    "project.adapters": (*functions_of(ProjectAdapters), ImportOptions),
    "project.export": (*functions_of(ProjectExport), CompressedOptions, GgufOptions, HubOptions, OllamaOptions),
    "project.shadow": (*functions_of(ProjectShadow), ShadowPlanOptions),
    "project.keys": (TrustedKeys,),
    "project.runs": (TrainingRuns,),
    "project.state": (State, Tenants, Keys, Usage, UsageRollup, Feedback, Releases, Audit),
    "Results": (RunResult, Verdict, Evidence, Advice),
    "Errors": (UserError,),
}
"""Classes and functions of the Python API by heading."""

DOCUMENTS: dict[str, tuple[type[BaseModel], str]] = {
    "config": (Config, "`tunewright.yaml`: the configuration of a project."),
    "version-manifest": (VersionManifest, "`dataset/versions/DIGEST/manifest.json`: one dataset version."),
    "adapter-manifest": (AdapterManifest, "`adapters/NAME/manifest.json`: every file of an adapter, and its sources."),
    "advice": (Advice, "`evaluations/advice-ID.json`: prompting arms measured on the dev split."),
    "evidence": (Evidence, "`evaluations/ID/evidence.json`: everything a verdict rests on."),
    "items": (Item, "`evaluations/ID/items.jsonl`: one test item a line, with every arm's answer."),
    "optimized-prompt": (OptimizedPrompt, "`prompts/ID.json`: an optimized prompt with its history."),
    "learning-curve": (Curve, "`curves/ID/curve.json`: scores over the number of training rows."),
}
"""JSON documents on disk that a pydantic model reads: name, model, where it lies."""
