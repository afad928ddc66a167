"""LlamaIndex with functions and structured output; what it reads and does as one JSON document."""

import asyncio
import json
import sys
from typing import Any, Literal

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
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


def model(url: str) -> OpenAILike:
    return OpenAILike(
        model=MODEL, api_base=url, api_key="none", is_chat_model=True, is_function_calling_model=True, temperature=0
    )


async def main() -> None:
    tool = FunctionTool.from_defaults(weather)
    agent = FunctionAgent(tools=[tool], llm=model(CALLING), system_prompt="Be brief.")
    found = {
        "structured": model(URL).structured_predict(Weather, PromptTemplate(QUESTION)).model_dump(),
        "predict and call": str(model(CALLING).predict_and_call([tool], user_msg=QUESTION)),
        "agent": str(await agent.run(QUESTION)),
        "ran": ran,
    }
    print(json.dumps(found))


asyncio.run(main())
