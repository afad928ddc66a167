"""From how many calls on training pays: by hand, by a plain bootstrap, and with prefix caching."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tunewright.advisor import costs
from tunewright.advisor.costs import Lengths, break_even, measured_speed, token_prices, training_cost
from tunewright.advisor.signals import BreakEven, Speed
from tunewright.chat import open_chat
from tunewright.config import AdviseConfig, ChatConfig, PriceConfig
from tunewright.config.io import parse_config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.models.loading import load_model

PRICES = PriceConfig(input=1.0, output=4.0, cached_discount=0.9, training=30.0, labelling=5.0, hosting=2.0)


def _even(prompting: Lengths, tuned: Lengths, settings: AdviseConfig, clusters: list[str] | None = None) -> BreakEven:
    each = token_prices(settings.prices, None)
    return break_even(
        settings,
        (prompting, each),
        (tuned, each),
        clusters or [str(n) for n in range(len(tuned.inputs))],
        training=training_cost(settings.prices, 0),
        evaluation_calls=100,
        speed={},
        seed=0,
    )


def test_break_even_calls_are_costs_divided_by_savings() -> None:
    retrieved = Lengths("retrieved-8", inputs=[1000, 1200], outputs=[12, 8], cached=100)
    tuned = Lengths("pilot", inputs=[110, 130], outputs=[10, 10], cached=100)
    even = _even(retrieved, tuned, AdviseConfig(prices=PRICES, months=6, calls_per_month=10_000))
    per_prompting = ((1100 - 0.9 * 100) * 1.0 + 10 * 4.0) / 1e6
    per_tuned = ((120 - 0.9 * 100) * 1.0 + 10 * 4.0) / 1e6
    assert even.prompting.cost == pytest.approx(per_prompting)
    assert even.tuned.cost == pytest.approx(per_tuned)
    once = 30 + 100 * (per_prompting + per_tuned) + 5 + 6 * 2
    assert even.once.total == pytest.approx(once)
    assert even.calls == pytest.approx(once / (per_prompting - per_tuned))
    assert even.calls is not None and even.calls_low is not None and even.calls_high is not None
    assert even.calls_low <= even.calls <= even.calls_high
    assert (even.unit, even.expected_calls, even.pays) == ("money", 60_000, "yes")


def test_cached_static_demonstrations_cost_less_than_retrieved_ones() -> None:
    """Equal prompts, of which a cache holds nearly all in one case: leaving that out would oversell training."""
    tuned = Lengths("pilot", inputs=[130] * 4, outputs=[10] * 4, cached=100)
    settings = AdviseConfig(prices=PRICES)
    static = _even(Lengths("static-8", inputs=[1000] * 4, outputs=[10] * 4, cached=970), tuned, settings)
    retrieved = _even(Lengths("retrieved-8", inputs=[1000] * 4, outputs=[10] * 4, cached=100), tuned, settings)
    assert static.calls is not None and retrieved.calls is not None
    # 1000 - .9 * 970 = 127 and 1000 - .9 * 100 = 910, against 130 - .9 * 100 = 40
    assert static.calls / retrieved.calls == pytest.approx((910 - 40) / (127 - 40), rel=0.01)


def test_longer_answers_can_cancel_the_saving() -> None:
    prompting = Lengths("zero-shot", inputs=[130] * 5, outputs=[10] * 5, cached=100)
    longer = Lengths("pilot", inputs=[130] * 5, outputs=[30] * 5, cached=100)
    even = _even(prompting, longer, AdviseConfig(prices=PRICES, calls_per_month=10**9))
    assert (even.calls, even.calls_low, even.calls_high, even.pays) == (None, None, None, "no")


def test_break_even_interval_has_no_upper_end_without_a_sure_saving() -> None:
    prompting = Lengths("zero-shot", inputs=[130] * 6, outputs=[10, 40, 10, 40, 10, 40], cached=100)
    tuned = Lengths("pilot", inputs=[130] * 6, outputs=[30, 10, 30, 10, 30, 10], cached=100)
    even = _even(prompting, tuned, AdviseConfig(prices=PRICES, calls_per_month=10**9))
    assert even.calls is not None and even.calls_low is not None and even.calls_high is None
    assert even.pays == "unclear"


def test_break_even_interval_equals_a_plain_cluster_bootstrap() -> None:
    draw = random.Random(3)
    clusters = [str(n // 3) for n in range(90)]
    shift = {name: draw.uniform(0, 400) for name in set(clusters)}  # items of a cluster are alike
    inputs = [round(500 + shift[c] + draw.uniform(0, 50)) for c in clusters]
    prompting = Lengths("retrieved-8", inputs=inputs, outputs=[10] * 90, cached=0)
    tuned = Lengths("pilot", inputs=[100] * 90, outputs=[10] * 90, cached=0)
    even = _even(prompting, tuned, AdviseConfig(prices=PRICES), clusters)
    names = sorted(set(clusters))
    of = {name: [i for i, c in enumerate(clusters) if c == name] for name in names}
    savings = []
    for _ in range(3000):
        rows = [i for name in draw.choices(names, k=len(names)) for i in of[name]]
        savings.append(sum(inputs[i] - 100 for i in rows) / len(rows) / 1e6)
    low, high = np.quantile(savings, [0.025, 0.975])
    assert even.saving_interval.low == pytest.approx(low, rel=0.02)
    assert even.saving_interval.high == pytest.approx(high, rel=0.02)
    assert even.calls_low == pytest.approx(even.once.total / even.saving_interval.high)


def test_break_even_does_not_depend_on_the_hourly_price() -> None:
    """Training and calls on the same machine: what an hour costs changes no number of calls."""
    speed = Speed(prefill=2000, decode=50, rows=8)
    prompting = Lengths("retrieved-8", inputs=[1000] * 4, outputs=[10] * 4, cached=100)
    tuned = Lengths("pilot", inputs=[130] * 4, outputs=[10] * 4, cached=100)

    def even(prices: PriceConfig | None) -> BreakEven:
        each = token_prices(prices, speed)
        return break_even(
            AdviseConfig(prices=prices),
            (prompting, each),
            (tuned, each),
            list("abcd"),
            training=training_cost(prices, 7200),
            evaluation_calls=0,
            speed={"base": speed},
            seed=0,
        )

    free, priced = even(None), even(PriceConfig(hour=3.0))
    assert (free.unit, priced.unit) == ("machine hours", "money")
    assert (free.once.training, priced.once.training) == (2.0, 6.0)
    assert free.calls == pytest.approx(priced.calls)
    seconds = (1000 - 130) / 2000
    assert free.calls == pytest.approx(7200 / seconds)


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ("{input: 1}", "set both input and output, or neither"),
        ("{input: 1, output: 2}", "set both the token prices and training"),
        ("{training: 5}", "set both the token prices and training"),
        ("{labelling: 5}", "labelling and hosting require hour"),
    ],
)
def test_prices_in_incompatible_units_are_refused(prices: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config(f"advise:\n  prices: {prices}\n", Path("tunewright.yaml"))


def test_rates_are_tokens_by_seconds_of_as_many_rows_as_a_batch_holds(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder, LogReporter())
    chat = open_chat(base, ChatConfig(), LogReporter())
    model = load_model(base, "float32", "none")
    clock = itertools.count(0, 2)  # each look at it is 2 seconds after the one before
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    short = measured_speed(model, chat, [(5, 6, 7)] * 9, None, batch_size=4)
    assert (short.rows, short.prefill, short.decode) == (4, 4 * 3 / 2, 4 * 16 / 2)
    # At most this many tokens are timed, and one row in any case.
    monkeypatch.setattr(costs, "_MOST_PREFILLED", 10)
    assert measured_speed(model, chat, [(5, 6, 7)] * 9, None, batch_size=4).rows == 3
    assert measured_speed(model, chat, [(5,) * 11] * 2, None, batch_size=4).rows == 1
