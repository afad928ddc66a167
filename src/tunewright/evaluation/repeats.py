"""The noise floor: the base answers items twice, bypassing the journal, in differently composed batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tunewright.data.versions import Member
from tunewright.evaluation.countdown import tokens_each
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.evidence.common import NoiseFloor
from tunewright.metrics import Scorer, score_all

MOST_ITEMS = 100
NOISE = "noise floor"


def noise_floor(
    generator: Generator, members: Sequence[Member], prompts: Sequence[Prompt], limit: int, scorer: Scorer, seed: int
) -> NoiseFloor:
    """Have the base answer up to 100 of these items twice, with the engine that answers all arms.

    The seed draws the items. Of items with equal prompts, only the first may be drawn.

    Args:
        generator: its engine answers; its journal is neither read nor written.
        members: the items; their outputs are the references.
        prompts: one for each item.
        limit: the longest answer in tokens.
        scorer: scorer of the deciding metric.
        seed: draws the items.

    Raises:
        UserError: no answer can be scored.
    """
    draw = random.Random(f"{seed}:noise")
    first_of: dict[Prompt, int] = {}
    for place, prompt in enumerate(prompts):
        first_of.setdefault(prompt, place)
    places = sorted(draw.sample(list(first_of.values()), min(MOST_ITEMS, len(first_of))))
    # Capped at the number of items: otherwise both passes would batch every item with all the others.
    most = min(generator.rows, len(places))
    sizes = most, max(2, most // 2) if most > 1 else 2
    shuffled = draw.sample(places, len(places))
    tokens = tokens_each([prompts[place] for place in places], limit)
    with generator.countdown.arm(NOISE, 2 * len(places), tokens) as task:
        answers = []
        for order, size in zip((places, shuffled), sizes, strict=True):
            requests = generator.requests([prompts[place] for place in order], limit)
            completions = generator.generate(
                requests,
                lambda _index, _completion: task.advance(),
                at_once=size,
                # Otherwise the second pass would reuse the first pass's keys and values from vLLM's prefix cache.
                company=f"noise floor, {size} at once",
            )
            answers.append(
                {
                    place: generator.text(prompts[place], completion)
                    for place, completion in zip(order, completions, strict=True)
                }
            )
    first, second = ([given[place] for place in places] for given in answers)
    examples = [members[place].example for place in places]
    among = [member.example for member in members]
    scores = [score_all(scorer, given, examples, among).total() for given in (first, second)]
    return NoiseFloor(
        items=len(places),
        changed=sum(a != b for a, b in zip(first, second, strict=True)),
        score_difference=scores[1] - scores[0],
        how=f"zero-shot by the base in {generator.dtype} with {generator.engine.name}: batches of {sizes[0]}, then of "
        f"{sizes[1]} in another order",
    )
