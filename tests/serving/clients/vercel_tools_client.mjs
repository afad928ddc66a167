// Vercel's AI SDK with functions and objects, by its providers: what it reads and does as one JSON document.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [URL, CALLING, MODEL, QUESTION] = process.argv.slice(2);
const Weather = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.number().int().min(1).max(9) });
const ran = [];
const weather = tool({
  description: "Return the weather.",
  inputSchema: Weather,
  execute: async (asked) => {
    ran.push(asked);
    return `${asked.city}: rain`;
  },
});

function models(baseURL) {
  const openai = createOpenAI({ baseURL, apiKey: "none" });
  return {
    compatible: createOpenAICompatible({ name: "tunewright", baseURL, supportsStructuredOutputs: true })(MODEL),
    openai: openai.chat(MODEL),
    responses: openai(MODEL),
  };
}

const found = {};
for (const [name, model] of Object.entries(models(URL))) {
  found[name] = {
    object: (await generateObject({ model, schema: Weather, prompt: QUESTION })).object,
    output: (await generateText({ model, output: Output.object({ schema: Weather }), prompt: QUESTION })).output,
  };
}
for (const [name, model] of Object.entries(models(CALLING))) {
  const how = { model, tools: { weather }, stopWhen: stepCountIs(4), prompt: QUESTION };
  found[name].loop = (await generateText(how)).text;
  found[name]["stream loop"] = await streamText(how).text;
}
console.log(JSON.stringify({ ...found, ran }));
