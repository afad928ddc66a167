"""vLLM for whole lists of requests, as evaluation and self-samples have, where no reader waits for single tokens."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.progress import Reporter
from tunewright.engines.environment import Environment
from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.engines.vllm.engine import RANKS, VllmEngine, VllmSettings, kv_cache_bytes, max_rank
from tunewright.generation.requests import Completion, Request, Row
from tunewright.generation.text_stream import Decode
from tunewright.models.bases import Base
from tunewright.models.families import read_config

_GIB = 1 << 30
_ROWS_BY_CARD = ((20, 64), (40, 128))
_MOST_ROWS = 256
_SPARE_SHARE = 0.05
_WHERE = "evaluate.engine"


class VllmStoppedError(UserError):
    """vLLM crashed or hung; a new one may answer."""


class VllmAnswers:
    """vLLM for lists of requests, started by the first list; at most one adapter is loaded at a time.

    The process ends with :meth:`stop`, when this object is garbage collected, and when the interpreter exits.

    Args:
        card: bytes of the GPU that decides the number of rows (default: this process's GPU).
        threads: number of threads that compute without a GPU (default: as many as in this process).
    """

    def __init__(
        self,
        base: Base,
        dtype: str,
        environment: Environment,
        batch_size: int,
        rank: int,
        reporter: Reporter,
        *,
        card: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._environment = environment
        self._rank = rank  # adapters up to this rank are loaded without a restart
        self._reporter = reporter
        self._batch_size = batch_size  # the number without a GPU; otherwise its memory decides
        self._card = card
        self._variables = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._engine: VllmEngine | None = None
        self._loaded: str | None = None
        self._end: Callable[[], object] = lambda: None  # also runs at the interpreter's exit

    @cached_property
    def rows(self) -> int:
        """The number of rows that decode at once."""
        if self._environment.build == "cpu":
            return self._batch_size
        return rows_at_once(_card_memory()[1] if self._card is None else self._card)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        stop_ids: Collection[int],
        decode: Decode | None = None,
        adapters: Mapping[str, Path] | None = None,
        at_once: int | None = None,
        tenant: str = "",
        on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
    ) -> list[Completion]:
        """Answer all requests, and return the completions in the requests' order.

        Args:
            requests: requests without constraints; an adapter is named by its digest.
            decode: needed if requests have stop strings.
            adapters: the folder of the requests' adapter, by digest; at most one.
            at_once: maximum number of concurrent requests to vLLM; None: enough to keep it full.
            tenant: cached prefixes are reused under the same name only.
            on_finished: called with a request's index and its completion as soon as it is finished, in any order, and
                in another thread if this one runs an event loop.
        """
        named = adapters or {}
        assert len(named) <= 1
        engine = self._started(max([self._rank, max_rank(list(named.values()))]))
        for digest, folder in named.items():
            if digest == self._loaded:
                continue
            if self._loaded is not None:
                self._run(engine.unload(self._loaded))
                self._loaded = None
            self._run(engine.load(digest, folder))
            self._loaded = digest
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
        if longest > engine.context_length:
            raise UserError(
                f"A prompt and its answer need {longest:,} tokens (vLLM's limit: {engine.context_length:,})",
                where=_WHERE,
                fix="Set it to peft, or lower evaluate.max_new_tokens or evaluate.num_fewshot.",
            )

        completions: dict[int, Completion] = {}
        waiting = deque(enumerate(requests))

        async def work() -> None:
            while waiting:
                index, request = waiting.popleft()
                completions[index] = await _completed(engine, request, stop_ids, decode, tenant)
                on_finished(index, completions[index])

        async def answer_all() -> None:
            # Twice as many as decode at once, so that a request is waiting when a row becomes free.
            workers = 2 * self.rows if at_once is None else at_once
            await asyncio.gather(*(work() for _ in range(min(workers, len(requests)))))

        self._run(answer_all())
        return [completions[index] for index in range(len(requests))]

    def stop(self) -> None:
        """Stop vLLM and free its memory; the next :meth:`generate` starts it again."""
        self._end()
        self._engine, self._loaded = None, None

    def _started(self, rank: int) -> VllmEngine:
        if self._engine is not None and rank <= self._rank:
            return self._engine
        self.stop()
        self._rank = rank
        cpu = self._environment.build == "cpu"
        config = read_config(self._base.folder / "config.json")
        settings = VllmSettings(
            python=self._environment.python,
            cpu=cpu,
            base=self._base.folder,
            dtype=self._dtype,
            room=1,
            max_rank=min(rank, RANKS[-1]),
            max_num_seqs=self.rows,
            # A quarter of a server's cache: rows that do not fit may wait, since no reader waits for them.
            kv_cache_bytes=kv_cache_bytes(config, self._dtype, max(1, self.rows // 4)) if cpu else None,
            gpu_share=None if cpu else gpu_share(*_card_memory()),
            variables=self._variables,
        )
        version = self._environment.versions["vllm"]
        self._reporter.say(f"Starting vLLM {version} ({self._environment.build}) on {self._base.spec}")
        self._engine = engine = VllmEngine(settings, stop_ids=(), reporter=self._reporter)
        self._end = weakref.finalize(self, engine.stop)
        return engine

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            run_async(work)
        except RequestFailedError as error:
            raise UserError(f"vLLM could not answer: {error}", where=_WHERE, fix="Set it to peft.") from error
        except EngineStoppedError as error:
            said = self._engine.child.said if self._engine else ""
            self.stop()
            raise VllmStoppedError(
                f"vLLM stopped before all answers were complete. The end of its log:\n{said or 'The log is empty.'}",
                where=_WHERE,
                fix="Run the same command again, which keeps the finished answers. Or set it to peft.",
            ) from error


async def _completed(
    engine: VllmEngine, request: Request, stop_ids: Collection[int], decode: Decode | None, tenant: str
) -> Completion:
    """Compute an answer; it ends where the embedded loop ends it, since both feed the tokens to a :class:`Row`."""
    assert request.constraint is None
    row, without_stops = Row(request, decode), replace(request, stop=())
    if not request.stop:
        delta = await engine.answer(without_stops, stop_ids, tenant=tenant)
        _take(row, delta.ids, ended=delta.finish == "stop")
        return row.completion
    # With stop strings tokens are streamed, so that vLLM stops computing after the first stop string.
    async with aclosing(engine.stream(without_stops, tenant=tenant, stop_ids=stop_ids)) as deltas:
        async for delta in deltas:
            _take(row, delta.ids, ended=delta.finish == "stop")
            if row.finish is not None:
                break
    return row.completion


def _take(row: Row, ids: Sequence[int], *, ended: bool) -> None:
    for token in ids:
        row.take(token, ())
        if row.finish is not None:
            return
    if ended:
        row.take(-1, (-1,))  # the end token is not part of the answer


def rows_at_once(memory: int) -> int:
    """Return ``--max-num-seqs`` for a card with this many bytes, less what CUDA graphs and LoRA buffers take.

    256 is vLLM's default for cards of 40 GiB and more; a smaller card has room for the keys and values of fewer rows.
    """
    return next((rows for gib, rows in _ROWS_BY_CARD if memory < gib * _GIB), _MOST_ROWS)


def gpu_share(free: int, total: int) -> float:
    """Return ``--gpu-memory-utilization``: the share of the card's ``total`` bytes that is ``free``, less 5%.

    vLLM does not start if less than this share is free, and other programs may use some of the card.
    """
    share = min(0.9, int(100 * (free / total - _SPARE_SHARE)) / 100)
    if share < 0.1:
        raise UserError(
            f"Not enough GPU memory for vLLM: {free / _GIB:.1f} of {total / _GIB:.1f} GiB are free",
            where=_WHERE,
            fix="Stop other programs that use the card, or set it to peft.",
        )
    return share


def _card_memory() -> tuple[int, int]:
    """Return the free and total bytes of this process's card."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return free, total
