// Vercel's AI SDK with its defaults, by both of its providers: what it answers and throws as one JSON document.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [URL, MODEL, QUESTION] = process.argv.slice(2);
const compatible = createOpenAICompatible({ name: "tunewright", baseURL: URL });
const openai = createOpenAI({ baseURL: URL, apiKey: "none" });

async function answers(chat, text) {
  const whole = await generateText({ model: chat, prompt: QUESTION });
  const stream = streamText({ model: chat, prompt: QUESTION });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  const again = [{ role: "user", content: QUESTION }, ...whole.response.messages, { role: "user", content: "And?" }];
  return {
    text: whole.text,
    usage: [whole.usage.inputTokens, whole.usage.outputTokens],
    finish: whole.finishReason,
    stream: streamed,
    "stream finish": await stream.finishReason,
    system: (await generateText({ model: chat, system: "Be brief.", prompt: QUESTION })).text,
    repeated: (await generateText({ model: chat, messages: again })).text,
    completion: (await generateText({ model: text, prompt: QUESTION })).text,
  };
}

async function thrown(model) {
  try {
    await generateText({ model, prompt: QUESTION, maxRetries: 0 });
  } catch (error) {
    return [error.statusCode, JSON.parse(error.responseBody).error.code];
  }
}

console.log(
  JSON.stringify({
    compatible: await answers(compatible(MODEL), compatible.completionModel(MODEL)),
    openai: await answers(openai.chat(MODEL), openai.completion(MODEL)),
    responses: (await generateText({ model: openai(MODEL), prompt: QUESTION })).text,
    raised: { model: await thrown(compatible("other")) },
  }),
);
