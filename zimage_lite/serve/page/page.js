/** The form, and how all that the page shows hangs together. */

import { call, listen } from "./api.js";
import { button, by, element, options, show } from "./elements.js";
import * as jobs from "./jobs.js";
import * as plan from "./plan.js";
import * as picture from "./picture.js";
import { language, say, setLanguage, translate } from "./texts.js";

const SHAPES = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];
const TOLD = ["version", "size", "model", "parts", "count", "loras", "shift", "unknown"]; // of a recipe, but not asked for
const FALLBACK = { width: 1024, height: 1024, steps: 8, guidance: 0 }; // of a model that does not say
const order = by("order");
const named = [...order.elements].filter((one) => one.name);
let status = null;
let sending = false;

/** What the form says, as the API takes it. What is left empty is the model's own. */
async function asked() {
  const usable = named.filter((one) => one.value !== "" && !one.matches(":disabled"));
  const isNumber = (one) => ["number", "range"].includes(one.type);
  const values = Object.fromEntries(usable.map((one) => [one.name, isNumber(one) ? one.valueAsNumber : one.value]));
  if (!by("control").value) delete values.control_from;
  return { ...values, loras: loraRows(), ...(await picture.pictures()) };
}

async function draw(event) {
  event?.preventDefault();
  if (sending || !status || !order.reportValidity()) return;
  if (!by("lock").checked) newSeed();
  await send(await asked());
}

/** What does not fit is not ordered. */
async function send(values) {
  failed();
  sending = true; // not `disabled`, which would take the focus away
  by("draw").ariaDisabled = true;
  const found = isPlannable(values) ? await plan.planFor(values) : null;
  if (found?.fits === false) failed(new Error(`${say("It does not fit.")} ${found.message}`));
  else await call("POST", "/api/jobs", values).then(jobs.ordered).catch(failed);
  by("draw").ariaDisabled = sending = false;
}

/** What the server would refuse is not asked about, for browsers log each refusal. */
const isPlannable = ({ width = 1, height = 1 }) => width * height <= status.limits.drawn_pixels;

/** What would be ordered, if all but the prompt, which is still to come, is as it has to be. */
async function plannable() {
  const valid = status && [...order.elements].every((one) => one.name === "prompt" || one.validity.valid);
  const values = valid && (await asked());
  return values && isPlannable(values) ? { prompt: "", ...values } : null;
}

/** Told where the button is, and at the field that is at fault; without an error, what was told is taken back. */
function failed(error = { message: "" }) {
  by("problem").textContent = error.message;
  for (const one of named) one.ariaInvalid = one.name === error.param;
}

function newSeed() {
  by("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

/** A recipe into the form. What it has no place for is told, not dropped in silence. taken: what is there already. */
function reuse(settings, taken = []) {
  for (const one of named) {
    const [value] = [settings[one.name]].flat();
    put(one, one.name === "model" ? value?.name ?? value : value);
  }
  by("strength-value").value = by("strength").value;
  by("lock").checked = true;
  const here = (settings.loras ?? []).filter((lora) => status.loras.includes(lora.name));
  setLoras(here);
  presets();
  remember();
  const others = leftOut(settings, here).filter((name) => !taken.includes(name));
  failed(others.length ? new Error(say("Not taken over: {names}", { names: others.join(", ") })) : undefined);
  by("prompt").focus();
}

/** What a recipe does not say is as it is by default, so that nothing of the last picture gets into the next. */
function put(one, value) {
  if (one.name === "count" || (one.name === "seed" && value === undefined)) return;
  if (one.tagName !== "SELECT") one.value = value ?? one.defaultValue;
  else if (fits(one, value)) one.value = value;
  else if (one.name !== "model") one.selectedIndex = 0;
}

function leftOut(settings, loras) {
  const taken = new Set([...named.map((one) => one.name), ...TOLD]);
  const shift = status.defaults[by("model").value]?.shift;
  const others = Object.keys(settings).filter((name) => !taken.has(name));
  if (shift && (settings.shift ?? shift) !== shift) others.push("shift");
  return [...others, ...(settings.loras ?? []).filter((lora) => !loras.includes(lora)).map((lora) => lora.name)];
}

const fits = (one, value) => one.tagName !== "SELECT" || [...one.options].some((option) => option.value === value);

/** All of a job, with the pictures that it was made from. */
async function reuseJob({ settings }) {
  reuse(settings, await picture.bring(settings));
}

/** The same with another seed. */
function again(job) {
  send({ ...job.settings, seed: crypto.getRandomValues(new Uint32Array(1))[0] });
}

// LoRAs

function addLora(name, strength) {
  const choice = element("select", { ariaLabel: "LoRA" }, ...options(status.loras));
  if (name) choice.value = name;
  const number = element("input", { type: "number", step: "any", value: strength ?? 0.8, required: true });
  number.ariaLabel = say("Strength");
  const row = element("div", { className: "row lora" }, choice, number);
  row.append(button(say("Remove"), () => (row.remove(), changedLoras(), by("add-lora").focus())));
  by("loras").append(row);
  changedLoras();
}

function changedLoras() {
  show(by("loras").children.length < status.limits.loras, by("add-lora"));
  remember();
}

function setLoras(loras) {
  by("loras").replaceChildren();
  for (const { name, strength } of loras) addLora(name, strength);
}

const loraRows = () =>
  [...by("loras").children]
    .map(({ children: [name, number] }) => ({ name: name.value, strength: number.valueAsNumber }));

// Sizes

/** The model's number of pixels in the usual shapes. */
function presets() {
  const own = status.defaults[by("model").value] ?? FALLBACK;
  const shaped = SHAPES.map(([w, h]) => {
    const side = (one, other) => Math.max(Math.round(Math.sqrt((own.width * own.height * one) / other) / 16), 1) * 16;
    const [width, height] = [side(w, h), side(h, w)];
    return new Option(`${w}:${h} · ${width} × ${height}`, `${width} ${height}`);
  });
  const [open, other] = [new Option(say("The model's or the picture's"), " "), new Option(say("Other"), "")];
  by("preset").replaceChildren(open, ...shaped, other);
  by("control").options[0].text = say("None");
  for (const name of ["width", "height", "steps", "guidance"]) by(name).placeholder = own[name];
  by("facts").textContent = [
    by("model").value, `${own.width} × ${own.height}`, say("{steps} steps", own), say("guidance {guidance}", own),
  ].join(" · ");
  showSize();
}

function showSize() {
  by("preset").value = `${by("width").value} ${by("height").value}`;
  if (by("preset").selectedIndex < 0) by("preset").value = "";
}

function choosePreset() {
  if (by("preset").value) [by("width").value, by("height").value] = by("preset").value.split(" ");
  remember();
}

function swap() {
  [by("width").value, by("height").value] = [by("height").value, by("width").value];
  showSize();
  remember();
}

// What survives a reload

function remember() {
  const values = named.map((one) => [one.name, one.value]);
  const more = { lock: by("lock").checked, loras: loraRows() };
  sessionStorage.setItem("form", JSON.stringify({ ...Object.fromEntries(values), ...more }));
  plan.soon();
}

function recall() {
  const values = JSON.parse(sessionStorage.getItem("form") ?? "{}");
  for (const one of named) {
    const value = values[one.name];
    if (value !== undefined && fits(one, value)) one.value = value;
  }
  by("lock").checked = values.lock ?? false;
  by("strength-value").value = by("strength").value;
  if (!by("seed").value) newSeed();
  setLoras((values.loras ?? []).filter((lora) => status.loras.includes(lora.name)));
}

// The page

function fill() {
  for (const [name, values] of [["model", status.models], ["sampler", status.samplers], ["schedule", status.schedules]])
    by(name).replaceChildren(...options(values));
  by("control").replaceChildren(new Option(say("None"), ""), ...options(status.controls));
  by("control_from").replaceChildren(...options(status.control_sources));
  show(status.loras.length, by("lora-box"));
  show(status.controls.length, by("control-box"));
  by("count").max = status.limits.images;
  by("steps").max = status.limits.steps;
  by("prompt").maxLength = by("negative").maxLength = status.limits.prompt_chars;
}

function inLanguage(name) {
  setLanguage(name);
  translate(document);
  by("language").textContent = name === "zh-CN" ? "English" : "中文";
  by("language").lang = name === "zh-CN" ? "en" : "zh-CN";
  jobs.render(true);
  plan.render();
  if (!status) return;
  presets();
  setLoras(loraRows());
}

function keys(event) {
  if (event.isComposing || by("painter").open) return; // Chinese is being typed, or a mask painted
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw(event);
  if (event.key === "Escape" && event.target.tagName !== "SELECT") jobs.cancelMine();
}

function wire() {
  order.addEventListener("submit", draw);
  order.addEventListener("input", remember);
  by("preset").onchange = choosePreset;
  by("width").oninput = by("height").oninput = showSize;
  by("swap").onclick = swap;
  by("random").onclick = () => (newSeed(), remember());
  by("add-lora").onclick = () => addLora();
  by("model").onchange = () => (presets(), remember());
  by("cancel").onclick = jobs.cancelRunning;
  by("older").onclick = () => jobs.older().catch(failed);
  by("language").onclick = () => inLanguage(language() === "zh-CN" ? "en" : "zh-CN");
  addEventListener("keydown", keys);
}

async function start() {
  jobs.setUp({ reuse: (job) => reuseJob(job).catch(failed), again, failed });
  picture.setUp(reuse, failed, plan.soon);
  plan.setUp(plannable);
  wire();
  inLanguage(language());
  status = await call("GET", "/api/status");
  fill();
  recall();
  presets();
  plan.soon();
  const away = () => failed(new Error(say("The server is away.")));
  const back = () => by("problem").textContent === say("The server is away.") && failed();
  listen(status.changes, jobs.heard, () => jobs.refresh().then(back, away), away);
}

start().catch(failed);
