"""The part `isolation` of `serve_load.py`: mixed requests, each answer compared with its adapter's reference.

The reference is the answer of peft and transformers with that adapter alone. A tenant gets only prompts that
distinguish its adapter from all others and from the base: each of them answers with a token that this adapter finds
less likely than its own, by more than rounding explains. So an answer of a wrong adapter is detected. Meanwhile some
tenants' aliases switch to another adapter and back; the answer must match the adapter that its header names.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arrivals import Ask
from load_clients import Clients, Prompt
from load_tenants import Tenant, release

from tunewright.core.errors import UserError
from tunewright.gate.answers import Digest, GreedyAnswer, Ids
from tunewright.gate.isolation import PROBE_MARGIN, TOLERANCE, Reference
from tunewright.open_project import OpenProject
from tunewright.serving.tenants import State

TOKENS = 4
"""Of an answer: few, so that many can be asked for."""
CONNECTIONS = 64
"""Requests in progress: more than the batch has slots, so that it is full."""
MOST = 2
"""Prompts per tenant, if enough of them distinguish its adapters."""
TRIED = 8
"""Prompts that are tried at once."""
RIGHT, NEAR = "its adapter's answer", "within the tolerance of its adapter's"


@dataclass(frozen=True)
class Telling:
    """Prompts that distinguish a tenant's adapters from all others.

    Args:
        prompts: each tenant's prompts, by index.
        right: the answer by prompt and model.
    """

    prompts: Mapping[int, Sequence[int]]
    right: Mapping[tuple[int, Digest], str]


@dataclass(frozen=True)
class Seen:
    """The outcome of a request; many have the same."""

    tenant: int
    prompt: int
    status: int
    digest: str
    text: str


Decode = Callable[[Sequence[int]], str]


def find_telling(
    reference: Reference, owned: Sequence[Sequence[str]], prompts: Sequence[Ids], decode: Decode, tolerance: float
) -> Telling:
    """Try prompts in order until each tenant has one; of several, those with the most confident answers are used.

    Args:
        owned: digests of each tenant's adapters; a prompt must distinguish each of them.
        tolerance: nats that a right answer may fall short.

    Raises:
        UserError: no prompt distinguishes the adapters of some tenants.
    """
    models: list[Digest] = [None, *dict.fromkeys(digest for own in owned for digest in own)]
    right: dict[tuple[int, Digest], str] = {}
    summary: list[dict[int, float]] = [
        {} for _ in owned
    ]  # prompts, and how sure a tenant's adapters are of their answers
    missing = list(range(len(owned)))
    for start in range(0, len(prompts), TRIED):
        group = range(start, min(start + TRIED, len(prompts)))
        by_model = {model: reference.greedy(model, [prompts[n] for n in group], TOKENS) for model in models}
        for place, n in enumerate(group):
            said = {model: answers[place] for model, answers in by_model.items()}
            texts = {model: decode(own.answer.ids) for model, own in said.items()}
            right |= {(n, model): text for model, text in texts.items()}
            telling = {model for model in models if _tells(model, said, texts, PROBE_MARGIN * tolerance)}
            for tenant, own in enumerate(owned):
                if telling.issuperset(own):
                    summary[tenant][n] = min(_surety(said[digest]) for digest in own)
        missing = [tenant for tenant, found in enumerate(summary) if not found]
        _say(f"{group.stop} prompts tried on {len(models)} models: {len(missing)} of {len(owned)} tenants remain")
        if not missing:
            break
    else:
        raise UserError(
            f"No prompt of {len(prompts)} distinguishes {len(missing)} of {len(owned)} tenants from all others",
            where=f"tenants {', '.join(map(str, missing))}",
            fix="Try more of them with --probes, or adapters that are further apart with --noise.",
        )
    surest = [sorted(found, key=lambda n: -found[n])[:MOST] for found in summary]
    return Telling(dict(enumerate(surest)), right)


def _tells(model: Digest, said: Mapping[Digest, GreedyAnswer], texts: Mapping[Digest, str], enough: float) -> bool:
    """Return True if no other model gives an answer that this one could give."""
    others = [other for other in said if other != model]
    return texts[model] not in {texts[other] for other in others} and all(
        said[model].shortfall(said[other].answer) >= enough for other in others
    )


def _surety(own: GreedyAnswer) -> float:
    """Return the smallest gap in nats between the likeliest and the second likeliest token."""
    return min(sorted(behind.values())[1] for behind in own.behind)


def could_say(reference: Reference, model: Digest, prompt: Ids, text: str, decode: Decode, tolerance: float) -> bool:
    """Return True if the model can produce the text by tokens that are all within the tolerance of the likeliest.

    The tokens of a text are unknown: the search follows all likely enough tokens that spell it.
    """
    paths: list[Ids] = [()]
    for _ in range(TOKENS):
        steps = reference.greedy(model, [(*prompt, *path) for path in paths], 1)
        longer = [
            (*path, token)
            for path, own in zip(paths, steps, strict=True)
            for token, short in own.behind[0].items()
            if short <= tolerance
        ]
        # A character of which not all bytes are there yet is shown as this.
        paths = [path for path in longer if text.startswith(decode(path).rstrip("\ufffd"))]
        if not paths:
            return False
    return text in {decode(path) for path in paths}


def judge(seen: Seen, owned: Sequence[Sequence[str]], telling: Telling, near: Callable[[Seen], bool]) -> str:
    """Return the class of an answer: right, or the model that it belongs to.

    Args:
        near: True if the named adapter could give it.
    """
    if seen.status != 200:
        return f"status {seen.status}"
    if seen.digest not in owned[seen.tenant]:
        return "another tenant's digest" if any(seen.digest in own for own in owned) else "an unknown digest"
    if seen.text == telling.right[seen.prompt, seen.digest]:
        return RIGHT
    if any(seen.text == text for (prompt, _), text in telling.right.items() if prompt == seen.prompt):
        return "another model's answer"
    return NEAR if near(seen) else "no model's answer"


@dataclass
class Mix:
    """The requests and their outcomes.

    Args:
        asks: tenant and prompt of each request.
        switches: number of answers after which a tenant's alias gets the adapter of which tenant.
    """

    asks: Sequence[tuple[int, int]]
    switches: dict[int, Tenant]
    seen: Counter[Seen] = field(default_factory=Counter)

    async def ask(self, clients: Clients, state: State, prompts: Sequence[Prompt]) -> float:
        """Send all requests with this concurrency; return the seconds."""
        left, began = iter(self.asks), time.perf_counter()
        due, every = dict(self.switches), max(1, len(self.asks) // 50)
        async with clients.connected(CONNECTIONS) as session:

            async def one_after_another() -> None:
                for tenant, prompt in left:
                    reply = await clients.ask(session, Ask(0.0, tenant), prompts[prompt], TOKENS, began)
                    answer = reply.answer
                    self.seen[Seen(tenant, prompt, answer.status, answer.digest, answer.text)] += 1
                    done = self.seen.total()
                    if done % every == 0:
                        rate = done / (time.perf_counter() - began)
                        _say(f"{done} of {len(self.asks)} answered, {rate:.1f} a second; {len(self.seen)} different")
                    if switched := due.pop(done, None):
                        await asyncio.to_thread(release, state, switched)
                        _say(f"{switched.alias} is switched to {switched.adapter.name}")

            async with asyncio.TaskGroup() as group:
                for _ in range(CONNECTIONS):
                    group.create_task(one_after_another())
        return time.perf_counter() - began


def switches(tenants: Sequence[Tenant], others: Sequence[Tenant], requests: int) -> dict[int, Tenant]:
    """Return the switches of the first tenants' aliases to others' adapters and back, at equal distances."""
    there = [replace(tenant, adapter=other.adapter) for tenant, other in zip(tenants, others, strict=False)]
    turns = [*there, *tenants[: len(there)]]
    return {requests * (n + 1) // (len(turns) + 1): tenant for n, tenant in enumerate(turns)}


def mixed(
    opened: OpenProject,
    state: State,
    clients: Clients,
    tenants: Sequence[Tenant],
    others: Sequence[Tenant],
    prompts: Sequence[Prompt],
    requests: int,
    seed: int,
) -> dict[str, Any]:
    """Send the requests, judge and count the answers.

    Args:
        tenants: the senders; their adapters are released.
        others: tenants whose adapters the first tenants' aliases switch to.
        prompts: candidates; the first ones that distinguish adapters are used.

    Raises:
        UserError: no prompt distinguishes some tenant's adapter.
    """
    from tunewright.gate.answers import PeftReference

    chat, dtype = opened.chat, opened.folder.config.train.dtype
    adapters = {one.adapter.digest: one.adapter.folder for one in (*tenants, *others)}
    owned = [[tenant.adapter.digest] for tenant in tenants]
    for own, other in zip(owned, others, strict=False):
        own.append(other.adapter.digest)
    _say(f"the reference loads {len(adapters)} adapters")
    reference = PeftReference(opened.base, dtype, "none", adapters, stop_ids=())
    ids = [chat.prompt(prompt) for prompt in prompts]
    telling = find_telling(reference, owned, ids, chat.text, TOLERANCE[dtype])

    draw = random.Random(seed)
    drawn = [draw.randrange(len(tenants)) for _ in range(requests)]
    asks = [(tenant, draw.choice(telling.prompts[tenant])) for tenant in drawn]
    mix = Mix(asks, switches(tenants, others, requests))
    seconds = asyncio.run(mix.ask(clients, state, prompts))

    def near(seen: Seen) -> bool:
        return could_say(reference, seen.digest, ids[seen.prompt], seen.text, chat.text, TOLERANCE[dtype])

    verdicts = {seen: judge(seen, owned, telling, near) for seen in mix.seen}
    counts: Counter[str] = Counter()
    by_adapter: Counter[str] = Counter()
    for seen, count in mix.seen.items():
        counts[verdicts[seen]] += count
        by_adapter[seen.digest] += count
    return {
        "requests": requests,
        "seconds": seconds,
        "tenants": len(tenants),
        "tenants_told_apart": len(telling.prompts),
        "prompts": len({prompt for own in telling.prompts.values() for prompt in own}),
        "told_by_nats": PROBE_MARGIN * TOLERANCE[dtype],
        "releases_meanwhile": len(mix.switches),
        "adapters_that_answered": len(by_adapter),
        "fewest_answers_of_an_adapter": min(by_adapter.values()),
        "tokens": TOKENS,
        "dtype": dtype,
        "answers": dict(counts.most_common()),
        "wrong": [
            {**vars(seen), "tenant": tenants[seen.tenant].name, "count": mix.seen[seen], "what": what}
            for seen, what in verdicts.items()
            if what not in (RIGHT, NEAR)
        ],
    }


def _say(line: str) -> None:
    print(f"isolation: {line}", file=sys.stderr, flush=True)
