"""Preprocessing: from the body of an HTTP request to token ids and sampling, within the gateway's limits."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tunewright.chat import ChatFormat
from tunewright.chat.call_grammar import CallGrammars, call_grammar
from tunewright.chat.tool_calls import declared_functions
from tunewright.config import GatewayConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.engines.protocol import Engine
from tunewright.generation.constraints import Constraint, Grammar, GrammarCompiler
from tunewright.generation.requests import Request
from tunewright.generation.text_stream import Decode
from tunewright.serving.gateway.auth import Target
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue
from tunewright.serving.gateway.request import GenerationRequest, system_source
from tunewright.serving.gateway.schemas import MAX_PROMPTS, ChatRequest, CompletionRequest, RequestBody
from tunewright.serving.gateway.structured import Form, GrammarCache, require_size
from tunewright.serving.gateway.tools import AnswerReader

Ids = tuple[int, ...]

_BYTES_PER_TOKEN = 16
"""Bytes of a body per token of context: the longest prompt in ASCII. `_SPARE_BYTES` is for the other fields."""
_CHARACTERS_PER_TOKEN = 16
"""Four times the ratio of English text; longer prompts are refused before they cost any processor time."""
_SPARE_BYTES = 64 << 10
_INLINE_CHARACTERS = 4096
"""A prompt up to this length is tokenized in the event loop, which takes about a millisecond."""


@dataclass(frozen=True)
class Tokenization:
    """Conversion between text and token ids for one base.

    Args:
        render: converts messages to prompt ids with the base's chat template: the function that training uses. A
            UserError that it raises becomes a response with status 400.
        continuation: converts a text to continue to its ids, without the template. Its UserErrors also become 400.
        decode: converts an answer's ids to text, without special tokens.
        grammars: compiles constraints on an answer's text, and knows the bytes of each token.
        stops: texts that end every chat answer, in addition to the request's stop texts.
        chat: reads and constrains calls of functions; None means that there are no functions.
    """

    render: Callable[[Sequence[Message]], Ids]
    continuation: Callable[[str], Ids]
    decode: Decode
    grammars: GrammarCompiler
    stops: tuple[str, ...] = ()
    chat: ChatFormat | None = None


class RequestPreprocessor:
    """Tokenizes prompts, checks them against the limits, and makes generation requests of them."""

    def __init__(self, tokenization: Tokenization, limits: GatewayConfig, engine: Engine) -> None:
        self._tokenization = tokenization
        self._limits = limits
        self._engine = engine
        self._context = context = engine.context_length
        self._grammars = GrammarCache(tokenization.grammars)
        self._no_tools = _no_tools(tokenization.chat)
        self.body_bytes = limits.max_body_bytes or _BYTES_PER_TOKEN * context + _SPARE_BYTES
        # Tokenizing a long prompt takes half a second, which would block all streams in the event loop. There is one
        # thread, since tokenizers are not thread-safe; its queue is fair, so that no tenant waits for all of another's
        # prompts.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunewright-tokenizer")
        self._queue = AdmissionQueue(1)
        # Prompts arrive one by one: handing one to the tokenizer's own threads costs more than it saves.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def require_supported(self, body: RequestBody) -> None:
        """Check the fields that depend on the engine, the base or the config."""
        for field in sorted(self._engine.unsupported):
            if getattr(body, field, None):
                message = f"{field} is not supported by the engine {self._engine.name}: remove it."
                raise ApiError(message, param=field, code="unsupported_parameter")
        declares = isinstance(body, ChatRequest) and body.tools and body.conversation[0].role == "tools"
        if declares and self._no_tools is not None:
            message = f"Functions are not supported with this base: {self._no_tools}"
            raise ApiError(message, param="tools", code="tools_not_supported")
        if isinstance(body, ChatRequest):
            self._options(body)
        if body.choices > self._limits.max_n:
            raise ApiError(
                f"Too many answers: n is {body.choices} (limit {self._limits.max_n}).",
                param="n",
                code="too_many_choices",
            )
        prompts = 1 if isinstance(body, ChatRequest) else len(body.prompt)
        if prompts * body.choices > MAX_PROMPTS:
            message = f"Too many answers: {prompts} prompts with n {body.choices} (limit {MAX_PROMPTS} in all)."
            raise ApiError(message, param="n", code="too_many_choices")
        for token, _ in body.biases:
            if token >= self._tokenization.grammars.vocabulary:
                message = f"logit_bias: {token} is not a token (the base has {self._tokenization.grammars.vocabulary})."
                raise ApiError(message, param="logit_bias", code="invalid_value")

    async def constraint(self, body: RequestBody, grammar: str | None, tenant: str) -> Constraint | None:
        """Return the compiled form of the answer, text or calls; None means any.

        Args:
            grammar: the release's rule. A text's form applies to requests that set none; calls are constrained in
                requests that declare functions.
            tenant: the tenant for which the request waits for the compiler.
        """
        form = body.form
        if form is None and grammar is not None and CallGrammars.from_rule(grammar) is None:
            form = Form("model", Grammar(grammar))
        # Check the text's form by itself first: its faults have their own name.
        constraint = None if form is None else await self._grammars.constraint(form, tenant)
        if isinstance(body, ChatRequest) and body.may_call and (body.constrains_calls or grammar is not None):
            return await self._grammars.constraint(self._calls(body, _choice(body, grammar), form), tenant)
        return constraint

    def _calls(self, body: ChatRequest, choice: str, form: Form | None) -> Form:
        parameters = [tool.function.parameters or {} for tool in body.tools or ()]
        schemas = {body.parameters_param.format(number): schema for number, schema in enumerate(parameters)}
        for param, schema in schemas.items():
            require_size(schema, param)
        functions, parallel = declared_functions(body.conversation), body.parallel_tool_calls is not False
        assert self._tokenization.chat is not None, "require_supported() was called before"
        try:
            text = None if form is None else form.grammar
            grammar = call_grammar(self._tokenization.chat, functions, choice, parallel=parallel, text=text)
            return Form("tools", grammar, schemas)
        except UserError as error:
            raise ApiError(f"{error.what}.", param="tool_choice", code="invalid_value") from error

    async def close(self) -> None:
        """End the process that compiles grammars."""
        await self._grammars.close()

    async def prompts(self, body: RequestBody, tenant: str, system_prompt: str | None) -> list[Ids]:
        """Return the token ids of each prompt in the body."""
        if isinstance(body, ChatRequest) and len(body.messages) > self._limits.max_messages:
            message = f"Too many messages: {len(body.messages)} (limit {self._limits.max_messages})."
            raise ApiError(message, param=body.prompt_param, code="too_many_messages")
        longest = _characters(body) if isinstance(body, ChatRequest) else max(map(len, body.prompt))
        limit = _CHARACTERS_PER_TOKEN * self._context
        if longest > limit:
            message = (
                f"The prompt has {longest:,} characters (limit {limit:,} characters for a context length of "
                f"{self._context:,} tokens)."
            )
            raise ApiError(message, param=body.prompt_param, code="context_length_exceeded")
        try:
            # A change of threads takes longer than a short prompt does.
            characters = _characters(body) + len(system_prompt or "")
            if self._queue.idle and characters <= _INLINE_CHARACTERS:
                return self._ids(body, system_prompt)
            async with self._queue.slot(tenant, characters):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._ids, body, system_prompt)
        except UserError as error:
            param = body.prompt_param
            raise ApiError(str(error), param=param, code=f"invalid_{param}") from error

    def request(
        self,
        body: RequestBody,
        target: Target,
        prompt: Ids,
        *,
        tenant: str,
        arrived: float,
        max_tokens: int | None = None,
        choice: int = 0,
        constraint: Constraint | None = None,
    ) -> GenerationRequest:
        """Return the generation request of one prompt, and of the choice with this number of ``n``.

        Choices with a seed get consecutive seeds, as in vLLM, since they would be equal otherwise.

        A token limit above the rest of the context, or above ``gateway.max_completion_tokens``, is lowered to it; an
        answer that ends there has the ``finish_reason`` "length". Without a limit in the body, the prompt and its
        answer have at most ``max_tokens`` together. So a request with an SDK's defaults stays within its tenant's
        limit.
        """
        new_tokens = self._token_limit(body, target, len(prompt), max_tokens)
        engine_request = Request(
            prompt,
            target.digest,
            max_new_tokens=new_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else (body.seed + choice + 2**63) % 2**64 - 2**63,
            constraint=constraint,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.biases,
            logprobs=body.likeliest,
        )
        template_stops = self._tokenization.stops if isinstance(body, ChatRequest) else ()
        return GenerationRequest(
            body,
            target,
            engine_request,
            (*template_stops, *(body.stop or ())),
            decode=self._tokenization.decode,
            piece=self._tokenization.grammars.piece,
            reader=self._reader(body, target),
            limits=self._limits,
            tenant=tenant,
            arrived=arrived,
        )

    def _reader(self, body: RequestBody, target: Target) -> AnswerReader | None:
        """Return the reader of an answer that may have thinking or calls."""
        chat = self._tokenization.chat
        if not isinstance(body, ChatRequest) or chat is None:
            return None
        thinking = chat.thinking_with(self._options(body))
        if not body.may_call:
            return None if thinking is None else AnswerReader(chat, thinking, calls="none")
        return AnswerReader(chat, thinking, calls="auto" if _choice(body, target.grammar) == "auto" else "only")

    def _options(self, body: ChatRequest) -> dict[str, bool | str]:
        """Return the request's options of the chat template."""
        chat, effort = self._tokenization.chat, body.reasoning_effort
        options = dict(body.chat_template_kwargs or {})
        if not options and effort is None:
            return {}
        switches = {} if chat is None else chat.switches
        for name, value in options.items():
            _require_value(f"chat_template_kwargs.{name}", value, switches.get(name), "chat_template_kwargs")
        if effort is None:
            return options
        switch = next((name for name in ("enable_thinking", "thinking") if name in switches), None)
        thinks = chat is not None and chat.thinking is not None
        if "reasoning_effort" in switches or effort != "none" or (switch is None and thinks):
            _require_value(body.effort_param, effort, switches.get("reasoning_effort"), body.effort_param)
            options["reasoning_effort"] = effort
        elif switch is not None:
            options[switch] = False
        return options

    def _token_limit(self, body: RequestBody, target: Target, prompt_tokens: int, max_tokens: int | None) -> int:
        added = (
            " including the adapter's system prompt" if system_source(body, target.system_prompt) == "adapter" else ""
        )
        if (limit := self._limits.max_prompt_tokens) is not None and prompt_tokens > limit:
            message = f"The prompt is too long: {prompt_tokens} tokens{added} (limit {limit})."
            raise ApiError(message, param=body.prompt_param, code="prompt_too_long")
        room = self._context - prompt_tokens
        if room < 1:
            message = (
                f"The prompt has {prompt_tokens} tokens{added}, and the context length is {self._context} tokens for "
                "prompt and answer together."
            )
            raise ApiError(message, param=body.prompt_param, code="context_length_exceeded")
        lowered = min(room, self._limits.max_completion_tokens or room)
        if body.token_limit is None and max_tokens is not None:
            lowered = min(lowered, max(1, max_tokens - prompt_tokens))
        return min(lowered, body.token_limit or body.default_tokens or room)

    def _ids(self, body: RequestBody, system_prompt: str | None) -> list[Ids]:
        if isinstance(body, ChatRequest):
            messages = list(body.conversation)
            if system_prompt is not None and system_source(body, system_prompt) == "adapter":
                messages.insert(messages[0].role == "tools", Message("system", system_prompt))
            if options := self._options(body):
                assert self._tokenization.chat is not None, "options are refused without a chat template"
                return [self._tokenization.chat.prompt(messages, options)]
            return [self._tokenization.render(messages)]
        return [self._tokenization.continuation(text) for text in body.texts]


def _require_value(field: str, value: bool | str, values: tuple[bool | str, ...] | None, param: str) -> None:
    """Refuse a value that the base's chat template does not take; without values, the option itself."""
    if values is None:
        message = f"{field}: the base's chat template has no such option: remove it."
        raise ApiError(message, param=param, code="unsupported_parameter")
    if not any(type(value) is type(known) and value == known for known in values):
        named = ", ".join(json.dumps(known) for known in values)
        message = f"{field}: must be one of {named} (got {json.dumps(value)})."
        raise ApiError(message, param=param, code="invalid_value")


def _choice(body: ChatRequest, grammar: str | None) -> str:
    """Return the request's choice of functions; the release's if the request leaves the form of the answer open."""
    calls = None if grammar is None else CallGrammars.from_rule(grammar)
    return calls.choice if calls is not None and body.chosen == "auto" and body.form is None else body.chosen


def _no_tools(chat: ChatFormat | None) -> str | None:
    """Return why functions are not supported; None if they are."""
    if chat is None:
        return "it has no chat template."
    try:
        chat.tool_form  # noqa: B018 - it is found here, and not while a request waits
    except UserError as error:
        return f"{error.what}."
    return None


def _characters(body: RequestBody) -> int:
    if isinstance(body, CompletionRequest):
        return sum(map(len, body.prompt))
    thinking = sum(len(message.reasoning_content or "") for message in body.messages)
    if body.tools:
        return thinking + sum(len(message.text) for message in body.conversation)
    return thinking + sum(len(part.text) for message in body.messages for part in message.content or ())
