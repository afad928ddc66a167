// OpenAI's npm SDK with its defaults: what it answers and throws as one JSON document.
import OpenAI from "openai";

const [URL, MODEL, QUESTION] = process.argv.slice(2);
const client = new OpenAI({ baseURL: URL, apiKey: "none" });
const messages = [{ role: "user", content: QUESTION }];
const chat = (more) => client.chat.completions.create({ model: MODEL, messages, ...more });

async function thrown(ask) {
  try {
    await ask();
  } catch (error) {
    return `${error.constructor.name} ${error.code} ${error.param}`;
  }
}

const answer = await chat({});
let text = "";
let usage;
for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const helper = await client.chat.completions.stream({ model: MODEL, messages }).finalChatCompletion();
const repeated = [...messages, answer.choices[0].message, { role: "user", content: "And?" }];
const texts = await client.completions.create({ model: MODEL, prompt: [QUESTION, "x"] });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(
  JSON.stringify({
    create: answer.choices[0].message.content,
    usage: [answer.usage, usage],
    stream: text,
    "stream helper": helper.choices[0].message.content,
    "at once": (await Promise.all([1, 2, 3].map(() => chat({})))).map((one) => one.choices[0].message.content),
    repeated: (await chat({ messages: repeated })).choices[0].message.content,
    texts: texts.choices.map((choice) => [choice.index, choice.text]),
    models,
    model: (await client.models.retrieve(MODEL)).id,
    response: (await client.responses.create({ model: MODEL, input: QUESTION })).output_text,
    raised: {
      embeddings: await thrown(() => client.embeddings.create({ model: MODEL, input: "x" })),
      model: await thrown(() => chat({ model: "other" })),
      retrieve: await thrown(() => client.models.retrieve("other")),
      n: await thrown(() => chat({ n: 17 })),
    },
  }),
);
