"""The dev split's task during training: its rows are answered greedily and scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, answer_text, stop_strings, warn_of_longer_references
from tunewright.config import Config
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.versions import Member
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Request
from tunewright.metrics import Scorer, check_references, score_all, scorer_of
from tunewright.training import fsdp
from tunewright.training.history import SHOWN

_ADAPTER = "default"
"""peft's name for the adapter in training."""


@dataclass(frozen=True)
class DevTask:
    """Dev rows that each evaluation answers with the model in training."""

    scorer: Scorer
    requests: tuple[Request, ...]
    """Distinct ones: an input with several references is answered once."""
    examples: tuple[Example, ...]
    """The answered inputs with their expected outputs."""
    request_of: tuple[int, ...]
    """For each example, the index of its request."""
    split: tuple[Example, ...]
    """All dev rows; their outputs are the references of their inputs."""
    batch_size: BatchSize
    """Shared by all evaluations of a run: later ones begin with the number of rows that fitted before."""
    chat: ChatFormat
    reporter: Reporter
    keys: tuple[str, ...]
    """The examples' pair keys."""

    def answers(self, model: Any, places: Sequence[int]) -> list[str]:
        """Answer the requests at these indices greedily, in their order.

        ``model`` is a PeftModel in eval mode whose adapter is ``default``, as trl's trainer makes it.
        """
        with self.reporter.task("Answering dev rows", len(places), "answers") as task:
            completions = generate_halving(
                model,
                [self.requests[place] for place in places],
                self.batch_size,
                self.reporter,
                stop_ids=self.chat.stop_ids,
                pad_id=self.chat.tokenizer.pad_token_id,
                decode=self.chat.text,
                on_finished=lambda _index, _completion: task.advance(),
                repeatable=not fsdp.is_sharded(model),
            )
        asked = dict(zip(self.request_of, self.examples, strict=True))
        return [
            answer_text(self.chat, completion, asked[place].prompt)
            for place, completion in zip(places, completions, strict=True)
        ]

    def shown(self, answers: Sequence[str]) -> dict[str, str]:
        """Return the first rows' answers by pair key, from the answers to all requests."""
        return {key: answers[place] for key, place in zip(self.keys[:SHOWN], self.request_of, strict=False)}

    def score(self, answers: Sequence[str]) -> float:
        """Score the answers to all requests by the deciding metric, from 0 to 1."""
        return score_all(self.scorer, [answers[place] for place in self.request_of], self.examples, self.split).total()


def dev_task(
    config: Config,
    root: Path,
    chat: ChatFormat,
    train: Sequence[Member],
    dev: Sequence[Member],
    context: int,
    reporter: Reporter,
) -> DevTask | None:
    """Return the rows that each evaluation answers: all of dev, or a sample drawn by the seed and reported.

    Rows with equal prompts are answered once. The answers of the training rows determine the length limit, as in
    evaluation. None: the config wants no answers, and the dev loss alone decides.
    """
    most, split = config.train.eval_max_samples, tuple(m.example for m in dev)
    if most == 0:
        return None
    if most is not None and most < len(dev):
        places = sorted(random.Random(f"{config.seed}:dev").sample(range(len(dev)), most))
        reporter.say(
            f"Each evaluation answers {most} of the {len(dev)} dev rows, drawn by the seed (train.eval_max_samples)."
        )
        dev = [dev[place] for place in places]
    scorer = scorer_of(config.evaluate.metric, root)
    check_references([scorer], [m.example for m in dev], "dev", reporter)
    limit = answer_limit(config, chat, train)
    warn_of_longer_references(chat, [m.example for m in dev], limit, "dev", reporter)
    stop = stop_strings(config, chat)
    prompts = [chat.prompt(m.example.prompt) for m in dev]
    place_of = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return DevTask(
        scorer=scorer,
        # A row that training accepted fits the context with its answer. An answer cut here is longer, and so wrong.
        requests=tuple(Request(p, _ADAPTER, min(limit, context - len(p)), stop=stop) for p in place_of),
        examples=tuple(m.example for m in dev),
        request_of=tuple(place_of[prompt] for prompt in prompts),
        split=split,
        batch_size=BatchSize(config.evaluate.batch_size),
        chat=chat,
        reporter=reporter,
        keys=tuple(m.key for m in dev),
    )
