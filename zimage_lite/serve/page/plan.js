/** What the order would take of the memory, told before it is drawn. */

import { call } from "./api.js";
import { by, element, show } from "./elements.js";
import { say } from "./texts.js";

const PATIENCE_MS = 400; // while somebody types
let order = async () => null;
let timer = 0;
let busy = false;
let asked = 0;
let last = { key: "", plan: null };

/** given: promises what would be ordered, or null if that cannot be planned. */
export const setUp = (given) => (order = given);

/** Something of it has changed. */
export function soon() {
  clearTimeout(timer);
  timer = setTimeout(refresh, PATIENCE_MS);
}

/** One at a time: while a plan is made, the next one waits. */
async function refresh() {
  if (busy) return soon();
  busy = true;
  await planFor(await order().catch(() => null));
  busy = false;
}

/** Of what is ordered; null if there is none. One that fits is not asked for again. */
export async function planFor(values) {
  const key = JSON.stringify({ ...values, seed: 0 });
  if (key === last.key && last.plan?.fits) return last.plan;
  const mine = ++asked;
  const plan = values && (await call("POST", "/api/plan", values).catch(() => null));
  if (mine === asked) last = { key, plan };
  render();
  return plan;
}

export function render() {
  const { plan } = last;
  show(plan, by("plan"));
  if (!plan) return;
  by("plan-text").className = plan.fits === false ? "error" : "facts";
  by("plan-text").textContent = [plan.fits === false && say("It does not fit."), plan.message, predicted(plan.seconds)]
    .filter(Boolean)
    .join(" ");
  by("plan-bars").replaceChildren(...(plan.fits ? plan.memory.flatMap(bar) : []));
}

function predicted(seconds) {
  if (seconds === null) return "";
  const [m, s] = [Math.floor(seconds / 60), Math.round(seconds % 60)];
  return m ? say("About {m} min {s} s, by prediction.", { m, s }) : say("About {s} s, by prediction.", { s });
}

function bar({ place, planned, limit }) {
  const gigabytes = (bytes) => (bytes / 1e9).toFixed(1);
  const facts = { place: say(place), planned: gigabytes(planned), most: gigabytes(limit) };
  const text = say("{place}: {planned} GB planned of {most}", facts);
  const properties = { min: 0, max: limit, value: planned, ariaLabel: text };
  return [element("p", { className: "facts", ariaHidden: "true" }, text), element("meter", properties)];
}
