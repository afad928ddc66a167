"""The benchmark of mixed requests: it chooses prompts that distinguish adapters, and names the adapter of an answer."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from arrivals import Answer as Came
from load_mixed import CONNECTIONS, NEAR, RIGHT, TOKENS, Mix, Seen, Telling, could_say, find_telling, judge, switches
from load_tenants import Tenant

from tiny import byte_tokenizer
from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.gate.answers import Answer, Digest, GreedyAnswer, Ids
from tunewright.gate.probes import PROBE_MARGIN
from tunewright.gate.reference import PeftReference
from tunewright.models.bases import Base

TOLERANCE = 0.5
FAR, CLOSE = PROBE_MARGIN * TOLERANCE, PROBE_MARGIN * TOLERANCE - 0.1
SAID: dict[int, dict[Digest, str]] = {
    1: {None: "base", "a": "same", "b": "same", "c": "cccc"},
    2: {None: "base", "a": "aaaa", "b": "abbb", "c": "cccc"},
    3: {None: "base", "a": "axxx", "b": "bbbb", "c": "cyyy"},
}
"""By prompt and model, a token each letter."""


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@dataclass
class Scripted:
    """A reference for which all tokens but a model's own are equally unlikely.

    Args:
        behind: nats, by model.
    """

    behind: dict[Digest, float] = field(default_factory=dict)

    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = 8) -> list[GreedyAnswer]:
        answers = [Answer(tuple(encode(SAID[prompt][model] + "more")[:tokens]), "length") for (prompt,) in prompts]
        far = self.behind.get(model, FAR)
        return [GreedyAnswer(one, tuple({token: 0.0, -2: far} for token in one.ids)) for one in answers]

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[Answer]) -> list[float]:
        raise AssertionError("own answers are enough")

    def unload(self) -> None:
        pass


def found(reference: Scripted, owned: list[list[str]], prompts: Sequence[int]) -> Telling:
    return find_telling(reference, owned, [(prompt,) for prompt in prompts], decode, TOLERANCE)


def test_tenant_gets_only_prompts_that_separate_its_adapter() -> None:
    telling = found(Scripted(), [["a"], ["b"], ["c"]], (1, 2, 3))
    assert telling.prompts == {0: [1, 2], 1: [1, 2], 2: [0, 1]}
    assert telling.right[1, "b"] == "abbb"


def test_find_telling_stops_when_each_tenant_has_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("load_mixed.TRIED", 1)
    telling = found(Scripted(), [["a"], ["b"], ["c"]], (1, 2, 3))
    assert telling.prompts == {0: [1], 1: [1], 2: [0, 1]}
    assert {prompt for prompt, _ in telling.right} == {0, 1}


def test_adapters_of_one_tenant_must_differ_too() -> None:
    assert found(Scripted(), [["a", "b"], ["c"]], (1, 2)).prompts == {0: [1], 1: [0, 1]}


def test_tenants_whose_adapters_are_too_close_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="distinguishes 1 of 3 tenants") as refused:
        found(Scripted({"b": CLOSE}), [["a"], ["b"], ["c"]], (1, 2, 3))
    assert (refused.value.where, "--probes" in (refused.value.fix or "")) == ("tenants 1", True)


@pytest.mark.parametrize(
    ("digest", "text", "near", "what"),
    [
        ("a", "aaaa", False, RIGHT),
        ("b", "abbb", False, RIGHT),  # the tenant's other adapter, and it is named
        ("a", "abbb", True, "another model's answer"),  # it answered, but another one is named
        ("a", "cccc", True, "another model's answer"),
        ("a", "base", True, "another model's answer"),
        ("c", "cccc", True, "another tenant's digest"),
        ("", "aaaa", True, "an unknown digest"),
        ("a", "aaxx", True, NEAR),
        ("a", "aaxx", False, "no model's answer"),
    ],
)
def test_wrong_answer_names_its_adapter(digest: str, text: str, near: bool, what: str) -> None:
    owned = [["a", "b"], ["c"]]
    telling = found(Scripted(), owned, (2,))
    seen = Seen(0, 0, 200, digest, text)
    assert judge(seen, owned, telling, lambda _: near) == what
    assert judge(replace(seen, status=503), owned, telling, lambda _: near) == "status 503"


@given(st.data())
def test_model_could_give_only_texts_of_likely_tokens(data: st.DataObject) -> None:
    pieces = [b"a", b"b", b"aa", b"ab", "\u00e9".encode()[:1], "\u00e9".encode()[1:]]
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    behind: dict[Ids, dict[int, float]] = {}

    class Table:
        def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = 8) -> list[GreedyAnswer]:
            assert tokens == 1
            for prompt in prompts:
                if prompt not in behind:
                    short = draw.choice([0.2, TOLERANCE, 0.7], len(pieces)).tolist()
                    short[int(draw.integers(len(pieces)))] = 0.0
                    behind[prompt] = dict(enumerate(short))
            return [GreedyAnswer(Answer((0,), "length"), (behind[prompt],)) for prompt in prompts]

    def spell(ids: Sequence[int]) -> str:
        return b"".join(pieces[token] for token in ids).decode(errors="replace")

    reference = cast("Any", Table())
    said = data.draw(st.lists(st.sampled_from(range(len(pieces))), min_size=TOKENS, max_size=TOKENS))
    likely = {
        spell(ids)
        for ids in itertools.product(range(len(pieces)), repeat=TOKENS)
        if all(reference.greedy("a", [(9, *ids[:n])], 1)[0].behind[0][ids[n]] <= TOLERANCE for n in range(TOKENS))
    }
    assert could_say(reference, "a", (9,), spell(said), spell, TOLERANCE) == (spell(said) in likely)


def test_adapter_could_give_its_own_answer_and_not_the_bases(small_base: Path, small_adapters: dict[str, Path]) -> None:
    tokenizer = byte_tokenizer()
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    reference = PeftReference(base, "float32", "none", small_adapters, stop_ids=())
    prompts = [tuple(tokenizer(text).input_ids) for text in ("Mobile County", "Where is it?", "a", "42 U.S.C.")]
    telling = find_telling(reference, [[digest] for digest in small_adapters], prompts, tokenizer.decode, 0.05)
    for tenant, digest in enumerate(small_adapters):
        for n in telling.prompts[tenant]:
            for model in (None, *small_adapters):
                said = could_say(reference, digest, prompts[n], telling.right[n, model], tokenizer.decode, 0.05)
                assert said == (model == digest)


def tenants(count: int) -> list[Tenant]:
    adapters = [cast("Adapter", SimpleNamespace(name=f"adapter-{n}", digest=f"{n}")) for n in range(count)]
    return [Tenant(f"tenant-{n}", f"key-{n}", f"model-{n}", adapter) for n, adapter in enumerate(adapters)]


def test_aliases_are_switched_and_all_are_switched_back() -> None:
    everyone = tenants(5)
    turns = switches(everyone[:3], everyone[3:], 1000)
    assert list(turns) == [200, 400, 600, 800]
    assert [(turn.alias, turn.adapter.digest) for turn in turns.values()] == [
        ("model-0", "3"),
        ("model-1", "4"),
        ("model-0", "0"),
        ("model-1", "1"),
    ]


def test_mix_sends_each_request_once_and_switches_on_time() -> None:
    asks = [(n % 3, n % 2) for n in range(300)]
    live = {f"model-{n}": str(n) for n in range(3)}
    in_flight, most, released = 0, 0, []

    class Fake:
        def connected(self, connections: int) -> Any:
            assert connections == CONNECTIONS
            return self

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *_: object) -> None: ...

        async def ask(self, _: object, ask: Any, prompt: str, tokens: int, began: float) -> Any:
            nonlocal in_flight, most
            in_flight += 1
            most = max(most, in_flight)
            await asyncio.sleep(0)
            in_flight -= 1
            came = Came(ask.tenant, 0.0, (), 1.0, f"{prompt} {tokens}", live[f"model-{ask.tenant}"])
            return SimpleNamespace(answer=came)

    def deploy(alias: str, name: str, digest: str, grounds: object) -> None:
        live[alias] = digest
        released.append((alias, name))

    everyone = tenants(4)
    mix = Mix(asks, switches(everyone[:3], everyone[3:], len(asks)))
    state: Any = SimpleNamespace(releases=SimpleNamespace(deploy=deploy))
    asyncio.run(mix.ask(cast("Any", Fake()), state, cast("Any", ["one", "two"])))
    assert (mix.seen.total(), most) == (300, CONNECTIONS)
    assert released == [("model-0", "adapter-3"), ("model-0", "adapter-0")]
    assert {seen.digest for seen in mix.seen if seen.tenant == 0} == {"0", "3"}
    assert {(seen.tenant, seen.digest) for seen in mix.seen if seen.tenant} == {(1, "1"), (2, "2")}
    assert {seen.text for seen in mix.seen} == {"one 4", "two 4"}
