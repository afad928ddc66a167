// OpenAI's npm SDK with functions and structured output: what it reads and does as one JSON document.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [URL, CALLING, MODEL, QUESTION] = process.argv.slice(2);
const client = new OpenAI({ baseURL: URL, apiKey: "none" });
const calling = new OpenAI({ baseURL: CALLING, apiKey: "none" });
const messages = [{ role: "user", content: QUESTION }];
const Weather = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.number().int().min(1).max(9) });
const ran = [];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "Return the weather.",
    parameters: z.toJSONSchema(Weather),
    parse: (text) => Weather.parse(JSON.parse(text)),
    function: (asked) => {
      ran.push(asked);
      return `${asked.city}: rain`;
    },
  },
};

const parsed = await client.chat.completions.parse({
  model: MODEL,
  messages,
  response_format: zodResponseFormat(Weather, "weather"),
});
console.log(
  JSON.stringify({
    parsed: parsed.choices[0].message.parsed,
    loop: await calling.chat.completions.runTools({ model: MODEL, messages, tools: [weather] }).finalContent(),
    "stream loop": await calling.chat.completions
      .runTools({ model: MODEL, messages, tools: [weather], stream: true })
      .finalContent(),
    ran,
  }),
);
