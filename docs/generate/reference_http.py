"""The HTTP reference: routes, request fields and error codes, from the gateway's own declarations."""

from __future__ import annotations

import ast
import json
from typing import Any

from reference_config import described
from reference_sources import (
    MAX_FEEDBACK_BYTES,
    REQUESTS,
    ROUTES,
    SERVING_SOURCE,
    ApiError,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    MessagesRequest,
    ResponsesRequest,
    error_document,
    parse_request,
)

_PURPOSE = {
    "POST /v1/chat/completions": "Answer a conversation; with `stream: true` as server-sent events.",
    "POST /v1/completions": "Continue one text or several, without the chat template.",
    "POST /v1/responses": "Answer messages as chat completions do, in the format of OpenAI's responses API; nothing is "
    "stored.",
    "POST /v1/messages": "Answer messages as chat completions do, in Anthropic's format.",
    "POST /v1/feedback": "Store a tenant's feedback on one of its responses.",
    "GET /v1/models": "List the models that the caller may use.",
    "GET /v1/models/NAME": "Describe one of them.",
    "GET /ready": "`200` while requests are answered; `503` while the server drains, or its engine or state is down.",
    "GET /health": "`200` while the process works; `503` once its engine has stopped for good.",
}


_WITHOUT_EFFECT = {
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "cache_control",
}

_Request = type[ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest]


def pages() -> dict[str, str]:
    """Return the reference's page by its path in the site."""
    out = [
        "# HTTP API\n",
        "`tunewright serve` answers these routes in OpenAI's format and one in Anthropic's, so their SDKs and "
        "frameworks built on them work with another base URL. A field that would change the answer and is not listed "
        "here is refused by name, with status 400. Fields that SDKs send with a value of no effect are accepted.\n",
        "## Routes\n",
        "| route | purpose |",
        "| --- | --- |",
        *(f"| `{route}` | {_PURPOSE[route]} |" for route in ROUTES),
        "",
        "A request with `x-tunewright-record: off` is never recorded. "
        "Every answer carries `x-tunewright-adapter` (the digest of the adapter that answered, or `none`) and "
        "`x-tunewright-system` (where the system prompt came from).\n",
        "```bash",
        "curl http://127.0.0.1:8000/v1/chat/completions \\",
        "  -H 'content-type: application/json' \\",
        '  -d \'{"model": "legal", "messages": [{"role": "user", "content": "District Court, D. Minnesota"}]}\'',
        "```\n",
        *(line for route, model in REQUESTS.items() for line in _request(route, model)),
        *_feedback(),
        *_errors(),
    ]
    return {"reference/http.md": "\n".join(out)}


def _request(route: str, model: _Request) -> list[str]:
    accepted = [
        f"| `{field.alias or name}` | {described(field.annotation, tuple(field.metadata))} | "
        f"{'required' if field.is_required() else 'accepted' if name in _WITHOUT_EFFECT else 'honoured'} |"
        for name, field in model.model_fields.items()
    ]
    escape_control_character = [f"| `{name}` | {_values(values)} |" for name, values in sorted(model.neutral.items())]
    return [
        f"## {route.removeprefix('POST /v1/').replace('/', ' ').capitalize()}\n",
        f"`{route}`\n",
        "| field | type | |",
        "| --- | --- | --- |",
        *accepted,
        "",
        "*Honoured* fields change the answer. *Accepted* ones change nothing of it: labels, and hints for "
        "storage, cache and queue.\n",
        "Every other field is accepted with `null`, `false`, `0`, `[]` or `{}`, which change nothing. These fields "
        "have other values without effect, and are accepted with them alone:\n",
        "| field | accepted values |",
        "| --- | --- |",
        *escape_control_character,
        "",
        "Any other field or value is refused:\n",
        "```json",
        json.dumps(_refusal(model), indent=2),
        "```\n",
    ]


def _feedback() -> list[str]:
    return [
        "## Feedback\n",
        "`POST /v1/feedback`\n",
        "| field | type | |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | {described(field.annotation, tuple(field.metadata))} | "
            f"{'required' if field.is_required() else 'optional'} |"
            for name, field in FeedbackRequest.model_fields.items()
        ),
        "",
        f"At least one optional field must be set. The body has at most {MAX_FEEDBACK_BYTES:,} bytes. `id` is the id "
        "of a response that the tenant received. Feedback with the same `id` replaces the earlier feedback. The "
        "reply's `status` is `recorded`, `replaced`, or `unchanged` for the same feedback again. `redacted` counts the "
        "secrets and personal data that placeholders replaced, by kind.\n",
        "```json",
        json.dumps(
            {"id": "chatcmpl-…", "object": "feedback", "status": "recorded", "redacted": {"email": 1}},
            indent=2,
            ensure_ascii=False,
        ),
        "```\n",
    ]


def _refusal(model: _Request) -> dict[str, Any]:
    """Return the answer to a field that is not supported, as the gateway itself gives it."""
    subjects: dict[type, dict[str, Any]] = {
        ChatRequest: {"messages": [{"role": "user", "content": "?"}]},
        CompletionRequest: {"prompt": "?"},
        ResponsesRequest: {"input": "?"},
        MessagesRequest: {"max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    }
    body = {"model": "legal", "cache_salt": "mine", **subjects[model]}
    try:
        parse_request(model, json.dumps(body).encode())
    except ApiError as error:
        return error_document(error) if model is MessagesRequest else error.body
    raise AssertionError("cache_salt is accepted: choose another field for the example")


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in (None, *values))


def _errors() -> list[str]:
    found = sorted(set(refusals()))
    return [
        "## Errors\n",
        'An error has OpenAI\'s shape: `{"error": {"message", "type", "param", "code"}}`. Programs should read '
        "`code`; messages may change. In the table, braces stand for values of the request. An error of `/v1/messages` "
        'has the same status in Anthropic\'s shape: `{"type": "error", "error": {"type", "message"}}`.\n',
        "| code | status | message |",
        "| --- | --- | --- |",
        *(f"| `{code}` | {status} | {message} |" for code, status, message in found),
        "",
    ]


def refusals() -> list[tuple[str, str, str]]:
    """Return code, status and message of every error in the gateway's source."""
    found = []
    for file in sorted(SERVING_SOURCE.rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                found += [entry for call in calls if (entry := _refusal_of(call, function)) is not None]
    return found


def _refusal_of(call: ast.Call, function: ast.AST) -> tuple[str, str, str] | None:
    """Return the code, status and message of a call that makes an error; None for another call."""
    if not isinstance(call.func, ast.Name) or call.func.id != ApiError.__name__ or not call.args:
        return None
    options = {option.arg: option.value for option in call.keywords}
    code, status, message = _text(options.get("code")), options.get("status"), call.args[0]
    if not code:
        return None
    number = "400" if status is None else ast.unparse(status)
    text = _assigned(message, function) if isinstance(message, ast.Name) else _text(message)
    return code, number if number.isdigit() else "404, 405", text or "*the reason in words*"


def _assigned(name: ast.Name, function: ast.AST) -> str:
    """Return the text that a variable has where it is used: the nearest assignment above."""
    above = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and node.lineno < name.lineno
        and any(isinstance(target, ast.Name) and target.id == name.id for target in node.targets)
    ]
    return _text(max(above, key=lambda node: node.lineno).value) if above else ""


def _text(node: ast.expr | None) -> str:
    """Return a string's text, an f-string's values in braces; empty for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [
            f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else _text(part)
            for part in node.values
        ]
        text = "".join(parts)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = _text(node.left) + _text(node.right)
    else:
        return ""
    return text.replace("|", "\\|")
