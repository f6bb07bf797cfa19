// OpenAI's package for Node as the client. Prints what it saw as one JSON document.
// Arguments: the directory with node_modules, the server's address, its key.
import { createRequire } from "node:module";

const [, , directory, baseURL, apiKey] = process.argv;
const { default: OpenAI } = createRequire(`${directory}/`)("openai");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

// The content says which reply the server is to give.
const asked = (content, more = {}) => ({ model: "tiny", messages: [{ role: "user", content }], ...more });
const parameters = {
  type: "object",
  properties: { city: { type: "string" }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const format = { type: "json_schema", json_schema: { name: "place", schema: parameters, strict: true } };

async function refusal(work) {
  try {
    await work();
  } catch (error) {
    const { constructor, status, code, param, headers } = error;
    return [constructor.name, status ?? null, code ?? null, param ?? null, headers?.get("retry-after") ?? null];
  }
}

async function read(stream) {
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

const { chat, completions, models, responses } = client;
const ran = [];
const weather = (given) => `hot in ${ran[ran.push(given) - 1].city}`;
const runner = chat.completions.runTools(
  asked("call", {
    tools: [{ type: "function", function: { name: "weather", parse: JSON.parse, parameters, function: weather } }],
  }),
);
const toolsRun = { answer: await runner.finalContent(), ran };
const left = await chat.completions.create(asked("slow", { stream: true }));
await left[Symbol.asyncIterator]().next();
left.controller.abort();

console.log(
  JSON.stringify({
    models: (await models.list()).data.map((model) => model.id),
    chat: await chat.completions.create(asked("hi", { n: 2, logprobs: true, top_logprobs: 1 })),
    text: (await completions.create({ model: "tiny", prompt: "a", max_tokens: 4 })).choices[0],
    streamed: await read(
      await chat.completions.create(asked("hi", { stream: true, stream_options: { include_usage: true } })),
    ),
    collected: await chat.completions.stream(asked("hi")).finalContent(),
    calls: (await chat.completions.create(asked("call", { tools }))).choices[0],
    callsStreamed: (await chat.completions.stream(asked("call", { tools })).finalChatCompletion()).choices[0],
    toolsRun,
    form: (await chat.completions.parse(asked("form", { response_format: format }))).choices[0].message.content,
    response: (await responses.create({ model: "tiny", input: "hi" })).output_text,
    responseStreamed: (await responses.stream({ model: "tiny", input: "hi" }).finalResponse()).output_text,
    errors: [
      await refusal(() => chat.completions.create(asked("hi", { tools: [{ type: "function" }] }))),
      await refusal(() => chat.completions.create(asked("hi", { store: true }))),
      await refusal(() => chat.completions.create({ ...asked("hi"), model: "gpt-4" })),
      await refusal(() => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list()),
      await refusal(() => chat.completions.create(asked("full"))),
      await refusal(async () => read(await chat.completions.create(asked("fail", { stream: true })))),
    ],
  }),
);
