// -- the connection --------------------------------------------------------------------------------------------------

class Locked extends Error {}

function headers(more = {}) {
  return state.key ? { ...more, Authorization: `Bearer ${state.key}` } : more;
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" ? error : error.message;
  } catch { return `The server answered with status ${response.status}.`; }
}

async function ask(path, body) {
  const options = body === undefined
    ? { headers: headers(), cache: "no-store" }
    : { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(30000) });
  if (response.status === 401 || response.status === 403) throw new Locked();
  return response;
}

// Reads events until the stream ends, which it only does by an error or with the server.
async function follow() {
  const abort = new AbortController();
  let silence = 0;
  const heard = () => { clearTimeout(silence); silence = setTimeout(() => abort.abort(), SILENCE_MS); };
  try {
    heard();
    const response = await fetch("events", { headers: headers(), cache: "no-store", signal: abort.signal });
    if (response.status === 401 || response.status === 403) throw new Locked();
    if (!response.ok) throw new Error(await refusal(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", first = true;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data) { receive(JSON.parse(data), first); first = false; }
      }
    }
  } finally { clearTimeout(silence); abort.abort(); }
}

let wake = null; // Ends the wait for the next attempt.
let submitted = null; // Hands over the key that was entered.

async function connect() {
  let attempt = 0;
  for (;;) {
    const before = state.event;
    let why = "The server has closed the connection.";
    try { await follow(); } catch (error) {
      if (error instanceof Locked) { await unlock(); attempt = 0; continue; }
      why = error instanceof TypeError || error.name === "AbortError" ? "The server does not answer." : error.message;
    }
    if (state.event !== before) attempt = 0;
    await lost(why, RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]);
    attempt += 1;
  }
}

async function lost(why, delay) {
  enter("lost");
  say($("lost-what"), why);
  say($("lost-since"), state.event ? `What you see is as of ${clock(state.event.at)}.` : "");
  const until = Date.now() + delay;
  const tick = () => say($("lost-next"), `Trying again in ${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s`);
  tick();
  const timer = setInterval(tick, 250);
  await new Promise((resolve) => { wake = resolve; setTimeout(resolve, delay); });
  clearInterval(timer);
  wake = null;
  say($("lost-next"), "Trying …");
}

async function unlock() {
  const wrong = Boolean(state.key);
  forget();
  enter("locked");
  say($("key-error"), wrong ? "The server refused this key." : "");
  put($("key"), "aria-invalid", wrong);
  $("key").value = "";
  $("key").focus();
  state.key = await new Promise((resolve) => { submitted = resolve; });
  submitted = null;
  sessionStorage.setItem(KEY, state.key);
  enter("loading");
  $("main").focus();
}

function forget() { state.key = null; sessionStorage.removeItem(KEY); }

const CONNECTIONS = { loading: "Connecting", live: "Live", lost: "Not connected", locked: "Key needed" };

function enter(connection) {
  state.connection = connection;
  document.body.dataset.state = connection;
  say($("connection-text"), CONNECTIONS[connection]);
  show($("loading"), connection === "loading" && !state.event);
  show($("gate"), connection === "locked");
  show($("lost"), connection === "lost");
  show($("board"), Boolean(state.event) && connection !== "locked");
  show($("forget"), Boolean(state.key));
  if (connection !== "live") show($("no-hmm"), false);
}

function receive(event, first) {
  if (event.instance !== state.instance) {
    if (state.instance) {
      state.restarts.push(event.at);
      announce("The server was restarted.");
    }
    state.instance = event.instance;
    state.edited = false;
    state.selected.clear();
    state.policy = null;
    state.decisions = [];
    nextPolicy = 0;
  }
  if (event.operations) state.operations = event.operations;
  if (first && event.figures.length) {
    const from = event.figures[0].at;
    state.figures = state.figures.filter((second) => second.at < from);
  }
  state.figures.push(...event.figures);
  state.figures.splice(0, state.figures.length - KEPT_S);
  state.event = event;
  if (state.connection !== "live") enter("live");
  render();
}

function announce(text) {
  if (text !== state.announced) { state.announced = text; say($("news"), text); }
}

// -- drawing everything ----------------------------------------------------------------------------------------------

function render() {
  const { status, model } = state.event;
  say($("model"), model);
  const title = `EP ${status.ep_size}/${status.max_ep_size} · ${model || "ElasticMoE"}`;
  if (document.title !== title) document.title = title;
  show($("no-hmm"), !status.memory.available);
  say($("no-hmm-why"), status.memory.error ?? "");
  renderTiles(status);
  renderPlots();
  renderScale(status);
  renderRanks(status);
  renderMemory(status.memory);
  renderOperations();
}

function tile(name, value, more = "") {
  let entry = tile.made.get(name);
  if (!entry) {
    const text = document.createTextNode(""), small = make("small");
    $("tiles").append(make("div", {}, make("dt", { text: name }), make("dd", {}, text, small)));
    tile.made.set(name, (entry = { text, small }));
  }
  if (entry.text.data !== value) entry.text.data = value;
  say(entry.small, more);
}
tile.made = new Map();

function recent(field, seconds) {
  const found = state.figures.slice(-seconds).reverse().find((second) => second[field] !== null);
  return found ? found[field] : null;
}

function renderTiles(status) {
  const last = state.figures.at(-1);
  const active = status.ranks.filter((rank) => rank.kv_tokens !== null);
  const total = active.reduce((sum, rank) => sum + rank.kv_tokens, 0);
  const used = active.reduce((sum, rank) => sum + (rank.kv_used ?? 0), 0);
  tile("EP size", String(status.ep_size), ` of ${status.max_ep_size}`);
  tile("Epoch", String(status.epoch));
  tile("Tokens/s", number(last?.tokens));
  tile("TTFT median", ms(recent("ttft_p50_ms", 10)));
  tile("TTFT p99", ms(recent("ttft_p99_ms", 10)));
  tile("Longest gap", ms(recent("longest_gap_ms", 3)));
  tile("Running", number(last?.running));
  tile("Waiting", number(last?.queued));
  tile("KV in use", total ? `${Math.round((100 * used) / total)} %` : "–");
}

// -- changing the size -----------------------------------------------------------------------------------------------

function renderScale(status) {
  for (const [name, value] of [["min", status.attention_tp], ["step", status.attention_tp], ["max", status.max_ep_size]]) put($("size"), name, value);
  if (!state.edited && $("size").value !== String(status.ep_size)) $("size").value = status.ep_size;
  const hmm = status.memory.available ? "" : " The HMM does not answer: changes are refused.";
  const replicas = status.attention_tp === 1 ? "" : ` Replicas of ${status.attention_tp} ranks.`;
  say($("size-note"), `Now ${status.ep_size} of ${status.max_ep_size}: rank${status.ep_size === 1 ? "" : "s"} ${ranges(status.membership)}.${replicas}${hmm}`);
  const running = status.running;
  show($("running"), Boolean(running));
  if (running) {
    say($("running-what"), `${changeText(running)}: ${running.phase}`);
    for (const item of $("running-phases").children) {
      const at = PHASES.indexOf(item.dataset.phase), now = PHASES.indexOf(running.phase);
      dress(item, at < now ? "done" : at === now ? "current" : "");
      if (at === now) put(item, "aria-current", "step"); else item.removeAttribute("aria-current");
    }
    $("running-columns").max = Math.max(1, running.columns_planned);
    $("running-columns").value = running.columns_moved;
    say($("running-note"), `${running.columns_moved} of ${running.columns_planned} columns pulled, ${bytes(running.bytes_moved)}. ${running.message}`);
  }
  const latest = running ?? status.last;
  if (latest && (running || state.announced)) announce(`Change of the EP size ${changeText(latest)}: ${latest.phase.replace("_", " ")}`);
}

function changeText(operation) {
  if (operation.target.rebalance) return `${operation.new_ep_size} (rebalance)`;
  const ranks = operation.target.retire_ranks;
  return `${operation.old_ep_size} → ${operation.new_ep_size}${ranks ? ` (retire ${ranks.join(", ")})` : ""}`;
}

async function change(body) {
  const answer = $("scale-answer");
  dress(answer, "");
  say(answer, "Asking …");
  try {
    const response = await ask("../scale_elastic_ep", body);
    if (!response.ok) {
      dress(answer, "bad");
      say(answer, `Refused: ${await refusal(response)}`);
      return;
    }
    const operation = await response.json();
    state.edited = false;
    state.selected.clear();
    say(answer, operation.columns_planned || operation.old_ep_size !== operation.new_ep_size
      ? `Accepted: ${changeText(operation)}.` : operation.message);
    renderRanks(state.event.status);
  } catch (error) { failedToAsk(answer, error); }
}

function failedToAsk(answer, error) {
  dress(answer, "bad");
  if (error instanceof Locked) {
    say(answer, "The server refused the key. Forget it and enter the right one.");
  } else say(answer, "The server did not answer; whether it heard this is shown under Changes once it is back.");
}

function confirmed(what, note) {
  say($("confirm-what"), what);
  say($("confirm-note"), note);
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

async function scaleAsked(event) {
  event.preventDefault();
  const now = state.event.status.ep_size, wanted = $("size").valueAsNumber;
  if (wanted < now) {
    const yes = await confirmed(`Shrink from ${now} to ${plural(wanted, "rank")}?`,
      "Running requests of the ranks that retire move to the others, with their KV.");
    if (!yes) return;
  }
  await change({ new_ep_size: wanted });
}

async function retireAsked() {
  const ranks = [...state.selected].sort((a, b) => a - b);
  if (await confirmed(`Retire ${plural(ranks.length, "rank").replace(/^\d+ /, "")} ${ranks.join(", ")}?`, "Their running requests move to the other ranks, with their KV.")) {
    await change({ retire_ranks: ranks });
  }
}

// -- ranks and placement ---------------------------------------------------------------------------------------------

const rows = [], cells = new Map();

function buildRows(count) {
  $("rank-rows").replaceChildren();
  rows.length = 0;
  cells.clear();
  state.placement = null;
  for (let rank = 0; rank < count; rank += 1) {
    const cell = (name) => make("td", { role: "cell", class: name });
    const row = { rank, tr: make("tr", { role: "row" }), head: cell(""), state: cell(""), worker: cell("worker"), device: cell("device"), kv: cell("kv"), place: cell("") };
    row.label = make("span", { class: "state" });
    row.state.append(row.label);
    row.box = make("input", { type: "checkbox", "aria-label": `Select rank ${rank} to retire it` });
    row.box.addEventListener("change", () => {
      const size = state.event.status.attention_tp, first = rank - (rank % size);
      for (let mate = first; mate < first + size; mate += 1) { // a replica retires as a whole
        if (row.box.checked) state.selected.add(mate); else state.selected.delete(mate);
        rows[mate].box.checked = row.box.checked;
      }
      renderRetire();
    });
    row.pick = make("label", {}, row.box, String(rank));
    row.plain = make("span", { class: "plain", text: String(rank) });
    row.head.append(row.pick, row.plain);
    row.kvText = make("small");
    row.kvUsed = make("i", { class: "k-kv" });
    row.kvCached = make("i", { class: "k-cached" });
    row.kvBar = make("div", { class: "bar", "aria-hidden": "true" }, row.kvUsed, row.kvCached);
    row.kv.append(row.kvText, row.kvBar);
    row.cells = make("div", { class: "cells", role: "img" });
    row.place.append(row.cells);
    row.tr.append(row.head, row.state, row.worker, row.device, row.kv, row.place);
    $("rank-rows").append(row.tr);
    rows.push(row);
  }
}

function renderRanks(status) {
  if (rows.length !== status.ranks.length) buildRows(status.ranks.length);
  for (const info of status.ranks) {
    const row = rows[info.rank], retirable = info.state === "active" && info.rank >= status.attention_tp;
    if (!retirable) state.selected.delete(info.rank);
    show(row.pick, retirable);
    show(row.plain, !retirable);
    row.box.checked = state.selected.has(info.rank);
    dress(row.tr, info.state === "active" ? "" : "idle");
    dress(row.label, `state ${info.state}`);
    say(row.label, info.state);
    say(row.worker, info.pid === null ? "–" : `pid ${info.pid}`);
    say(row.device, `dev ${info.device}`);
    const known = info.kv_tokens !== null;
    show(row.kvBar, known);
    dress(row.kv, known ? "kv" : "kv unknown");
    say(row.kvText, known ? `${number(info.kv_used)} used, ${number(info.kv_cached)} cached of ${number(info.kv_tokens)}` : "–");
    row.kvUsed.style.width = known ? `${(100 * info.kv_used) / info.kv_tokens}%` : "0";
    row.kvCached.style.width = known ? `${(100 * info.kv_cached) / info.kv_tokens}%` : "0";
  }
  renderRetire();
  renderPlacement(status);
}

function renderRetire() {
  $("retire").disabled = state.selected.size === 0;
  const count = state.selected.size;
  say($("retire"), count ? `Retire ${plural(count, "rank")}` : "Retire selected ranks");
}

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function renderPlacement({ placement, copies, running }) {
  const before = state.placement, copied = JSON.stringify(copies);
  const moved = before === null || before.length !== placement.length || placement.some((rank, column) => rank !== before[column]) || state.copied !== copied;
  if (moved) {
    const places = before && !still() ? new Map([...cells].map(([column, cell]) => [column, cell.getBoundingClientRect()])) : null;
    placement.forEach((rank, column) => {
      let cell = cells.get(column);
      if (!cell) cells.set(column, (cell = make("i", { class: "cell", text: String(column) })));
      if (before && before[column] !== rank) {
        cell.classList.remove("settling");
        void cell.offsetWidth; // restarts the animation
        cell.classList.add("settling");
      }
    });
    for (const row of rows) {
      const own = placement.flatMap((rank, column) => (rank === row.rank ? [column] : []));
      const shared = Object.keys(copies).filter((column) => copies[column].includes(row.rank));
      const second = (column) => make("i", { class: "cell copy", text: column, title: `a copy of column ${column}, which rank ${placement[column]} owns` });
      row.cells.replaceChildren(...own.map((column) => cells.get(column)), ...shared.map(second));
      const list = own.length ? `: ${own.join(", ")}` : "";
      const more = shared.length ? `, and copies of ${shared.join(", ")}` : "";
      put(row.cells, "aria-label", `${plural(own.length, "expert column")} on rank ${row.rank}${list}${more}`);
    }
    if (places) fly(places);
    state.placement = [...placement];
    state.copied = copied;
  }
  const moves = (running && running.phase !== "finishing" ? running.moves : []).filter((move) => placement[move.column] === move.source);
  const pending = new Map(moves.map((move) => [move.column, move.target]));
  for (const [column, cell] of cells) {
    const target = pending.get(column);
    cell.classList.toggle("leaving", target !== undefined);
    const title = target === undefined ? `column ${column}, rank ${placement[column]}` : `column ${column}, rank ${placement[column]}, goes to rank ${target}`;
    if (cell.title !== title) cell.title = title;
  }
  for (const row of rows) {
    const wanted = moves.filter((move) => move.target === row.rank).map((move) => move.column).join(" ");
    if (row.ghosts === wanted && !moved) continue;
    row.ghosts = wanted;
    row.cells.querySelectorAll(".ghost").forEach((ghost) => ghost.remove());
    if (wanted) row.cells.append(...wanted.split(" ").map((column) => make("i", { class: "cell ghost", text: column })));
  }
}

// Each cell starts where it was and goes to where it is.
function fly(places) {
  for (const [column, cell] of cells) {
    const from = places.get(column), to = cell.getBoundingClientRect();
    if (!from || (Math.abs(from.left - to.left) < 1 && Math.abs(from.top - to.top) < 1)) continue;
    cell.animate([{ transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)`, zIndex: 1 }, { transform: "none" }],
      { duration: 700, easing: "cubic-bezier(.3, .7, .2, 1)" });
  }
}

// -- memory ----------------------------------------------------------------------------------------------------------

const deviceRows = [];

function renderMemory(memory) {
  show($("memory-none"), !memory.available);
  show($("devices"), memory.available);
  show($("kinds"), memory.available);
  if (!memory.available) {
    say($("memory-none"), `Not known while the HMM does not answer${memory.error ? `: ${memory.error}` : "."}`);
    return;
  }
  if (deviceRows.length !== memory.devices.length) {
    deviceRows.splice(0);
    $("devices").replaceChildren(...memory.devices.map(() => {
      const row = { name: make("span"), of: make("small"), bar: make("div", { class: "bar", role: "img" }), peak: make("span", { class: "peak" }), kinds: make("small") };
      row.parts = KINDS.map((kind) => make("i", { class: `k-${kind}` }));
      row.bar.append(...row.parts);
      deviceRows.push(row);
      return make("li", {}, make("div", { class: "what" }, row.name, row.of), make("div", { class: "track" }, row.bar, row.peak), row.kinds);
    }));
  }
  memory.devices.forEach((device, index) => {
    const row = deviceRows[index];
    const shares = Object.fromEntries(KINDS.map((kind) => [kind, device.by_kind[kind] ?? 0]));
    shares.other += Object.entries(device.by_kind).reduce((sum, [kind, size]) => sum + (KINDS.includes(kind) ? 0 : size), 0);
    // Against what has ever been in use where that is little of the budget: otherwise nothing would be seen.
    const scale = device.peak > device.budget / 20 ? device.budget : Math.max(1, device.peak * 1.1);
    KINDS.forEach((kind, at) => { row.parts[at].style.width = `${(100 * shares[kind]) / scale}%`; });
    row.peak.style.left = `${Math.min(100, (100 * device.peak) / scale)}%`;
    row.peak.title = `peak ${bytes(device.peak)}`;
    say(row.name, `Device ${device.device}: ${bytes(device.used)}`);
    say(row.of, `peak ${bytes(device.peak)} of ${bytes(device.budget)}`);
    const text = KINDS.filter((kind) => shares[kind]).map((kind) => `${KIND_SHORT[kind]} ${bytes(shares[kind])}`).join(" · ");
    say(row.kinds, text || "nothing");
    put(row.bar, "aria-label", `Device ${device.device}: ${text || "nothing"}`);
  });
}

// -- changes ---------------------------------------------------------------------------------------------------------

function renderOperations() {
  const running = state.event.status.running;
  const shown = state.operations.map((operation) => (running?.operation_id === operation.operation_id ? running : operation));
  show($("operations-none"), shown.length === 0);
  show($("operations-scroll"), shown.length > 0);
  const sign = JSON.stringify(shown.map((operation) => [operation.operation_id, operation.phase, operation.timings, operation.columns_moved]));
  if (renderOperations.sign === sign) return;
  renderOperations.sign = sign;
  $("operation-rows").replaceChildren(...shown.flatMap(operationRows));
}

function operationRows(operation) {
  const cell = (text, props = {}) => make("td", { role: "cell", ...props, text });
  const look = failed(operation) ? "bad" : ended(operation) ? "good" : "warn";
  const spent = PHASES.map((phase) => operation.timings[`${phase}_ms`] ?? 0), total = spent.reduce((sum, each) => sum + each, 0) || 1;
  const bar = make("div", { class: "phases", role: "img", "aria-label": PHASES.map((phase, at) => `${phase} ${ms(spent[at])}`).join(", ") });
  bar.title = bar.getAttribute("aria-label");
  PHASES.forEach((phase, at) => {
    const part = make("i", { class: `p-${phase}` });
    part.style.width = `${(100 * spent[at]) / total}%`;
    if (spent[at]) bar.append(part);
  });
  const row = make("tr", { role: "row" },
    cell(clock(operation.created_at)), cell(changeText(operation)),
    cell(operation.phase.replace("_", " "), { class: look }), make("td", { role: "cell", class: "timeline" }, bar),
    cell(ms(operation.timings.total_ms), { class: "number", "data-label": "total" }),
    cell(ms(operation.max_pause_ms), { class: "number", "data-label": "pause" }),
    cell(`${operation.columns_moved}/${operation.columns_planned}`, { class: "number", "data-label": "columns" }),
    cell(bytes(operation.bytes_moved), { class: "number", "data-label": "copied" }),
    cell(number(operation.moved_requests), { class: "number", "data-label": "requests" }));
  if (!operation.error) return [row];
  return [row, make("tr", { role: "row", class: "failure" }, make("td", { role: "cell", colspan: "9", text: operation.error }))];
}

// -- the policy ------------------------------------------------------------------------------------------------------

let nextPolicy = 0;

async function watchPolicy() {
  for (;;) {
    if (state.connection === "live" && Date.now() >= nextPolicy) {
      nextPolicy = Date.now() + POLICY_MS;
      try {
        // Decisions are kept here; after the first answer only new ones are missing.
        const response = await ask(state.policy ? "policy" : `policy?limit=${DECISIONS}`);
        if (!response.ok) nextPolicy = Date.now() + NO_POLICY_MS;
        state.policy = response.ok ? await response.json() : null;
        renderPolicy();
      } catch { /* the events' stream says what is wrong with the connection */ }
    }
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

const optional = (format) => (value) => (value === null || value === undefined ? "–" : format(value));
const quantiles = ({ p50, p90, p99 }) => [p50, p90, p99].map((value) => ms(value === null || value === undefined ? null : value * 1000)).join(" · ");
const FIGURES = [
  ["desired_ranks", "Desired ranks", number], ["attainment", "Attainment", optional((value) => `${(100 * value).toFixed(1)} %`)],
  ["goodput_tokens_per_s", "Goodput/s", number], ["queue_length", "Queue", number],
  ["ttft", "TTFT p50–p99", quantiles, "wide"], ["itl", "ITL p50–p99", quantiles, "wide"],
];
const MODES = {
  off: "Off: changes are made by hand.", shadow: "Shadow: it decides and tells, and changes nothing.", on: "On: it changes the size by itself.",
};

function flat(value) {
  if (value === null || typeof value !== "object") return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
  if (Array.isArray(value)) return value.map(flat).join(" ");
  return Object.entries(value).map(([name, each]) => `${name} ${flat(each)}`).join(", ");
}

function renderPolicy() {
  const policy = state.policy;
  $("board").classList.toggle("by-hand", !policy);
  show($("policy-none"), !policy);
  show($("policy-body"), Boolean(policy));
  show($("policy-modes"), Boolean(policy));
  if (!policy) return;
  const settings = policy.settings ?? {}, mode = policy.mode ?? settings.autoscale;
  for (const button of $("policy-modes").children) put(button, "aria-pressed", button.dataset.mode === mode);
  say($("policy-state"), [MODES[mode] ?? mode ?? "", settings.slo ? `SLO ${settings.slo}.` : "", flat(policy.state ?? "")].join(" "));
  const pairs = FIGURES.filter(([name]) => name in policy).map(([name, label, format, look]) => [label, format(policy[name]), look ?? ""]);
  if (policy.held_until) pairs.push(["Held until", clock(policy.held_until), "wide"]);
  const list = $("policy-figures");
  if (list.children.length !== 2 * pairs.length) list.replaceChildren(...pairs.flatMap(() => [make("dt"), make("dd")]));
  pairs.forEach(([name, value, look], at) => {
    say(list.children[2 * at], name);
    say(list.children[2 * at + 1], value);
    dress(list.children[2 * at + 1], look);
  });
  const newest = state.decisions[0]?.at ?? -Infinity;
  state.decisions.unshift(...(policy.decisions ?? []).map(readDecision).filter((decision) => decision.at > newest));
  state.decisions.splice(DECISIONS);
  renderDecisions();
  const names = Object.keys(settings).filter((name) => typeof settings[name] !== "object" || settings[name] === null);
  if ($("setting").options.length !== names.length) {
    $("setting").replaceChildren(...names.map((name) => make("option", { value: name, text: name })));
    showSetting();
  }
}

function readDecision({ at, time, action, decision, because, reason, ranks, desired, acted, inputs }) {
  const what = flat(action ?? decision ?? "").replace("_", " ");
  const change = ranks !== desired && desired !== undefined ? ` ${ranks} → ${desired}${acted === false ? " (not carried out)" : ""}` : "";
  return { at: at ?? time, what, text: `${what}${change}`, why: because ?? reason ?? "", inputs };
}

// Decisions of the same kind that follow each other are one entry, with what the newest says.
function renderDecisions() {
  const groups = [];
  for (const decision of state.decisions) {
    if (groups.length && groups.at(-1).text === decision.text) {
      groups.at(-1).count += 1;
      groups.at(-1).from = decision.at;
    } else groups.push({ ...decision, count: 1, from: decision.at });
  }
  const sign = JSON.stringify(groups.map(({ at, text, why, count }) => [at, text, why, count]));
  if (renderDecisions.sign === sign) return;
  renderDecisions.sign = sign;
  $("decisions").replaceChildren(...groups.slice(0, 40).map(({ at, from, text, why, count, what, inputs }) => {
    const often = count > 1 ? ` (${count} times since ${clock(from)})` : "";
    const entry = make("li", {}, make("time", { text: clock(at) }), make("span", {}, make("b", { text: text }), `: ${why}${often}`));
    if (inputs) {
      entry.title = flat(inputs);
      if (what !== "nothing") entry.append(make("span", { class: "inputs", text: flat(inputs) }));
    }
    return entry;
  }));
}

function showSetting() {
  const value = state.policy?.settings?.[$("setting").value];
  $("setting-value").value = value === null || value === undefined ? "" : String(value);
}

async function setPolicy(settings) {
  const answer = $("policy-answer");
  dress(answer, "");
  try {
    const response = await ask("policy", settings);
    if (!response.ok) {
      dress(answer, "bad");
      say(answer, `Refused: ${await refusal(response)}`);
    } else say(answer, `Set: ${flat(settings)}.`);
    nextPolicy = 0;
  } catch (error) { failedToAsk(answer, error); }
}

async function modeAsked(mode) {
  if (mode === "on" && !(await confirmed("Let the policy change the size?", "It grows and shrinks the server by itself, within its settings, until you switch it off."))) return;
  await setPolicy({ autoscale: mode });
}

function settingAsked(event) {
  event.preventDefault();
  const text = $("setting-value").value.trim();
  let value = text || null;
  try { value = JSON.parse(text); } catch { /* a word, like 1s or shadow */ }
  setPolicy({ [$("setting").value]: value });
}

// -- the start -------------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  say($("theme-name"), name);
  localStorage.setItem(THEME, name);
}

function step(by) {
  const { max_ep_size, attention_tp } = state.event.status, from = Number.isNaN($("size").valueAsNumber) ? state.event.status.ep_size : $("size").valueAsNumber;
  $("size").value = Math.min(max_ep_size, Math.max(attention_tp, from + by * attention_tp));
  state.edited = Number($("size").value) !== state.event.status.ep_size;
}

function start() {
  setTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
  buildPlots();
  $("kinds").append(...KINDS.map((kind) => make("li", {}, make("span", { class: `swatch k-${kind}`, "aria-hidden": "true" }), KIND_NAMES[kind])));
  $("phase-legend").append(...PHASES.map((phase) => make("li", {}, make("span", { class: `swatch p-${phase}`, "aria-hidden": "true" }), phase)));
  $("running-phases").append(...PHASES.map((phase) => make("li", { "data-phase": phase, text: phase })));
  $("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
  $("forget").addEventListener("click", () => { forget(); location.reload(); });
  $("try-now").addEventListener("click", () => wake?.());
  $("gate-form").addEventListener("submit", (event) => { event.preventDefault(); submitted?.($("key").value); });
  $("scale-form").addEventListener("submit", scaleAsked);
  $("size").addEventListener("input", () => { state.edited = true; });
  $("fewer").addEventListener("click", () => step(-1));
  $("more").addEventListener("click", () => step(1));
  $("retire").addEventListener("click", retireAsked);
  for (const button of $("policy-modes").children) button.addEventListener("click", () => modeAsked(button.dataset.mode));
  $("setting").addEventListener("change", showSetting);
  $("setting-form").addEventListener("submit", settingAsked);
  addEventListener("online", () => wake?.());
  document.addEventListener("visibilitychange", () => { if (!document.hidden) wake?.(); });
  enter("loading");
  connect();
  watchPolicy();
}

start();
