"""Forgetting: the adapter's increase in loss on text that the base model wrote itself.

The measure is the negative log-likelihood of conversations that the base wrote (see training/self_samples.py). It is
the value under the adapter minus that under the base, in nats per token of their answers. The samples are disjoint from
those that replay trains on. An adapter that answers like the base scores 0; the mean over such answers is the
divergence between the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.chat import Tokens
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest, write_json
from tunewright.data.examples import Example, Message, normalised
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.losses import answer_losses
from tunewright.evidence.common import Interval
from tunewright.evidence.statistics import RESAMPLES, bootstrap_sums, percentiles
from tunewright.models.loading import context_length
from tunewright.training.rows import trained_spans
from tunewright.training.self_samples import Drawn, Sampler, sample_filter

HELD_OUT = 100
"""Number of samples that forgetting is measured on."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on the base's own answers, in nats per token."""

    samples: int
    tokens: int
    base: float
    tuned: float
    increase: float
    interval: Interval
    """95% interval of the increase, by a bootstrap over samples."""


class ForgettingMeter:
    """A meter for adapters on the same held-out samples of their base.

    Args:
        project: its seed decides the samples; its working folder keeps them and their measurements.
        version: the domain, which no sample may resemble.
        generator: holds the base and loads the adapters onto it.
        samples: number of samples.
    """

    def __init__(
        self, project: ProjectFolder, version: DatasetVersion, generator: Generator, samples: int = HELD_OUT
    ) -> None:
        self.project = project
        self.version = version
        self.generator = generator
        self.wanted = samples

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler that draws the held-out samples."""
        generator = self.generator
        return Sampler(
            generator.base,
            generator.chat,
            generator.inputs,
            generator.write,
            self.project.config.seed,
            "held-out",
            self.project.work,
            generator.reporter,
            self.wanted,
        )

    @cached_property
    def drawn(self) -> Drawn:
        """The held-out samples.

        Raises:
            UserError: none of the base's samples is usable.
        """
        generator = self.generator
        limit = min(self.project.config.train.max_length, context_length(generator.base))
        screen = sample_filter(self.project, self.version, generator.chat, limit, generator.reporter)
        return self.sampler.draw(self.wanted, screen, finished=False)

    def measure(self, adapter: Adapter) -> Forgetting:
        """Return the forgetting of this adapter.

        Raises:
            UserError: none of the base's samples is usable.
        """
        rows = self.unseen(adapter)
        base, tuned = self._losses(None, rows), self._losses(adapter, rows)
        tokens = {key: sum(row.loss_mask) for key, row in rows.items()}
        # [samples, 3]: nats under the base, nats under the adapter, tokens
        sums = np.array([[base[key] * n, tuned[key] * n, n] for key, n in tokens.items()])
        before, after, count = sums.sum(axis=0).tolist()
        drawn = bootstrap_sums(sums, self.project.config.seed, RESAMPLES)
        return Forgetting(
            samples=len(rows),
            tokens=int(count),
            base=before / count,
            tuned=after / count,
            increase=(after - before) / count,
            interval=percentiles((drawn[:, 1] - drawn[:, 0]) / drawn[:, 2]),
        )

    def unseen(self, adapter: Adapter) -> dict[str, Tokens]:
        """Return the samples' rows by pair key, without those that this adapter was trained on.

        Raises:
            UserError: none of the base's samples is usable.
        """
        seen = {normalised(Example.from_dicts(messages).input_text) for messages in adapter.replayed}
        return {key: row for key, (asked, row) in self._encoded.items() if asked not in seen}

    @cached_property
    def _encoded(self) -> dict[str, tuple[str, Tokens]]:
        """The prompt and the encoded row of each sample, by pair key."""
        chat = self.generator.chat
        probe = chat.encode([Message("user", "x"), Message("assistant", "x")])
        end = probe.ids[trained_spans(probe)[-1][1] - 1]
        rows = {}
        for sample in self.drawn.used:
            prompt = chat.prompt(sample.example.prompt)
            answer = (*sample.ids, end) if sample.stopped else sample.ids
            mask = (False,) * len(prompt) + (True,) * len(answer)
            rows[sample.example.pair_key] = (normalised(sample.instruction), Tokens((*prompt, *answer), mask))
        return rows

    def _losses(self, adapter: Adapter | None, rows: Mapping[str, Tokens]) -> dict[str, float]:
        """Return the mean loss of each answer by pair key, under the adapter or the base alone."""
        file = self._file(adapter)
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        missing = {key: row for key, row in rows.items() if key not in known}
        if missing:
            title = f"forgetting of {adapter.name}" if adapter else "the base on its own samples"
            with (
                self.generator.reporter.task(title, len(missing), "samples") as task,
                self.generator.answering(adapter) as model,
            ):
                for part in answer_losses(model, missing, self.generator.chat.tokenizer.pad_token_id):
                    known |= part
                    task.advance(len(part))
            write_json(file, known)
        return {key: known[key] for key in rows}

    def _file(self, adapter: Adapter | None) -> Path:
        decides = {
            "adapter": adapter.digest if adapter else None,
            "base": self.generator.base.digest,
            "template": self.generator.chat.digest,
            "weights": self.generator.weights,
        }
        return self.project.work / "forgetting" / f"{digest(decides)[:16]}.json"
