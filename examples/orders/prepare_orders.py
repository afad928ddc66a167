"""Conversations of a bookshop's order desk, made by a fixed seed: what an agent with two functions is trained on."""

from __future__ import annotations

import json
import random
from typing import Any

from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter

NAME = "orders"
ROWS_FILE = "orders.jsonl"
ROWS = 320

_ORDER = {
    "type": "object",
    "properties": {"order": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["order"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": _ORDER}}
    for name, description in (("find_order", "Look an order up."), ("cancel_order", "Cancel an order."))
]
"""The two functions. ``agent.py`` declares the same."""

_SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"sources": [ROWS_FILE]},
    # The bundled base's own template has no form for functions.
    "chat": {"tools": "hermes"},
    # A model this small learns at a higher rate than the 7B models that the preset's 2e-4 is for.
    "train": {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 1, "batch_size": 8},
    "evaluate": {
        "metric": "exact_match",
        "extra_metrics": ["call_exact_match", "call_name_match", "call_schema_valid", "irrelevance_detection"],
        # Demonstrations with calls and results are long: one takes as many tokens as the question.
        "num_fewshot": [1],
        "static_seeds": 1,
        "retrievers": ["bm25"],
        "tuned_retrieved": False,
        "max_new_tokens": 64,
    },
    # Without the base's own samples: they are long, and take more time than all the rest.
    "regressions": {"samples": 0},
}

NEEDS_NUMBER = "Which order is it? Please give me its number."
ONLY_ORDERS = "I can only look up and cancel orders."

_TITLES = (
    *("atlas", "cookbook", "dictionary", "novel", "songbook", "travel guide", "poetry collection", "chess manual"),
    *("garden book", "history of Rome", "bird guide", "diary", "star chart", "sketchbook", "calendar", "comic"),
)
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
_FIND = (
    *("Where is my order {n}?", "What happened to order {n}?", "Has {n} left yet?", "Could you track {n} for me?"),
    *("I'm waiting for number {n}. Any news?", "Please check the state of my purchase {n}.", "Status of {n}, please."),
    *("My parcel has the number {n}; when was it sent?", "Hi! Did my {title} arrive? The order was {n}."),
    *("I bought a {title} ({n}). Is it on its way?", "When does {n} come?", "Tell me about order {n}."),
)
_CANCEL = (
    *("Cancel order {n}.", "I don't want {n} any more.", "Please stop my order {n}.", "Can you undo purchase {n}?"),
    *("I changed my mind about the {title}, number {n}. Cancel it.", "Withdraw {n}, please."),
    *("The {title} was a mistake: cancel {n}.", "Call off order {n} before it ships."),
)
_CANCEL_IT = ("Cancel it, please.", "Then cancel it.", "I don't want it any more.", "Please call it off.", "Stop it.")
_VAGUE = (
    *("Where is my order?", "I'd like to cancel an order.", "Has my {title} been sent?", "I want to cancel."),
    *("Can you check on my parcel?", "Any news about my {title}?", "My purchase hasn't come.", "Stop my order!"),
)
_NUMBER = ("It's {n}.", "{n}", "The number is {n}.", "Number {n}, I think.", "Sure: {n}.")
_OTHER = (
    *("Do you sell a {title}?", "What does a {title} cost?", "How do I get to your shop?", "Who wrote the {title}?"),
    *("Are you open on Sundays?", "Tell me a joke.", "What will the weather be in {month}?", "Do you have jobs?"),
    *("Can I pay by card?", "Recommend a {title} for a friend.", "How much is 12 times {k}?", "Gift-wrap my {title}."),
    *("Is there a sale in {month}?", "I forgot my password.", "Translate '{title}' into French.", "What's your name?"),
)


class _Desk:
    """Draws conversations."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._turns: list[dict[str, Any]] = []

    def conversation(self) -> list[dict[str, Any]]:
        draw = self._draw
        self._turns = []
        number, title = f"{draw.randrange(10_000, 100_000)}", draw.choice(_TITLES)
        kind = draw.choices(("find", "cancel", "vague", "other"), (5, 3, 2, 2))[0]
        if kind == "other":
            self._say("user", self._asked(_OTHER, number, title))
            self._say("assistant", ONLY_ORDERS)
            return self._turns
        if kind == "vague":
            asked = self._asked(_VAGUE, number, title)
            self._say("user", asked)
            self._say("assistant", NEEDS_NUMBER)
            self._say("user", self._asked(_NUMBER, number, title))
            kind = "cancel" if "cancel" in asked or "Stop" in asked else "find"
        else:
            self._say("user", self._asked(_FIND if kind == "find" else _CANCEL, number, title))
        state, date = (
            draw.choice(("packing", "shipped", "delivered")),
            f"{draw.randrange(1, 29)} {draw.choice(_MONTHS)}",
        )
        if kind == "find" and draw.random() < 0.12:
            self._call("find_order", number, {"error": "no such order"})
            self._say("assistant", f"I find no order {number}. Please check its number.")
            return self._turns
        if kind == "find":
            self._call("find_order", number, {"date": date, "item": title, "state": state})
            words = {"packing": "is being packed and leaves on", "shipped": "was shipped on"}
            self._say("assistant", f"Your {title} {words.get(state, 'was delivered on')} {date}.")
            if draw.random() < 0.55:
                return self._turns
            self._say("user", draw.choice(_CANCEL_IT))
        if state == "packing":
            self._call("cancel_order", number, {"cancelled": True})
            self._say("assistant", f"Order {number} is cancelled.")
        else:
            self._call("cancel_order", number, {"cancelled": False, "reason": f"{state} on {date}"})
            self._say("assistant", f"Order {number} cannot be cancelled: it was {state} on {date}.")
        return self._turns

    def _asked(self, forms: tuple[str, ...], number: str, title: str) -> str:
        draw = self._draw
        return draw.choice(forms).format(n=number, title=title, month=draw.choice(_MONTHS), k=draw.randrange(3, 40))

    def _say(self, role: str, content: str) -> None:
        self._turns.append({"role": role, "content": content})

    def _call(self, name: str, number: str, result: dict[str, Any]) -> None:
        call_id = f"call_{len(self._turns)}"
        function = {"name": name, "arguments": canonical_json({"order": number})}
        call = {"id": call_id, "type": "function", "function": function}
        self._turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
        self._turns.append({"role": "tool", "tool_call_id": call_id, "content": canonical_json(result)})


def rows(count: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversations in OpenAI's format; a third of them end with the call of a function.

    Args:
        count: the number of conversations.
        seed: the same seed makes the same conversations.
    """
    desk, drawn = _Desk(seed), []
    for number in range(count):
        turns = desk.conversation()
        # Evaluation generates the last turn: without these rows it would never generate a call.
        if number % 3 == 0 and turns[-2]["role"] == "tool":
            turns = turns[:-2]
        drawn.append({"messages": turns, "tools": TOOLS})
    return drawn


def project_files(_data: None, _reporter: Reporter) -> dict[str, str]:
    """Return the prepared files of the project by name: its config and rows."""
    config = write_config({"name": NAME, "base_model": "bundled:smollm2-135m-instruct", **_SECTIONS})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
    return {CONFIG_FILE: config, ROWS_FILE: "".join(lines)}
