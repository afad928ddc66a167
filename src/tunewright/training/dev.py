"""The dev split's own task while a model trains: its rows answered greedily, and what the answers are worth."""

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
from tunewright.generation.decoding import Request, generate
from tunewright.metrics import Scorer, check_references, score_all, scorer_of

_ADAPTER = "default"
"""What peft calls the one adapter that is being trained."""


@dataclass(frozen=True)
class DevTask:
    """Dev rows to answer at each evaluation, with the model as it is then."""

    scorer: Scorer
    requests: tuple[Request, ...]
    """Distinct ones: an input with several references is answered once."""
    examples: tuple[Example, ...]
    """What was asked, with what should be answered."""
    asks: tuple[int, ...]
    """For each example, the place of its request."""
    split: tuple[Example, ...]
    """All dev rows, whose outputs are references of their inputs."""
    batch_size: int
    chat: ChatFormat
    reporter: Reporter

    def answers(self, model: Any, places: Sequence[int]) -> list[str]:
        """Greedy answers to the requests at these places, in their order.

        Args:
            model: a PeftModel in eval mode whose adapter is ``default``, as trl's trainer makes it.
            places: which of the requests.
        """
        with self.reporter.task("Answering dev rows", len(places), "answers") as task:
            completions = generate(
                model,
                [self.requests[place] for place in places],
                stop_ids=self.chat.stop_ids,
                pad_id=self.chat.tokenizer.pad_token_id,
                batch_size=self.batch_size,
                decode=self.chat.text,
                on_finished=lambda _index, _completion: task.advance(),
            )
        return [answer_text(self.chat, c) for c in completions]

    def worth(self, answers: Sequence[str]) -> float:
        """Return what the answers to all requests are worth by the deciding metric, as a share from 0 to 1.

        Raises:
            UserError: not one of them can be scored.
        """
        return score_all(self.scorer, [answers[place] for place in self.asks], self.examples, self.split).total()


def dev_task(
    config: Config,
    root: Path,
    chat: ChatFormat,
    train: Sequence[Member],
    dev: Sequence[Member],
    context: int,
    reporter: Reporter,
) -> DevTask | None:
    """Return the rows that each evaluation answers: all of dev, or a sample drawn by the seed, which is then said.

    Rows with equal prompts are answered once.

    Args:
        config: its train.eval_max_samples bounds the number, its evaluate section says how answers are made and valued.
        root: the project's folder, where a metric of its own is found.
        chat: makes the prompts.
        train: the longest answer is taken from these, as in evaluation.
        dev: the rows to answer.
        context: tokens that the base can hold.
        reporter: hears of a sample, and of references longer than an answer may be.

    Returns:
        None where the config wants no answers; the dev loss alone then chooses.

    Raises:
        UserError: a metric that can score none of the rows.
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
        # A row that training took fits the context with its answer: what would not fit is longer than that, and wrong.
        requests=tuple(Request(p, _ADAPTER, min(limit, context - len(p)), stop=stop) for p in place_of),
        examples=tuple(m.example for m in dev),
        asks=tuple(place_of[prompt] for prompt in prompts),
        split=split,
        batch_size=config.evaluate.batch_size,
        chat=chat,
        reporter=reporter,
    )
