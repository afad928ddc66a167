"""The gateway's errors in OpenAI's format, and request bodies, whose faults become such errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

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
        message = "The serving state is temporarily unavailable."
        return ApiError(message, status=503, code="state_unavailable", headers=later)
    if isinstance(error, EngineStoppedError):
        return ApiError(str(error), status=503, code="engine_stopped", headers=later)
    return ApiError(str(error), status=500, code="request_failed")


_EMPTY: tuple[Any, ...] = (False, 0, [], {})
"""Neutral values of an undeclared field, besides null: an option that is off, or an empty list."""


class Part(BaseModel):
    """A part of a body; undeclared fields must have a neutral value.

    ``neutral`` lists the neutral values of fields to which :data:`_EMPTY` does not apply; null is always neutral.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        declared = {field.alias or name for name, field in cls.model_fields.items()}

        def is_neutral(field: str, value: Any) -> bool:
            known = ((one, isinstance(one, bool)) for one in cls.neutral.get(field, _EMPTY))
            # False == 0 in Python, but as `logprobs` they differ.
            return value is None or (value, isinstance(value, bool)) in known

        return {field: value for field, value in data.items() if field in declared or not is_neutral(field, value)}


def one_as_list(make: Callable[[str], Any] = str) -> BeforeValidator:
    """Return a validator that converts a plain string to a list with one part."""
    return BeforeValidator(lambda given: [make(given)] if isinstance(given, str) else given)


R = TypeVar("R", bound=Part)

_MAX_FAULTS = 10
_MAX_PARAM = 100


def parse_request(kind: type[R], body: bytes) -> R:
    """Return the validated body."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def as_request(kind: type[R], fields: Mapping[str, Any], names: Mapping[str, str]) -> R:
    """Return the request that another request becomes; some of its fields are checked only now.

    Args:
        kind: the request's.
        fields: its fields.
        names: fields of the other request, by the beginning of their name in this one. Its tools have no ``function``.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as invalid:
        error = _refusal(invalid)
    except ApiError as refusal:
        error = refusal
    param = error.param or ""
    other = next((other for name, other in names.items() if param.startswith(name)), param.replace(".function", ""))
    if other == param:
        raise error
    raise ApiError(error.message.replace(param, other), param=other, code=error.code) from error


def _refusal(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_input=False)
    faults = [_fault(details) for details in errors[:_MAX_FAULTS]]
    message = " ".join(fault.message for fault in faults)
    if len(errors) > _MAX_FAULTS:
        message += f" {len(errors) - _MAX_FAULTS} more errors."
    return ApiError(message, param=faults[0].param, code=faults[0].code)


def _fault(details: ErrorDetails) -> ApiError:
    # In brackets are the kind of a part, and pydantic's mark for a fault of a key itself.
    param = ".".join(str(place) for place in details["loc"] if not str(place).startswith("[")) or None
    if param is not None and len(param) > _MAX_PARAM:  # the client chose the name: an error must not repeat a megabyte
        param = f"{param[:_MAX_PARAM]}…"
    if details["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {details['msg']}.", code="invalid_json")
    if details["type"] == "extra_forbidden":
        message = f"{param} is not supported: remove it."
        return ApiError(message, param=param, code="unsupported_parameter")
    if details["type"] == "missing":
        return ApiError(f"{param} is missing.", param=param, code="missing_required_parameter")
    where = param or "The body"
    return ApiError(f"{where}: {details['msg']}.", param=param, code="invalid_value")
