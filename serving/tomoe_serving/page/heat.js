// Heat map of the expert load: layers across, experts down.

import { count, element, percent } from "./format.js";

const FULL = 4; // a share of this many times the balanced one, or more, has the full colour

export class HeatMap {
  constructor(node, onLayer) {
    this.node = node;
    this.onLayer = onLayer;
    this.layer = 0;
    this.report = null;
  }

  fail(message) {
    this.report = null;
    this.node.replaceChildren(element("p", "muted", message));
  }

  show(report) {
    const isNew = this.report?.num_layers !== report.num_layers || this.report?.num_experts !== report.num_experts;
    this.report = report;
    if (isNew) this.#build();
    const totals = report.tokens.map((row) => row.reduce((sum, n) => sum + n, 0));
    this.cells.forEach((row, expert) =>
      row.forEach((cell, layer) => {
        const share = totals[layer] ? report.tokens[layer][expert] / totals[layer] : 0;
        cell.style.setProperty("--share", Math.min(1, (share * report.num_experts) / FULL).toFixed(3));
        cell.firstChild.textContent = percent(share, 1);
        cell.title = `Layer ${layer}, expert ${expert}: ${percent(share, 1)} of ${count(totals[layer])} tokens`;
      }),
    );
    this.setLayer(this.layer);
  }

  setLayer(layer) {
    this.layer = layer;
    if (!this.report) return;
    this.cells.forEach((row) => row.forEach((cell, i) => cell.classList.toggle("chosen", i === layer)));
    const { load_imbalance: imbalance, neuron_union_ratio: union, num_tokens: tokens, step_paths: paths } = this.report;
    const steps = Object.values(paths).reduce((sum, n) => sum + n, 0);
    const facts = tokens
      ? [
          ["Busiest expert", `${imbalance[layer].toFixed(2)} × the mean`],
          ["Neurons used in a step", percent(union[layer])],
        ]
      : [];
    const rows = [
      ...facts.map(([name, value]) => [`${name}, layer ${layer}`, value]),
      ["Tokens computed", count(tokens)],
      ...Object.entries(paths).map(([path, n]) => [`Steps, ${path.replace("_", ": ")}`, `${count(n)} (${percent(n / steps)})`]),
    ];
    this.facts.replaceChildren(...rows.map(([name, value]) => pair(name, value)));
  }

  #build() {
    const { num_layers: layers, num_experts: experts } = this.report;
    const table = element("table", "heat");
    const caption = element("caption", "hidden", "Share of each layer's tokens at each expert");
    const head = element("tr");
    const corner = element("th");
    corner.append(element("span", "hidden", "Expert"));
    head.append(corner);
    for (let layer = 0; layer < layers; layer++) {
      const cell = element("th");
      cell.scope = "col";
      const isShown = layer % 5 === 0;
      cell.append(element("span", isShown ? "" : "hidden", String(layer)));
      head.append(cell);
    }
    const thead = element("thead");
    thead.append(head);
    const body = element("tbody");
    this.cells = Array.from({ length: experts }, (_, expert) => {
      const row = element("tr");
      const name = element("th", "", String(expert));
      name.scope = "row";
      row.append(name);
      const cells = Array.from({ length: layers }, (_, layer) => {
        const cell = element("td");
        cell.append(element("span", "hidden"));
        cell.addEventListener("click", () => this.onLayer(layer));
        row.append(cell);
        return cell;
      });
      body.append(row);
      return cells;
    });
    table.append(caption, thead, body);
    const axis = element("div", "axis");
    const scale = element("span", "scale");
    scale.append("0", element("i"), `${percent(Math.min(1, FULL / experts))} or more`);
    axis.append(element("span", "", "Layers across, experts down"), scale);
    this.facts = element("dl", "rows");
    this.node.replaceChildren(table, axis, this.facts);
  }
}

/** A name and a value of a <dl>. */
export function pair(name, value) {
  const row = element("div");
  row.append(element("dt", "", name), element("dd", "", value));
  return row;
}
