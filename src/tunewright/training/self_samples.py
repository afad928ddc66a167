"""Self-samples: conversations that the base writes, as a record of its abilities before the adapter, and their replay.

The base gets its own template up to where a user's text starts, and writes the user's turn, then the answer
(Magpie: Xu et al. 2024, arXiv 2406.08464). Both are drawn from its unmodified distribution, at temperature
1 with no truncation. So over such answers the mean of log p(base) - log p(adapter) is the KL divergence of
the two. This holds for answers up to the limit, including those that continue beyond it. Without the longer
ones it would be a mean over short answers, which a fine-tune on short answers makes likelier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import REPLAY
from tunewright.chat import ChatFormat, Tokens
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import Reporter, Task
from tunewright.data.dedup.decontaminate import read_items
from tunewright.data.examples import Example, Message, normalised
from tunewright.data.mix import exclusion_reasons
from tunewright.data.versions import DatasetVersion, Member
from tunewright.engines.choice import AnswerEngine, answer_engine
from tunewright.engines.vllm.answers import VllmAnswers
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Completion, Request
from tunewright.models.bases import Base
from tunewright.training import distributed
from tunewright.training.rows import encode_members, render_digest

METHOD = "magpie-3"
"""Part of every key: increment it when a change here, or in the decoding loop, changes the samples."""

TEMPERATURE, TOP_P = 1.0, 1.0
INSTRUCTION_TOKENS = 128
ANSWER_TOKENS = 256

_CHUNK = 64  # samples drawn and kept together, so that a resumed draw decodes the same batches
BATCH = 32
"""Samples that the embedded loop decodes together."""
_MOST_DRAWN, _FEWEST_CHUNKS = 8, 4  # give up after this many draws for each wanted sample, but not before 4 chunks

EMPTY, CUT_OFF, REPEATED = "empty", "cut off at the token limit", "repeats an earlier one"

Complete = Callable[[Sequence[Request], frozenset[int], Callable[[int, Completion], None]], list[Completion]]
"""Completes the base's requests in order, given its end tokens and a callback for each finished request."""

Screen = Callable[[Mapping[str, Example]], Mapping[str, str]]
"""Maps examples, by pair key, to the reasons why some of them may not be used."""


@dataclass(frozen=True)
class SelfSample:
    """One conversation as drawn; ``fault`` says why it is unusable."""

    number: int
    instruction: str
    answer: str
    finished: bool
    """True if the answer ended within the limit."""
    ids: tuple[int, ...]
    """The answer's ids as drawn, without its end token: its text may be encoded to other ids."""
    stopped: bool
    """True if an end token was drawn after them."""
    fault: str | None
    reasoning: str = ""
    """The thinking before the answer."""

    @property
    def example(self) -> Example:
        """The conversation."""
        answer = Message("assistant", self.answer, reasoning=self.reasoning)
        return Example((Message("user", self.instruction), answer))


@dataclass(frozen=True)
class Drawn:
    """The used samples in the order of the draw, and the reasons why others are unused, by number."""

    used: tuple[SelfSample, ...]
    left_out: Mapping[int, str]

    @property
    def text(self) -> str:
        """The samples as JSON lines: number and messages."""
        rows = [{"number": s.number, "messages": [m.as_dict() for m in s.example.messages]} for s in self.used]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def summary(self) -> str:
        """Return the numbers of drawn, used and unused samples in words."""
        counts: dict[str, int] = {}
        for reason in self.left_out.values():
            # Reasons that name a row ("nearly equal to the row 0123") count as one kind.
            kind = reason if reason in (EMPTY, CUT_OFF, REPEATED) else "not allowed in training"
            counts[kind] = counts.get(kind, 0) + 1
        why = "; ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda c: -c[1]))
        drawn = len(self.used) + len(self.left_out)
        return f"{len(self.used)} of {drawn} samples written by the base are used" + (f" ({why})" if why else "")


class Sampler:
    """Reproducible draws of a base's own conversations, cached in the working folder.

    ``weights`` are further inputs of the draw, such as the base's dtype and the engine.
    ``complete`` has the base write, with any adapter disabled; it is called only if samples are
    missing. Draws of one seed for different purposes are independent. If ``wanted`` are requested,
    up to half as many more are drawn together.
    """

    def __init__(
        self,
        base: Base,
        chat: ChatFormat,
        weights: Mapping[str, Any],
        complete: Complete,
        seed: int,
        purpose: str,
        work: Path,
        reporter: Reporter,
        wanted: int | None = None,
    ) -> None:
        self.chat = chat
        # In half as many more, enough are usable; a second chunk would take as long as the first.
        self.chunk = _CHUNK if wanted is None else min(_CHUNK, wanted + wanted // 2)
        self.complete = complete
        self.seed = f"{seed}:{purpose}"
        self.reporter = reporter
        self.about = {
            "method": METHOD,
            "base": base.digest,
            "template": chat.digest,
            "weights": dict(weights),
            "seed": self.seed,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "instruction_tokens": INSTRUCTION_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "chunk": self.chunk,
            "batch": BATCH,
        }
        self.folder = work / "self-samples" / digest(self.about)[:16]

    def draw(self, wanted: int, screen: Screen, *, finished: bool) -> Drawn:
        """Return the first ``wanted`` complete, new samples that pass the screen, and why others do not.

        Fewer are returned, with a warning, if most samples are unusable. ``finished`` leaves out
        answers that were cut off at the limit.
        """
        used: list[SelfSample] = []
        left_out: dict[int, str] = {}
        asked: set[str] = set()
        most = max(_FEWEST_CHUNKS * _CHUNK, wanted * _MOST_DRAWN)
        for chunk in range(-(-most // self.chunk)):
            samples = self._chunk(chunk)
            reasons: dict[int, str] = {}
            for sample in samples:
                question = normalised(sample.instruction)
                cut_off = CUT_OFF if finished and not sample.finished else None
                if why := sample.fault or cut_off or (REPEATED if question in asked else None):
                    reasons[sample.number] = why
                else:
                    asked.add(question)
            whole = {s.example.pair_key: s for s in samples if s.number not in reasons}
            screened = screen({key: sample.example for key, sample in whole.items()}) if whole else {}
            reasons |= {whole[key].number: reason for key, reason in screened.items()}
            for sample in samples:
                if len(used) == wanted:
                    return Drawn(tuple(used), left_out)
                if sample.number in reasons:
                    left_out[sample.number] = reasons[sample.number]
                else:
                    used.append(sample)
            if len(used) == wanted:
                break
        drawn = Drawn(tuple(used), left_out)
        if not used:
            raise UserError(
                f"The base writes no usable sample: {drawn.summary()}",
                where="train.replay",
                fix="Mix in instruction data instead (data.mix), or use an instruction-tuned base.",
            )
        if len(used) < wanted:
            self.reporter.warn(f"Fewer samples than the {wanted} requested: {drawn.summary()}.")
        return drawn

    def _chunk(self, chunk: int) -> list[SelfSample]:
        file = self.folder / f"{chunk:04d}.json"
        if not file.exists():
            numbers = range(chunk * self.chunk, (chunk + 1) * self.chunk)
            write_json(file, [asdict(sample) for sample in self._write(numbers)])
        return [SelfSample(**{**row, "ids": tuple(row["ids"])}) for row in json.loads(file.read_text(encoding="utf-8"))]

    def _write(self, numbers: range) -> list[SelfSample]:
        """Have the base write these samples."""
        chat, turn = self.chat, self.chat.user_turn()
        with self.reporter.task(
            f"The base writes samples {numbers[0] + 1} to {numbers[-1] + 1}", 2 * len(numbers), "turns"
        ) as task:
            opening = dict.fromkeys(numbers, turn.opening)
            asked = self._continue(opening, "instruction", INSTRUCTION_TOKENS, turn.end_ids, task)
            instructions = {n: _instruction(chat, turn.end_text, written) for n, written in asked.items()}
            prompts = {n: chat.prompt([Message("user", text)]) for n, text in instructions.items() if text}
            answered = self._continue(prompts, "answer", ANSWER_TOKENS, chat.stop_ids, task)
            task.advance(len(numbers) - len(prompts))
        samples = []
        for number, instruction in instructions.items():
            if not instruction:
                why = CUT_OFF if instruction is None else EMPTY
                samples.append(SelfSample(number, "", "", finished=False, ids=(), stopped=False, fault=why))
                continue
            drawn = answered[number]
            answer, reasoning, finished = _answer(chat, turn.begin_text, drawn)
            fault = None if answer else EMPTY
            stopped = drawn.finish == "stop"
            samples.append(SelfSample(number, instruction, answer, finished, drawn.ids, stopped, fault, reasoning))
        return samples

    def _continue(
        self, prompts: Mapping[int, tuple[int, ...]], turn: str, limit: int, ends: frozenset[int], task: Task
    ) -> dict[int, Completion]:
        requests = []
        for number, ids in prompts.items():
            # Each turn has its own seed, so it depends on no other sample; torch takes seeds below 2^63.
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{number}:{turn}".encode()).digest()[:8]) >> 1
            requests.append(Request(ids, None, limit, TEMPERATURE, TOP_P, seed))
        if not requests:
            return {}
        completions = self.complete(requests, ends, lambda _index, _completion: task.advance())
        return dict(zip(prompts, completions, strict=True))


def _instruction(chat: ChatFormat, end_text: str | None, turn: Completion) -> str | None:
    """Return the base's text for the user turn; None if the turn did not end.

    A base without an end-of-turn token ends the turn with the template's own text, or never learnt
    to end it: then the turn ends at the first empty line.
    """
    text = chat.text(turn.ids)
    if end_text is not None:
        instruction, mark, _ = text.partition(end_text)
        if not mark:
            instruction, mark, _ = text.lstrip().partition("\n\n")
        return instruction.strip() if mark or turn.finish == "stop" else None
    return text.strip() if turn.finish == "stop" else None


def _answer(chat: ChatFormat, begin_text: str | None, turn: Completion) -> tuple[str, str, bool]:
    """Return the base's answer, its thinking, and whether the answer ended, by an end token or the next turn."""
    message = chat.answer(turn.ids, ())
    text, reasoning = message.content, "" if chat.reasoning == "strip" else message.reasoning
    if begin_text is not None and begin_text in text:
        return text.partition(begin_text)[0].strip(), reasoning, True
    if turn.finish == "stop":
        return text.strip(), reasoning, True
    return text.strip().rstrip("\ufffd"), reasoning, False  # without a character that was cut in half


@dataclass(frozen=True)
class Replay:
    """Rows to train on in addition to the version's, and their record with the adapter; empty without replay."""

    rows: list[Tokens]
    members: list[Member]
    """The example of each row."""
    lineage: dict[str, Any]
    files: dict[str, str]


def replay_inputs(project: ProjectFolder) -> dict[str, Any]:
    """Return the inputs of the replayed rows, apart from version, base, template, seed and train section.

    It is empty without replay.
    """
    if project.config.train.replay is None:
        return {}
    data = project.config.data
    screened = {
        "dedup_threshold": data.dedup_threshold,
        "allow": data.allow,
        "benchmarks": digest(_benchmarks(project)),
    }
    return {"replay": {"method": METHOD, **screened, **_engine(project).identity}}


def _engine(project: ProjectFolder) -> AnswerEngine:
    """Return the engine that writes samples: the engine of evaluation, if it can hold the base as training does."""
    config = project.config
    if distributed.world_size() > 1:
        return AnswerEngine("peft", "several processes train together, each on its own GPU")
    if config.train.quantization == "nf4":
        return AnswerEngine("peft", "the base is held in NF4")
    return answer_engine(config, config.train.quantization)


def draw_replay(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    load: Callable[[], Any],
    limit: int,
    reporter: Reporter,
) -> Replay:
    """Draw the rows of the config's train.replay, none similar to the version's or longer than ``limit`` tokens.

    ``load`` returns the loaded base; it is called only if samples are missing and vLLM does not write them.
    """
    config, settings = project.config, project.config.train
    if settings.replay is None:
        return Replay([], [], {}, {})
    wanted, engine, loaded, size = settings.replay.samples, _engine(project), cache(load), BatchSize(BATCH)
    screen = sample_filter(project, version, chat, limit, reporter)
    vllm: VllmAnswers | None = None
    if engine.environment is not None:
        rows = config.evaluate.batch_size
        vllm = VllmAnswers(base, settings.dtype, engine.environment, rows, settings.lora_r, reporter)

    def complete(
        requests: Sequence[Request], ends: frozenset[int], on_finished: Callable[[int, Completion], None]
    ) -> list[Completion]:
        if vllm is not None:
            return vllm.generate(requests, stop_ids=ends, on_finished=on_finished)
        pad = chat.tokenizer.pad_token_id
        return generate_halving(loaded(), requests, size, reporter, stop_ids=ends, pad_id=pad, on_finished=on_finished)

    inputs = {"dtype": settings.dtype, "quantization": settings.quantization, **engine.identity}
    sampler = Sampler(base, chat, inputs, complete, config.seed, "replay", project.work, reporter, wanted)
    try:
        drawn = sampler.draw(wanted, screen, finished=True)
    finally:
        if vllm is not None:
            vllm.stop()
    reporter.say(f"Replay: {drawn.summary()}.")
    encoded = encode_members(chat, [_member(sample.example) for sample in drawn.used], limit)
    lineage = {
        **sampler.about,
        "samples": len(drawn.used),
        "digest": digest(drawn.text),
        "rendering": render_digest(encoded.rows),
        "rows": len(encoded.rows),
        "trained_tokens": sum(sum(row.loss_mask) for row in encoded.rows),
        "left_out": {str(number): reason for number, reason in drawn.left_out.items()},
    }
    return Replay(encoded.rows, encoded.members, {"replay": lineage}, {REPLAY: drawn.text})


def sample_filter(
    project: ProjectFolder, version: DatasetVersion, chat: ChatFormat, limit: int, reporter: Reporter
) -> Screen:
    """Return a filter of samples that are like the domain or a benchmark, too long, or faulty."""
    benchmarks = _benchmarks(project)

    def screen(examples: Mapping[str, Example]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for key, example in examples.items():
            encoded = encode_members(chat, [_member(example)], limit)
            if encoded.faults or encoded.too_long:
                reasons[key] = encoded.faults[0] if encoded.faults else f"longer than {limit:,} tokens"
        fit = {key: example for key, example in examples.items() if key not in reasons}
        if fit:
            reasons |= exclusion_reasons(fit, version.domain, project.config.data, benchmarks, reporter, "samples")
        return reasons

    return screen


def _member(example: Example) -> Member:
    return Member(example, example.pair_key, "train", example.pair_key, mixed=True)


def _benchmarks(project: ProjectFolder) -> dict[str, list[str]]:
    return {name: read_items(project.root / name) for name in project.config.data.benchmarks}
