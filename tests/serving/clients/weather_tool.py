"""The arguments of each script, and the function and the form of an answer that all of them ask for."""

import sys
from typing import Any, Literal

from pydantic import BaseModel, Field

URL, CALLING, MODEL, QUESTION = sys.argv[1:]
ran: list[dict[str, Any]] = []


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Oslo", "Rome"], days: int) -> str:
    """Return the weather."""
    ran.append({"city": city, "days": days})
    return f"{city}: rain"
