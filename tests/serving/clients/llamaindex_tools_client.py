"""LlamaIndex with functions and structured output; what it reads and does as one JSON document."""

import asyncio
import json

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from weather_tool import CALLING, MODEL, QUESTION, URL, Weather, ran, weather


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
