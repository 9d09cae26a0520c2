/** What the server does, as the page shows it: the stage (what is drawn now), the queue, the gallery. */

import { call, previewOf } from "./api.js";
import { button, by, element, show } from "./elements.js";
import { say } from "./texts.js";

const OVER = ["done", "failed", "cancelled", "lost"];
const PHASES = { encode: "Reading the prompt", denoise: "Drawing", decode: "Finishing" };
const PAGE = 50; // of the history
const jobs = new Map(); // by id, of all that are shown
const cards = new Map(); // by id: {version, card}
const mine = new Set(JSON.parse(sessionStorage.getItem("mine") ?? "[]")); // ordered in this tab
const previews = new Map(); // by id, of what runs: {number, address, loading}
let actions = {}; // of cards: reuse(job, picture), again(job), failed(error)

export const setUp = (given) => (actions = given);
const isOver = (job) => OVER.includes(job.state);
const isOld = (job) => jobs.get(job.id)?.version > job.version; // the history's have none
const newestFirst = (one, other) => other.created - one.created;
const running = () =>
  [...jobs.values()].filter((job) => job.state === "running").sort((one, other) => one.started - other.started);
const queued = () => [...jobs.values()].filter((job) => job.state === "queued").sort((a, b) => a.position - b.position);
const over = () => [...jobs.values()].filter(isOver).sort(newestFirst);

/** One that this tab has ordered. */
export function ordered(job) {
  mine.add(job.id);
  sessionStorage.setItem("mine", JSON.stringify([...mine].slice(-100)));
  heard(job);
}

/** What changed of a job. */
export function heard(job) {
  const before = jobs.get(job.id);
  if (isOld(job)) return;
  jobs.set(job.id, { ...before, ...job });
  if (before?.state !== job.state) tell(job);
  if (!before?.settings && isOver(job)) lookUp(job.id);
  render();
}

/** What was asked for stands in the history alone. */
async function lookUp(id) {
  const job = await call("GET", `/api/jobs/${id}`).catch(() => null);
  if (job && jobs.has(id)) jobs.set(id, { ...jobs.get(id), ...job });
  render();
}

/** The newest of the history. What is no longer there has been deleted elsewhere. */
export async function refresh() {
  const before = [...jobs.keys()];
  const found = await history("");
  const known = new Set(found.map((job) => job.id));
  const since = found.length < PAGE ? 0 : found.at(-1).created;
  for (const id of before) if (jobs.get(id)?.created >= since && !known.has(id)) jobs.delete(id);
  render();
}

export async function older() {
  await history(`&before=${over().at(-1)?.created ?? 0}`);
  render();
}

async function history(before) {
  const answer = await call("GET", `/api/jobs?limit=${PAGE}${before}`);
  for (const job of answer.jobs) if (!isOld(job)) jobs.set(job.id, { ...jobs.get(job.id), ...job });
  show(answer.jobs.length === PAGE, by("older"));
  return answer.jobs;
}

/** The one that runs; else the first of this tab's that waits. For a key, never one that somebody else ordered. */
export function cancelMine() {
  const own = [...running(), ...queued()].find((job) => mine.has(job.id));
  if (own) cancel(own.id);
}

export const cancelRunning = () => running().slice(0, 1).forEach((job) => cancel(job.id));

const cancel = (id) => call("POST", `/api/jobs/${id}/cancel`).catch(actions.failed);

/** To those who do not see it: what changed, not each step. */
function tell(job) {
  if (!mine.has(job.id)) return;
  if (job.state === "failed") actions.failed(new Error(job.error.message));
  const texts = { queued: "Waiting.", running: "Drawing.", done: "The picture is drawn.", cancelled: "Cancelled." };
  by("told").textContent = say(texts[job.state] ?? "It could not be drawn.");
}

/** All of it; what has not changed is left as it is, so that nothing loses the focus. */
export function render(again = false) {
  if (again) cards.clear();
  renderStage();
  renderQueue();
  renderGallery();
}

function renderStage() {
  const [job, ...others] = running();
  const last = over().find((one) => one.pictures.length);
  show(job, by("going"));
  document.title = job?.step ? `${Math.round((100 * job.step) / job.steps)} % – zimage-lite` : "zimage-lite";
  forgetPreviews();
  if (job) renderProgress(job, by("progress"), by("state"));
  const address = job && previewFor(job);
  if (address) stage(address, job.prompt);
  else if (!job) stage(last ? `/api/pictures/${last.pictures.at(-1).name}` : "", last?.prompt ?? "");
  renderMemory((job ?? last)?.memory);
  show(others.length, by("others"));
  keep(by("others"), others, otherItem);
  for (const other of others) renderOther(other, cards.get(other.id).card);
}

/** One that another worker draws. */
function otherItem(job) {
  const bar = element("progress", { ariaLabel: `${say("Progress")}: ${job.prompt}` });
  const row = element("div", { className: "row" }, element("p"), cancelling(job));
  return element("li", { className: "card" }, element("img", { alt: job.prompt }), bar, row);
}

function renderOther(job, item) {
  const [image, bar, state] = ["img", "progress", "p"].map((name) => item.querySelector(name));
  renderProgress(job, bar, state);
  const address = previewFor(job);
  show(address, image);
  if (address && image.src !== address) image.src = address;
}

function cancelling(job) {
  const stop = button(say("Cancel"), () => cancel(job.id));
  stop.setAttribute("aria-label", `${say("Cancel")}: ${job.prompt}`);
  return stop;
}

function renderProgress(job, bar, state) {
  if (job.step) [bar.max, bar.value] = [job.steps, job.step];
  else bar.removeAttribute("value"); // before the steps and after them nobody knows
  const phase = say(PHASES[job.phase] ?? "Opening the model");
  const steps = job.step === null ? "" : ` · ${say("step {step} of {steps}", job)}`;
  state.textContent = phase + steps + (job.seconds_left === null ? "" : ` · ${left(job.seconds_left)}`);
}

function left(seconds) {
  const [m, s] = [Math.floor(seconds / 60), Math.round(seconds % 60)];
  return m ? say("{m} min {s} s left", { m, s }) : say("{s} s left", { s });
}

/** The newest that is here, as an object URL, "" if none. The next is fetched one at a time: what comes in between is
    too late anyway. */
function previewFor(job) {
  if (!previews.has(job.id)) previews.set(job.id, { number: 0, address: "", loading: false });
  const mine = previews.get(job.id);
  if (job.previews > mine.number && !mine.loading) load(job, mine);
  return mine.address;
}

async function load(job, mine) {
  Object.assign(mine, { loading: true, number: job.previews });
  const address = await previewOf(job.id, job.previews).catch(() => null);
  mine.loading = false;
  if (address) URL.revokeObjectURL(mine.address);
  if (address) mine.address = address;
  renderStage();
}

/** Of what runs no longer. */
function forgetPreviews() {
  const still = new Set(running().map((job) => job.id));
  for (const [id, { address, loading }] of previews)
    if (!still.has(id) && !loading) {
      URL.revokeObjectURL(address);
      previews.delete(id);
    }
}

function stage(address, alt) {
  const image = by("shown");
  show(address, image);
  show(!address, by("nothing"));
  image.alt = alt;
  if (image.getAttribute("src") === address) return;
  if (address) image.src = address;
  else image.removeAttribute("src");
}

const gigabytes = (bytes) => (bytes / 1e9).toFixed(1);

/** memory: bytes of the place that is tightest, the GPU's if there is one. */
function renderMemory(memory) {
  show(memory, by("memory"), by("memory-text"));
  if (!memory) return;
  const [planned, used, most] = [memory.planned, memory.used ?? memory.planned, memory.limit].map(gigabytes);
  const text = memory.used
    ? "{place}: {used} GB used, {planned} planned, of {most}"
    : "{place}: {planned} GB planned of {most}";
  by("memory-text").textContent = say(text, { place: say(memory.place), planned, used, most });
  Object.assign(by("memory"), { max: memory.limit, value: memory.used ?? memory.planned });
}

function renderQueue() {
  const waiting = queued();
  show(waiting.length, by("queue-box"));
  keep(by("queue"), waiting, queueItem);
  for (const job of waiting) cards.get(job.id).card.firstChild.textContent = `${job.position + 1}. ${job.prompt}`;
}

function queueItem(job) {
  return element("li", {}, element("span"), cancelling(job));
}

function renderGallery() {
  keep(by("gallery"), over(), card);
}

/** Children of `parent` for jobs, made anew only when their state or language changed. */
function keep(parent, list, make) {
  const wanted = list.map((job) => {
    const key = `${job.state} ${job.pictures.length} ${Boolean(job.settings)}`;
    if (cards.get(job.id)?.key !== key) cards.set(job.id, { key, card: make(job) });
    return cards.get(job.id).card;
  });
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
}

function card(job) {
  const pictures = element("div", { className: "pictures" }, ...job.pictures.map((picture) => linked(job, picture)));
  const made = element("article", { className: "card" }, pictures, element("p", { className: "prompt" }, job.prompt));
  made.append(element("p", { className: "facts" }, factsOf(job)));
  if (job.error) made.append(element("p", { className: "error" }, job.error.message));
  for (const note of job.notes) made.append(element("p", { className: "facts" }, note));
  made.append(element("div", { className: "row" }, ...buttonsOf(job)));
  return made;
}

function linked(job, picture) {
  const [src, alt] = [`/api/pictures/${picture.name}`, `${job.prompt} (${say("seed {seed}", picture)})`];
  const size = { width: picture.width, height: picture.height };
  return element("a", { href: src, target: "_blank" }, element("img", { loading: "lazy", src, alt, ...size }));
}

function factsOf(job) {
  const [picture] = job.pictures;
  const ends = { cancelled: "Cancelled.", lost: "Lost: the server stopped.", failed: "It could not be drawn." };
  const facts = job.state in ends ? [say(ends[job.state])] : [];
  if (picture) facts.push(`${picture.width} × ${picture.height}`, say("seed {seed}", picture));
  facts.push(job.model);
  if (job.state === "done") facts.push(`${(job.finished - job.started).toFixed(1)} s`);
  return facts.join(" · ");
}

function buttonsOf(job) {
  const made = [
    button(say("Use settings"), () => actions.reuse(jobs.get(job.id))),
    button(say("Draw again"), () => actions.again(jobs.get(job.id))),
    button(say("Delete"), () => remove(job)),
  ];
  for (const one of made) one.setAttribute("aria-label", `${one.textContent}: ${job.prompt}`);
  return job.settings ? made : made.slice(2);
}

async function remove(job) {
  if (!confirm(say("Delete this with its pictures?"))) return;
  await call("DELETE", `/api/jobs/${job.id}`).catch((error) => error.status === 404 || actions.failed(error));
  jobs.delete(job.id);
  render();
  by("gallery-title").focus();
}
