"""The gateway's errors, in OpenAI's format (https://platform.openai.com/docs/guides/error-codes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An error in OpenAI's format.

    Args:
        message: the fault and its remedy.
        status: the HTTP status.
        param: the body's field at fault.
        code: an identifier for programs.
        kind: OpenAI's ``type``, if the status does not imply it.
        headers: headers of the response.
    """

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
