"""An agent that answers questions about orders: it calls two functions on a database, as the model decides.

Run it with `pip install openai` while `tunewright serve` runs:

    python agent.py MODEL "Where is order 48213?" "Cancel it, please."
"""

import json
import os
import sqlite3
import sys
from typing import Any

from openai import OpenAI

ORDER = {
    "type": "object",
    "properties": {"order": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["order"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "find_order", "description": "Look an order up.", "parameters": ORDER}},
    {"type": "function", "function": {"name": "cancel_order", "description": "Cancel an order.", "parameters": ORDER}},
]
ORDERS = [
    ("48213", "lighthouse calendar", "packing", "7 May"),
    ("90377", "field guide", "shipped", "2 April"),
    ("15560", "cookbook", "delivered", "19 March"),
]

database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE orders (number TEXT PRIMARY KEY, item TEXT, state TEXT, date TEXT)")
database.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", ORDERS)


def find_order(order: str) -> dict[str, Any]:
    """Return an order's item, state and date."""
    found = database.execute("SELECT date, item, state FROM orders WHERE number = ?", [order]).fetchone()
    return dict(zip(("date", "item", "state"), found, strict=True)) if found else {"error": "no such order"}


def cancel_order(order: str) -> dict[str, Any]:
    """Cancel an order that has not left."""
    found = find_order(order)
    if found.get("state") != "packing":
        return {"cancelled": False, "reason": found.get("error") or f"{found['state']} on {found['date']}"}
    database.execute("UPDATE orders SET state = 'cancelled' WHERE number = ?", [order])
    return {"cancelled": True}


FUNCTIONS = {"find_order": find_order, "cancel_order": cancel_order}


def answer(client: OpenAI, model: str, messages: list[Any]) -> str:
    """Return the model's answer, after as many calls as it makes; ``messages`` grows by all of them."""
    while True:
        message = client.chat.completions.create(model=model, messages=messages, tools=TOOLS).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            assert call.type == "function"
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            print(f"  {call.function.name}({call.function.arguments}) -> {json.dumps(result)}")
            content = json.dumps(result, separators=(",", ":"), sort_keys=True)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def main() -> None:
    """Ask each of the command line's questions in one conversation."""
    model, *questions = sys.argv[1:]
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    messages: list[Any] = []
    with OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        for question in questions:
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            print(answer(client, model, messages))


if __name__ == "__main__":
    main()
