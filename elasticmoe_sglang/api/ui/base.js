"use strict";
// The operator's page. It reads GET events (server-sent events, by fetch, so that the admin key goes in a header and never
// into an address), GET policy, and posts to ../scale_elastic_ep and policy. Addresses are relative: a proxy may add a prefix.

const KEY = "elasticmoe-admin-key", THEME = "elasticmoe-theme";
const SILENCE_MS = 7000; // The server sends something at least every second.
const RETRY_MS = [500, 1000, 2000, 4000, 5000];
const POLICY_MS = 2000, NO_POLICY_MS = 15000;
const KEPT_S = 600, DECISIONS = 200;
const PHASES = ["planned", "preparing", "committing", "finishing"];
const KINDS = ["column", "kv", "dense", "window", "other"];
const KIND_NAMES = { column: "expert columns", kv: "KV", dense: "dense weights", window: "windows", other: "other" };

const KIND_SHORT = { column: "columns", kv: "KV", dense: "dense", window: "windows", other: "other" };

const $ = (id) => document.getElementById(id);
const state = {
  key: sessionStorage.getItem(KEY), connection: "loading", event: null, instance: null, figures: [], operations: [],
  restarts: [], policy: null, decisions: [], edited: false, selected: new Set(), announced: "", placement: null, copied: "{}", heardAt: 0,
};

// -- small helpers ---------------------------------------------------------------------------------------------------

function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Only what differs is written: a screen reader and a selection are not disturbed by what stays the same.
function say(element, text) { if (element.textContent !== text) element.textContent = text; }
function show(element, yes) { if (element.hidden === yes) element.hidden = !yes; }
function put(element, name, value) { if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value); }
function dress(element, name) { if (element.className !== name) element.className = name; }

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: 0 }));
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

// [0, 1, 2, 5] as "0–2, 5"
function ranges(ranks) {
  const runs = [];
  for (const rank of ranks) {
    if (runs.length && runs.at(-1)[1] === rank - 1) runs.at(-1)[1] = rank; else runs.push([rank, rank]);
  }
  return runs.map(([from, to]) => (from === to ? String(from) : to === from + 1 ? `${from}, ${to}` : `${from}–${to}`)).join(", ");
}

function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return `${value.toFixed(1)} ms`;
  return value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(value < 10000 ? 2 : 1)} s`;
}

function bytes(value) {
  if (value < 1024) return `${value} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let power = -1;
  do { value /= 1024; power += 1; } while (value >= 1000 && power < 3);
  return `${Number(value.toPrecision(3))} ${units[power]}`;
}
