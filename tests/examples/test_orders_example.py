"""The example orders: rows with functions by a fixed seed, and an agent that declares the same functions."""

from __future__ import annotations

import json
from pathlib import Path

import agent
import prepare_orders as orders
from making.command_line import tunewright
from tunewright.core.io import canonical_json


def test_agent_declares_the_functions_of_the_rows() -> None:
    assert agent.TOOLS == orders.TOOLS
    assert set(agent.FUNCTIONS) == {tool["function"]["name"] for tool in orders.TOOLS}


def test_no_order_of_the_agents_database_is_in_a_row() -> None:
    text = canonical_json(orders.rows())
    assert not [number for number, *_ in agent.ORDERS if number in text]


def test_init_orders_writes_rows_that_are_added_without_a_fault(tmp_path: Path) -> None:
    assert tunewright("init", tmp_path, "--example", "orders").code == 0
    rows = [json.loads(line) for line in (tmp_path / "orders.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == orders.rows()
    last = [row["messages"][-1] for row in rows]
    assert sum(bool(turn.get("tool_calls")) for turn in last) > 50, "evaluation generates calls"
    assert sum(turn["content"] == orders.ONLY_ORDERS for turn in last) > 30, "no function fits"
    added = tunewright("data", "add", tmp_path / "orders.jsonl", "--project", tmp_path, "--json")
    assert added.code == 0, added.stderr


def test_cancelled_order_stays_cancelled_and_a_shipped_one_is_refused() -> None:
    assert agent.cancel_order("48213") == {"cancelled": True}
    assert agent.find_order("48213")["state"] == "cancelled"
    assert agent.cancel_order("48213")["cancelled"] is False
    assert agent.cancel_order("90377") == {"cancelled": False, "reason": "shipped on 2 April"}
    assert agent.cancel_order("00000") == {"cancelled": False, "reason": "no such order"}
