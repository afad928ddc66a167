"""The gateway's errors, in OpenAI's format (https://platform.openai.com/docs/guides/error-codes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.serving.tenants.database import StateUnavailableError


class ApiError(Exception):
    """An error in OpenAI's format."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


AnyError = ApiError | RequestFailedError | EngineStoppedError | StateUnavailableError


def as_api_error(error: AnyError) -> ApiError:
    """Return the error as the client sees it."""
    if isinstance(error, ApiError):
        return error
    later = {"Retry-After": "5"}
    if isinstance(error, StateUnavailableError):
        message = "Authentication is temporarily unavailable."
        return ApiError(message, status=503, code="state_unavailable", headers=later)
    if isinstance(error, EngineStoppedError):
        return ApiError(str(error), status=503, code="engine_stopped", headers=later)
    return ApiError(str(error), status=500, code="request_failed")
