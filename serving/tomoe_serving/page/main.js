// The page: conversation, layer slider, latency, budget and expert load.

import { ApiError, chat, get, randomId, setKey } from "./api.js";
import { count, element, paint, time } from "./format.js";
import { Latency, showBudget } from "./gauges.js";
import { HeatMap } from "./heat.js";
import { Answer } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["What is the capital of France?", "Write a Python function that adds two numbers.", "Tell me a short story about a cat."];
const REFRESH_MS = 2000;
const TRACE_MS = 350;

const state = { model: null, layers: 0, experts: 0, layer: 0, messages: [], answers: [], running: null };

const latency = new Latency({ ttft: $("ttft"), tpot: $("tpot"), count: $("num-tokens"), sparkline: $("sparkline") });
const heat = new HeatMap($("heat"), (layer) => {
  $("layer").value = layer;
  setLayer(layer);
});
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const say = (text) => ($("status").textContent = text);

function showKeyField(error) {
  if (!(error instanceof ApiError) || error.status !== 401) return false;
  $("model").textContent = "This server requires an API key.";
  $("key-form").hidden = false;
  return true;
}

async function connect() {
  try {
    const { data } = await get("v1/models");
    state.model = data[0].id;
    $("key-form").hidden = true;
    $("model").textContent = state.model;
  } catch (error) {
    if (!showKeyField(error)) $("model").textContent = `Not connected: ${error.message}`;
  }
}

async function refresh() {
  if (!state.model) return;
  try {
    const report = await get("v1/tomoe/experts");
    if (!state.layers) useExperts(report.num_layers, report.num_experts);
    heat.show(report);
  } catch (error) {
    heat.fail(error.status === 404 ? `Not available: ${error.message}` : "Not available at the moment");
  }
  try {
    showBudget($("budget"), await get("v1/tomoe/budget"));
  } catch {
    $("budget").replaceChildren(element("p", "muted", "Not available"));
  }
}

function useExperts(layers, experts) {
  Object.assign(state, { layers, experts });
  $("model").textContent = `${state.model} · ${experts} experts · ${layers} layers`;
  const slider = $("layer");
  slider.max = layers - 1;
  slider.disabled = false;
  slider.value = Math.floor(layers / 2);
  $("legend").replaceChildren(
    ...Array.from({ length: experts }, (_, expert) => {
      const item = element("li");
      const swatch = element("span", "swatch", String(expert));
      paint(swatch, expert);
      item.append(swatch, element("span", "count"));
      return item;
    }),
  );
  setLayer(Number(slider.value));
}

function setLayer(layer) {
  state.layer = layer;
  $("layer-value").textContent = state.layers ? `${layer} / ${state.layers - 1}` : "–";
  state.answers.forEach((answer) => answer.setLayer(layer));
  heat.setLayer(layer);
  showLegend();
  const chosen = state.answers.find((answer) => answer.chosen >= 0);
  if (chosen) describe(chosen);
}

function showLegend() {
  const counts = new Array(state.experts).fill(0);
  for (const answer of state.answers)
    answer.tokens.forEach((_, i) => {
      const row = answer.row(i);
      if (row) counts[row[state.layer]] += 1;
    });
  [...$("legend").children].forEach((item, expert) => {
    item.lastChild.textContent = count(counts[expert]);
    item.setAttribute("aria-label", `Expert ${expert}: ${counts[expert]} tokens`);
  });
}

function describe(answer) {
  const row = answer.row(answer.chosen);
  const text = JSON.stringify(answer.tokens[answer.chosen]).slice(1, -1);
  $("token-info").textContent = `Token ${answer.chosen + 1}, “${text}”: layer ${state.layer}, expert ${answer.served(answer.chosen)}`;
  $("token-info").classList.remove("muted");
  $("token-strip").setAttribute("aria-label", row ? `Experts from layer 0 on: ${row.join(", ")}` : "No experts");
  $("token-strip").replaceChildren(
    ...(row ?? []).map((expert, layer) => {
      const cell = element("i", layer === state.layer ? "chosen" : "");
      cell.title = `Layer ${layer}: expert ${expert}`;
      paint(cell, expert);
      return cell;
    }),
  );
}

function choose(answer, index) {
  state.answers.forEach((other) => other !== answer && other.choose(-1));
  answer.choose(index);
  if (answer.chosen >= 0) describe(answer);
}

function listen(answer) {
  answer.text.addEventListener("pointerover", (event) => {
    const span = event.target.closest("[data-index]");
    if (span) choose(answer, Number(span.dataset.index));
  });
  answer.text.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: answer.chosen + 1, ArrowLeft: Math.max(0, answer.chosen - 1), Home: 0, End: answer.tokens.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(answer, moves[event.key]);
    answer.text.children[answer.chosen]?.scrollIntoView({ block: "nearest" });
  });
  answer.text.addEventListener("focus", () => answer.chosen < 0 && choose(answer, 0));
}

/** Fetch the trace while the answer is generated, until it is complete. */
async function follow(answer) {
  for (let quiet = 0; quiet < 12; ) {
    await sleep(TRACE_MS);
    try {
      const trace = await get(`v1/tomoe/experts/traces/${answer.traceId}?start=${answer.experts.length}`);
      answer.extend(trace);
      showLegend();
      if (answer.isDone && trace.is_finished) return;
      quiet = answer.isDone && !trace.experts.length ? quiet + 1 : 0;
    } catch {
      if (answer.isDone) quiet += 1; // not started yet, or the engine is in a long step
    }
  }
}

function scrollDown() {
  const log = $("transcript");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

async function send(text) {
  $("welcome").hidden = true;
  state.messages.push({ role: "user", content: text });
  const question = element("div", "message user");
  question.append(element("p", "", text));
  const answer = new Answer(randomId());
  answer.layer = state.layer;
  state.answers.push(answer);
  listen(answer);
  $("transcript").append(question, answer.node);
  $("transcript").scrollTop = $("transcript").scrollHeight;
  state.running = new AbortController();
  setRunning(true);
  latency.begin();
  say("The model is answering.");
  if (state.layers) follow(answer);
  let note = "";
  let isError = false;
  try {
    const end = await stream(answer);
    const { ttft, tpot } = latency.end();
    note = `${count(answer.tokens.length)} tokens, first after ${time(ttft).join(" ")}, then ${time(tpot).join(" ")} each`;
    if (end === "length") note += "; stopped at max tokens";
  } catch (error) {
    isError = error.name !== "AbortError";
    note = isError ? `No answer: ${error.message}` : "Stopped";
    showKeyField(error);
  }
  if (answer.tokens.length) state.messages.push({ role: "assistant", content: answer.content });
  else state.messages.pop();
  answer.finish(note, isError);
  setRunning(false);
  scrollDown();
  say(isError ? note : `Answer complete. ${note}.`);
}

/** Read one streamed answer; returns its finish reason. */
async function stream(answer) {
  let end = null;
  const body = {
    model: state.model,
    messages: state.messages,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    logprobs: true, // one entry per token: chunks may hold several
    ...(state.layers ? { vllm_xargs: { tomoe_trace: answer.traceId } } : {}),
  };
  for await (const chunk of chat(body, state.running.signal)) {
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? "";
    const tokens = choice.logprobs?.content ?? [];
    // The text of a chunk with one token is right even if a character has several tokens.
    if (tokens.length > 1) tokens.forEach((token) => answer.add(token.token));
    else if (tokens.length || text) answer.add(text);
    for (let i = 0; i < Math.max(tokens.length, text ? 1 : 0); i++) latency.token();
    end = choice.finish_reason ?? end;
    if (end === "stop" && tokens.length > 1 && !text.endsWith(tokens.at(-1).token)) answer.hideLast();
    scrollDown();
  }
  return end;
}

function setRunning(isRunning) {
  $("send").disabled = isRunning;
  $("stop").hidden = !isRunning;
}

function submit() {
  const text = $("prompt").value.trim();
  if (!text || !state.model || $("send").disabled) return;
  $("prompt").value = "";
  send(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("stop").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", () => {
  state.running?.abort();
  Object.assign(state, { messages: [], answers: [] });
  $("transcript").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  showLegend();
  $("prompt").focus();
});
$("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key").value = "";
  await connect();
  await refresh();
});
$("suggestions").append(
  ...SUGGESTIONS.map((text) => {
    const item = element("li");
    const button = element("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => {
      $("prompt").value = text;
      submit();
    });
    item.append(button);
    return item;
  }),
);

await connect();
await refresh();
setInterval(() => document.hidden || refresh(), REFRESH_MS);
