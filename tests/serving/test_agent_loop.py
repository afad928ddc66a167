"""The example agent, from rows to a release: a tiny base learns to call functions, and a loop of the SDK runs them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import tunewright
from command_line import tunewright as command
from command_line import write_jsonl
from tiny import build_base
from tunewright.core.io import canonical_json
from tunewright.examples.orders import AGENT_FILE, project_files

ASKED = ("Where is my order {}?", "Status of {}, please.", "When does {} come?", "Has {} left yet?", "Track {}.")
THEN = ("Cancel it, please.", "Then cancel it.", "Stop it.", "I don't want it any more.")
CONFIG = """\
name: orders
base_model: {base}
chat: {{tools: hermes}}
data: {{sources: [orders.jsonl], dedup_threshold: 1}}
train: {{preset: all-linear, lora_r: 64, lora_alpha: 64, learning_rate: 0.01, batch_size: 8, epochs: {epochs}, dtype: float32, eval_max_samples: 0}}
evaluate: {{metric: exact_match, extra_metrics: [call_exact_match], num_fewshot: [1], static_seeds: 1, max_new_tokens: 100}}
regressions: {{samples: 0}}
"""


def conversation(agent: dict[str, Any], number: str, asked: str, then: str) -> dict[str, Any]:
    """A row as the shipped agent would have had it: its functions, and its results."""
    turns: list[dict[str, Any]] = []

    def called(name: str, place: str) -> dict[str, Any]:
        arguments = canonical_json({"order": number})
        call = {"id": place, "type": "function", "function": {"name": name, "arguments": arguments}}
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
        result: dict[str, Any] = agent["FUNCTIONS"][name](number)
        turns.append({"role": "tool", "tool_call_id": place, "content": canonical_json(result)})
        return result

    turns.append({"role": "user", "content": asked.format(number)})
    found = called("find_order", "a")
    turns.append({"role": "assistant", "content": f"Your {found['item']}: {found['state']}, {found['date']}."})
    turns.append({"role": "user", "content": then})
    done = called("cancel_order", "b")
    turns.append({"role": "assistant", "content": "Cancelled." if done["cancelled"] else f"No: {done['reason']}."})
    return {"messages": turns, "tools": agent["TOOLS"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose adapter was trained and evaluated."""
    folder = tmp_path_factory.mktemp("orders")
    base = build_base(folder / "base")
    (folder / AGENT_FILE).write_text(project_files()[AGENT_FILE], encoding="utf-8")
    rows = []
    for asked in ASKED:
        for then in THEN:
            for number, *_ in ORDERS:
                agent = runpy.run_path(str(folder / AGENT_FILE))  # a new database: nothing is cancelled yet
                rows.append(conversation(agent, number, asked, then))
    write_jsonl(folder / "orders.jsonl", rows)
    (folder / "tunewright.yaml").write_text(CONFIG.format(base=base, epochs=40))
    return folder
