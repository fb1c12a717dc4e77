// Latency, measured in the browser, and the budget that the server reports.

import { bytes, count, element, percent, short, time } from "./format.js";
import { pair } from "./heat.js";

const SVG = "http://www.w3.org/2000/svg";
const BARS = 100;

/** Times of one answer: call begin() at the request and token() at each token. */
export class Latency {
  constructor(nodes) {
    this.nodes = nodes;
  }

  begin() {
    this.start = performance.now();
    this.times = [];
    this.#show();
  }

  token() {
    this.times.push(performance.now());
    if (this.times.length < 3 || this.times.length % 4 === 0) this.#show();
  }

  end() {
    this.#show();
    return { ttft: this.ttft, tpot: this.tpot };
  }

  get ttft() {
    return this.times.length ? this.times[0] - this.start : NaN;
  }

  get tpot() {
    const gaps = this.times.length - 1;
    return gaps > 0 ? (this.times[gaps] - this.times[0]) / gaps : NaN;
  }

  #show() {
    for (const [node, value] of [[this.nodes.ttft, this.ttft], [this.nodes.tpot, this.tpot]]) {
      const [number, unit] = time(value);
      node.replaceChildren(number, ...(unit ? [element("small", "", unit)] : []));
    }
    this.nodes.count.textContent = this.times.length ? count(this.times.length) : "–";
    this.#draw();
  }

  #draw() {
    const gaps = this.times.slice(1).map((t, i) => t - this.times[i]).slice(-BARS);
    const highest = Math.max(...gaps, 1);
    const width = 300 / Math.max(gaps.length, 40);
    this.nodes.sparkline.replaceChildren(
      ...gaps.map((gap, i) => {
        const bar = document.createElementNS(SVG, "rect");
        const height = Math.max(1, (38 * gap) / highest);
        const box = { x: i * width, y: 40 - height, width: width * 0.75, height };
        for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value.toFixed(2));
        return bar;
      }),
    );
    const label = gaps.length
      ? `Time per token of the last ${gaps.length} tokens, at most ${time(highest).join(" ")}`
      : "Time per token: no answer yet";
    this.nodes.sparkline.setAttribute("aria-label", label);
  }
}

/** Smallest and largest of some numbers, or one number if they are equal. */
function range(values, format) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  return least === most ? format(most) : `${format(least)} to ${format(most)}`;
}

function meter(name, share, text) {
  const node = element("div", "meter");
  const line = element("div", "line");
  line.append(element("span", "", name), element("strong", "", text));
  const bar = element("meter");
  bar.value = share;
  bar.setAttribute("aria-label", name);
  bar.textContent = text;
  node.append(line, bar);
  return node;
}

/** Show a response of /v1/tomoe/budget. */
export function showBudget(node, { cost, capacity, in_use: use }) {
  const share = cost.active_parameters / cost.total_parameters;
  const rows = [
    ["Compute per token", `${short(cost.flops_per_token)} FLOP`],
    ["Active weights per token", bytes(cost.weight_bytes_per_token)],
    ["KV cache per token, by layout", range(Object.values(cost.kv_bytes_per_token), bytes)],
  ];
  if (use.observed_tpot_ms != null) rows.push(["Time per output token, mean", time(use.observed_tpot_ms).join(" ")]);
  if (capacity.tpot_slo_ms != null) rows.push(["Target time per output token", time(capacity.tpot_slo_ms).join(" ")]);
  if (capacity.tokens_per_s != null) rows.push(["Capacity", `${count(capacity.tokens_per_s)} tokens/s`]);
  rows.push(["Sequences running, waiting", `${count(use.running)} of ${count(capacity.max_sequences)}, ${count(use.waiting)}`]);
  const facts = element("dl", "rows");
  facts.append(...rows.map(([name, value]) => pair(name, value)));
  const active = `${short(cost.active_parameters)} of ${short(cost.total_parameters)}`;
  node.replaceChildren(
    meter("Active parameters", share, `${active} (${percent(share)})`),
    meter("KV cache in use", use.kv_usage, percent(use.kv_usage, 1)),
    facts,
  );
}
