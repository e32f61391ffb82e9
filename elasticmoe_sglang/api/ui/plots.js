// -- figures over time -----------------------------------------------------------------------------------------------

const PLOTS = [
  { name: "Tokens/s", lines: [["tokens", "", "tokens/s"]], format: number, area: true },
  { name: "Time to first token", lines: [["ttft_p50_ms", "", "median"], ["ttft_p99_ms", "second", "p99"]], format: ms },
  { name: "Longest gap between two tokens", lines: [["longest_gap_ms", "", "longest"]], format: ms },
];
const HEIGHT = 78, LEFT = 46, RIGHT = 6, TOP = 14, BOTTOM = 14;

function buildPlots() {
  for (const plot of PLOTS) {
    plot.now = make("b");
    const title = make("div", { class: "title" }, make("span", { text: plot.name }));
    const values = make("span");
    if (plot.lines.length > 1) {
      for (const [, look, word] of plot.lines) values.append(make("span", { class: `swatch ${look}`, "aria-hidden": "true" }), `${word}  `);
    }
    values.append(plot.now);
    title.append(values);
    plot.svg = draw("svg", { role: "img", "aria-label": plot.name });
    plot.svg.addEventListener("pointermove", (event) => {
      const box = plot.svg.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      $("inspect").value = Math.round(Math.min(1, Math.max(0, share)) * windowSeconds());
      renderPlots();
    });
    plot.svg.addEventListener("pointerleave", () => { $("inspect").value = windowSeconds(); renderPlots(); });
    $("plots").append(make("div", { class: "plot" }, title, plot.svg));
  }
  $("window").addEventListener("change", () => {
    $("inspect").max = windowSeconds();
    $("inspect").value = windowSeconds();
    renderPlots();
  });
  $("inspect").addEventListener("input", renderPlots);
  new ResizeObserver(() => state.event && renderPlots()).observe($("plots"));
}

const windowSeconds = () => Number($("window").value);

function niceMax(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((top) => top >= value);
}

const failed = (operation) => operation.phase === "failed" || operation.phase === "rolled_back";
const ended = (operation) => operation.phase === "done" || failed(operation);

function marks() {
  const running = state.event.status.running;
  return state.operations.filter((operation) => operation.columns_planned || operation.old_ep_size !== operation.new_ep_size).map((operation) => {
    const now = running && running.operation_id === operation.operation_id ? running : operation;
    return {
      from: now.created_at,
      to: now.created_at + (now.timings.total_ms ?? 0) / 1000,
      look: failed(now) ? "bad" : ended(now) ? "" : "running",
      text: now.target.rebalance ? "balance" : `${now.old_ep_size}→${now.new_ep_size}`,
    };
  });
}

function renderPlots() {
  if (!state.event) return;
  const span = windowSeconds(), to = Math.max(state.event.at, (state.figures.at(-1)?.at ?? 0) + 1), from = to - span;
  const shown = state.figures.filter((second) => second.at >= from - 1);
  const position = Number($("inspect").value);
  const looked = position >= span ? null : shown.findLast((second) => second.at <= from + position) ?? null;
  const found = marks().filter((mark) => mark.to >= from).sort((a, b) => a.from - b.from);
  PLOTS.forEach((plot, index) => drawPlot(plot, index, { from, to, span, shown, looked, found }));
  const second = looked ?? state.figures.at(-1);
  const text = second ? describe(second) : "No figures yet.";
  say($("readout"), `${looked ? "" : "Latest: "}${text}`);
  put($("inspect"), "aria-valuetext", `${looked ? "" : "latest, "}${text}`);
}

function describe(second) {
  const gap = second.longest_gap_ms === null ? "" : `, longest gap ${ms(second.longest_gap_ms)}`;
  const ttft = second.ttft_p50_ms === null ? "" : `, TTFT ${ms(second.ttft_p50_ms)} (p99 ${ms(second.ttft_p99_ms)})`;
  return `${clock(second.at)} – ${number(second.tokens)} tokens/s${ttft}${gap}, ${second.running} running, ${second.queued} waiting`;
}

function drawPlot(plot, index, { from, to, span, shown, looked, found }) {
  const width = plot.svg.clientWidth || 600, right = width - RIGHT, bottom = HEIGHT - BOTTOM;
  const x = (at) => Math.max(LEFT, LEFT + ((at - from) / span) * (right - LEFT));
  const top = niceMax(Math.max(...plot.lines.flatMap(([field]) => shown.map((second) => second[field] ?? 0)), 0));
  const y = (value) => bottom - (value / top) * (bottom - TOP);
  const parts = [];
  for (const value of [0, top / 2, top]) {
    parts.push(draw("line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }));
    if (value) parts.push(draw("text", { x: LEFT - 6, y: y(value) + 3, "text-anchor": "end" }, plot.format(value)));
  }
  let textEnd = 0;
  for (const mark of found) {
    const left = x(mark.from), end = Math.max(x(mark.to), left + 1.5);
    parts.push(draw("rect", { class: `mark ${mark.look}`, x: left, width: end - left, y: TOP, height: bottom - TOP }));
    parts.push(draw("line", { class: `mark-line ${mark.look}`, x1: end, x2: end, y1: TOP, y2: bottom }));
    if (index === 0 && end + 4 > textEnd) {
      const room = right - end > 34;
      parts.push(draw("text", { class: "mark-text", x: room ? end + 3 : end - 3, y: TOP - 4, "text-anchor": room ? "start" : "end" }, mark.text));
      textEnd = end + 34;
    }
  }
  for (const at of state.restarts.filter((each) => each >= from)) {
    parts.push(draw("line", { class: "mark-line restart", x1: x(at), x2: x(at), y1: TOP, y2: bottom }));
    if (index === 0) parts.push(draw("text", { x: x(at) + 3, y: TOP - 4 }, "restart"));
  }
  for (const [field, look] of plot.lines) parts.push(...drawLine(plot, field, look, shown, x, y, bottom));
  if (looked) parts.push(draw("line", { class: "cross", x1: x(looked.at + 0.5), x2: x(looked.at + 0.5), y1: TOP, y2: bottom }));
  if (index === PLOTS.length - 1) {
    for (const share of [0, 0.5, 1]) {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      parts.push(draw("text", { x: LEFT + share * (right - LEFT), y: HEIGHT - 2, "text-anchor": anchor }, clock(from + share * span)));
    }
  }
  plot.svg.replaceChildren(...parts);
  const second = looked ?? shown.at(-1);
  const values = plot.lines.map(([field]) => (second ? plot.format(looked ? second[field] : recent(field, 10)) : "–"));
  say(plot.now, values.join(" · "));
  const changes = found.length ? `, ${plural(found.length, "change")} marked` : "";
  put(plot.svg, "aria-label", `${plot.name} over the last ${$("window").selectedOptions[0].text}: now ${values.join(" and ")}, axis to ${plot.format(top)}${changes}`);
}

function drawLine(plot, field, look, shown, x, y, bottom) {
  // A second without a value interrupts the line only where several follow each other.
  const runs = [];
  let last = null;
  for (const second of shown) {
    if (second[field] === null) continue;
    if (last === null || second.at - last > 10) runs.push([]);
    runs.at(-1).push([x(second.at + 0.5), y(second[field])]);
    last = second.at;
  }
  return runs.flatMap((points) => {
    const path = points.map(([left, height], number) => `${number ? "L" : "M"}${left.toFixed(1)} ${height.toFixed(1)}`).join("");
    const line = draw("path", { class: `line ${look}`, d: points.length > 1 ? path : `${path}h2` });
    if (!plot.area || points.length < 2) return [line];
    return [draw("path", { class: "area", d: `${path}L${points.at(-1)[0].toFixed(1)} ${bottom}L${points[0][0].toFixed(1)} ${bottom}Z` }), line];
  });
}
