"""One question to the base, the best prompting arm and any adapters, on an engine in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from tunewright.adapters.lineage import system_prompt
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat.answers import grammar_compiler, stop_strings
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.versions import DatasetVersion, Member
from tunewright.engines.protocol import (
    AdapterFailedError,
    Delta,
    EngineStoppedError,
    RequestFailedError,
    stream,
)
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import ArmPlan, plan_of
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.prompt_search import advice_file, known_advice
from tunewright.generation.requests import Finish, Request
from tunewright.generation.text_stream import TextStream
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import EngineSpec, start_engine
from tunewright.serving.playground_answers import (
    BASE,
    PROMPTING,
    AnswerToken,
    Earlier,
    PlaygroundAnswer,
    conversation,
    shared_system,
)
from tunewright.serving.serve import choose_served, require_held

_LIKELIEST = 5  # tokens with their probabilities in each place
_ANSWER_TOKENS = 256  # without a dataset, whose answers decide otherwise


@dataclass(frozen=True)
class _Prepared:
    request: Request
    asked: str
    folder: Path | None = None


class Playground:
    """A base in memory, which answers without a server.

    Without a temperature it decodes greedily, as an evaluation does. Adapters are loaded when they are first asked.
    """

    def __init__(self, opened: OpenProject) -> None:
        self._opened = opened
        self.config: Config = opened.folder.config
        self._chat = opened.chat
        self._quantization, folders = choose_served(opened, ())
        self._pieces = grammar_compiler(self._chat)
        self._stops = stop_strings(self.config, self._chat)
        # Tokenizers are not safe in two threads at once.
        self._preparing = threading.Lock()
        self._runner: ArmRunner | None = None
        spec = EngineSpec(
            opened.base,
            self._chat,
            self._quantization,
            {},
            to_come=tuple(folders.values()),
            spare=self.config.serve.spare_adapters,
        )
        self._engine = start_engine(self.config.serve.engine, self.config, spec, opened.reporter)

    @property
    def in_flight(self) -> int:
        """The number of answers in progress."""
        return sum(self._engine.in_flight)

    def stop(self) -> None:
        """Free the base; unfinished answers fail."""
        self._engine.stop()

    async def answer(
        self,
        question: str,
        model: str,
        version: DatasetVersion | None,
        limit: int | None = None,
        *,
        earlier: Earlier = (),
        temperature: float = 0.0,
    ) -> AsyncGenerator[str | PlaygroundAnswer, None]:
        """Yield an answer's text as it is computed, then the whole. Closing the generator ends the computation.

        Args:
            model: `BASE`, `PROMPTING`, or an adapter's name.
            version: the dataset version with the demonstrations and the shared system turn, if there is one.
            limit: longest answer in tokens (None: as in an evaluation).
            earlier: the conversation so far, as this model answered.
            temperature: 0 takes the likeliest token each time, as an evaluation does; above 0 samples.
        """
        found = await asyncio.to_thread(self._prepare, question, model, version, limit, earlier)
        prepared = replace(found, request=replace(found.request, temperature=temperature))
        try:
            if prepared.folder is not None:
                assert prepared.request.adapter is not None
                await self._engine.load(prepared.request.adapter, prepared.folder)
            text, answered = TextStream(self._chat.text, self._stops), _Answered(self._pieces.piece)
            async with aclosing(stream(self._engine, prepared.request)) as deltas:
                async for delta in deltas:
                    if piece := answered.take(delta, text):
                        yield piece
                    if text.stopped:
                        break
        except (RequestFailedError, EngineStoppedError, AdapterFailedError) as error:
            raise UserError(f"{error}".rstrip("."), where=prepared.asked) from error
        except OSError as error:
            raise UserError(f"Its files cannot be read: {error.strerror}", where=prepared.asked) from error
        yield answered.whole(prepared)

    def _prepare(
        self, question: str, model: str, version: DatasetVersion | None, limit: int | None, earlier: Earlier
    ) -> _Prepared:
        """Return the request for a model, within the base's context."""
        with self._preparing:
            if model == PROMPTING:
                prepared = self._with_demonstrations(question, version, limit, earlier)
            elif model == BASE:
                prompt = self._prompt(question, shared_system(version), earlier)
                prepared = _Prepared(Request(prompt, None, self._limit(version, limit)), BASE)
            else:
                adapter = self._adapter(model)
                system = system_prompt(adapter, self._opened.folder.dataset).text
                request = Request(self._prompt(question, system, earlier), adapter.digest, self._limit(version, limit))
                prepared = _Prepared(request, adapter.name, adapter.folder)
        request = prepared.request
        room = self._engine.context_length - len(request.prompt_ids)
        if room < 1:
            raise UserError(
                f"The prompt has {len(request.prompt_ids):,} tokens, and the context length is "
                f"{self._engine.context_length:,} tokens for prompt and answer together",
                where=prepared.asked,
                fix="Shorten the question.",
            )
        reported = None if "logprobs" in self._engine.unsupported else _LIKELIEST
        within = min(request.max_new_tokens, room)
        return replace(prepared, request=replace(request, max_new_tokens=within, stop=(), logprobs=reported))

    def _prompt(self, question: str, system: str | None, earlier: Earlier) -> tuple[int, ...]:
        return self._chat.prompt(conversation(question, system, earlier))

    def _limit(self, version: DatasetVersion | None, limit: int | None) -> int:
        if limit is not None:
            return limit
        if version is None or not version.domain_of("train"):
            return self.config.evaluate.max_new_tokens or _ANSWER_TOKENS
        return self._arms(version).limit

    def _adapter(self, name: str) -> Adapter:
        found = next((each for each in list_adapters(self._opened.folder.adapters) if each.name == name), None)
        if found is None:
            raise UserError(f"The adapter {name} is missing", fix="It was removed. Ask another one.")
        require_held(self._opened, found, self._quantization)
        return found

    def _arms(self, version: DatasetVersion) -> ArmRunner:
        """Return the evaluation's own runner of arms on a version."""
        if self._runner is None or self._runner.version.digest != version.digest:
            config, opened = self.config, self._opened
            quantization = config.evaluate.quantization or config.train.quantization
            generator = Generator.of(opened.folder, opened.base, self._chat, quantization, opened.reporter)
            self._runner = ArmRunner(opened.folder, version, generator, opened.reporter)
        return self._runner

    def _with_demonstrations(
        self, question: str, version: DatasetVersion | None, limit: int | None, earlier: Earlier
    ) -> _Prepared:
        """Return the request of the best prompting arm, built by the evaluation's code."""
        if version is None:
            raise UserError("There are no rows yet, and so no prompting arms", where=PROMPTING)
        runner = self._arms(version)
        plan = _best(runner)
        example = Example((*conversation(question, shared_system(version), earlier), Message("assistant", "")))
        member = Member(example, example.pair_key, "test", example.pair_key)
        (prompt,) = runner.prompts(plan, [member])
        (request,) = runner.generator.requests(
            [prompt.ids], runner.limit if limit is None else limit, constrained=plan.constrained
        )
        return _Prepared(request, plan.name)


class _Answered:
    """The tokens and the text of an answer in progress."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._text = ""
        self._count = 0
        self._tokens: list[AnswerToken] = []
        self._finish: Finish = "stop"

    def take(self, delta: Delta, stream: TextStream) -> str:
        """Take new tokens, and return the text that they complete."""
        text = ""
        for place, token in enumerate(delta.ids):
            text += stream.push(token)
            self._count += 1
            if delta.logprobs:
                found = delta.logprobs[place]
                top = tuple((self._shown(likely), logprob) for likely, logprob in found.top[:_LIKELIEST])
                self._tokens.append(AnswerToken(self._shown(token), found.logprob, top))
            if stream.stopped:
                break
        if delta.finish and not stream.stopped:
            text += stream.flush()
            self._finish = delta.finish
        self._text += text
        return text

    def _shown(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")

    def whole(self, prepared: _Prepared) -> PlaygroundAnswer:
        """Return the complete answer."""
        return PlaygroundAnswer(
            self._text,
            self._finish,
            len(prepared.request.prompt_ids),
            self._count,
            tuple(self._tokens),
            prepared.asked,
            prepared.request.adapter,
        )


def _best(runner: ArmRunner) -> ArmPlan:
    """Return the best prompting arm on dev."""
    advice = known_advice(runner, advice_file(runner))
    if advice is None:
        raise UserError(
            "No prompting arm has been measured on this dataset version with this config",
            where=PROMPTING,
            fix="Start evaluate or advise on the page Project.",
        )
    plan = next(plan_of(arm) for arm in advice.arms if arm.name == advice.best)
    if plan.retriever == "dense":
        raise UserError(
            f"{plan.name} finds its demonstrations by the base's hidden states, which would load the base twice",
            where=PROMPTING,
        )
    return plan
