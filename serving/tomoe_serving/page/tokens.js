// One answer: its tokens as coloured text and as a table.

import { element, paint } from "./format.js";

/** Tokens and their experts. Token i of the answer has position promptTokens + i in the request. */
export class Answer {
  constructor(traceId) {
    this.traceId = traceId;
    this.tokens = [];
    this.experts = []; // by position in the request: a row of experts, or null
    this.promptTokens = null;
    this.isDone = false;
    this.isTraced = false; // the trace is complete
    this.chosen = -1;
    this.layer = 0;

    this.node = element("div", "message assistant");
    this.text = element("div", "answer pending");
    this.text.tabIndex = 0;
    this.text.role = "group";
    this.note = element("p", "note");
    this.details = element("details");
    this.details.append(element("summary", "", "Tokens and experts as a table"), element("div", "tokens"));
    this.details.hidden = true;
    this.details.addEventListener("toggle", () => this.#fillTable());
    this.node.append(this.text, this.note, this.details);
    this.#label();
  }

  /** Add a token. Its text may be empty: it can be a part of a character. */
  add(text) {
    const span = element("span");
    span.dataset.index = this.tokens.length;
    // A line break has no area to colour, so a mark is added.
    for (const part of text.split(/(\n)/)) {
      if (part === "\n") span.append(element("span", "mark", "↵"), "\n");
      else span.append(part);
    }
    this.tokens.push(text);
    this.text.append(span);
    this.#colour(this.tokens.length - 1);
  }

  /** Clear the text of the last token, which is the end-of-text token. */
  hideLast() {
    this.tokens[this.tokens.length - 1] = "";
    this.text.lastChild.textContent = "";
  }

  /** Add the rows of the trace from position experts.length on. */
  extend(trace) {
    this.promptTokens = trace.num_prompt_tokens;
    this.isTraced = this.isDone && trace.is_finished;
    const first = this.experts.length;
    this.experts.push(...trace.experts);
    for (let i = Math.max(0, first - this.promptTokens); i < this.tokens.length; i++) this.#colour(i);
    this.#fillTable();
  }

  finish(note, isError = false) {
    this.isDone = true;
    this.text.classList.remove("pending");
    this.note.textContent = note;
    this.note.classList.toggle("error", isError);
    this.details.hidden = this.tokens.length === 0;
    this.text.hidden = this.tokens.length === 0;
    this.#label();
  }

  setLayer(layer) {
    this.layer = layer;
    for (let i = 0; i < this.tokens.length; i++) this.#colour(i);
    this.#fillTable();
  }

  /** Experts of token i at every layer; null if unknown or not computed. */
  row(i) {
    return this.promptTokens == null ? null : (this.experts[this.promptTokens + i] ?? null);
  }

  /** Text for the expert of token i at the selected layer. */
  served(i) {
    const row = this.row(i);
    if (row) return String(row[this.layer]);
    const isLast = i === this.tokens.length - 1;
    return isLast && this.isTraced ? "none: never fed back to the model" : "unknown";
  }

  get content() {
    return this.tokens.join("");
  }

  choose(i) {
    this.text.children[this.chosen]?.classList.remove("chosen");
    this.chosen = Math.max(-1, Math.min(i, this.tokens.length - 1));
    this.text.children[this.chosen]?.classList.add("chosen");
  }

  #label() {
    const size = this.isDone ? `, ${this.tokens.length} tokens` : "";
    this.text.setAttribute("aria-label", `Answer${size}; use the arrow keys to move between tokens`);
    this.text.setAttribute("aria-busy", String(!this.isDone));
  }

  #colour(i) {
    paint(this.text.children[i], this.row(i)?.[this.layer]);
  }

  #fillTable() {
    if (!this.details.open) return;
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const title of ["Token", "Text", `Expert at layer ${this.layer}`]) {
      const cell = element("th", "", title);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    this.tokens.forEach((text, i) => {
      const row = body.insertRow();
      row.insertCell().textContent = i + 1;
      row.insertCell().textContent = JSON.stringify(text).slice(1, -1);
      row.insertCell().textContent = this.served(i);
    });
    this.details.lastChild.replaceChildren(table);
  }
}
