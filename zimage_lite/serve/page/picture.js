/** The picture that another one is made from, its mask, and what a ControlNet follows. */

import { call, given } from "./api.js";
import { base64Of, by, show } from "./elements.js";
import { forgetMask, paintOver, startFrom } from "./mask.js";

let image = null; // in base64
let mask = null;
let recipe = {};
let changed = () => {};

/** Of the order. */
export async function pictures() {
  const found = image ? { image, ...(mask && { mask }) } : {};
  const [name, file] = [by("control").value, by("control-file").files[0]];
  if (!name) return found;
  const controls = [{ name, scale: by("scale").valueAsNumber }];
  return { ...found, controls, ...(file && { control_image: await base64Of(file) }) };
}

/** hears: called whenever there is another picture or mask. */
export function setUp(reuse, failed, hears) {
  changed = hears;
  by("file").onchange = () => take(by("file").files[0]).then(() => failed(), failed);
  by("use-recipe").onclick = () => reuse(recipe);
  by("paint").onclick = () => paintOver(by("thumb"), setMask);
  by("drop-mask").onclick = () => (forgetMask(), setMask(null), by("paint").focus());
  by("drop-picture").onclick = () => (leave(), by("file").focus());
  by("strength").oninput = () => (by("strength-value").value = by("strength").value);
  addEventListener("dragover", (event) => isOurs(event) && event.preventDefault());
  addEventListener("drop", (event) => isOurs(event) && (event.preventDefault(), taken(event.dataTransfer.files)));
  addEventListener("paste", (event) => taken(event.clipboardData.files));

  function taken(files) {
    const file = [...files].find((one) => one.type.startsWith("image/"));
    if (file) take(file).then(() => failed(), failed);
  }
}

/** Files, wherever they are dropped; texts, and what is dropped on a field for files, the browser knows how to take. */
const isOurs = (event) => event.dataTransfer.types.includes("Files") && event.target.type !== "file";

async function take(file) {
  if (!file) return;
  const raw = await base64Of(file);
  recipe = (await call("POST", "/api/read", { image: raw })).settings; // refuses what is no picture
  leave();
  image = raw;
  by("thumb").src = URL.createObjectURL(file);
  by("picture").disabled = false;
  show(true, by("picture"));
  show(recipe.prompt !== undefined, by("use-recipe"));
  changed();
}

/** Those of a job, from the server. -> the names of what was taken over. */
export async function bring({ image: source, mask: over, control_image: followed, controls = [] }) {
  const taken = [];
  const name = controls.length === 1 && controls[0].name;
  leave();
  by("control").value = name || "";
  if (name && by("control").value !== name) by("control").value = "";
  if (by("control").value) {
    by("scale").value = controls[0].scale ?? ""; // the authors'
    taken.push("controls");
    if (await into(by("control-file"), [followed].flat()[0])) taken.push("control_image");
  } else by("control-file").value = "";
  const file = await before(source);
  if (!file) return taken;
  await take(file);
  taken.push("image");
  const painted = await before(over);
  if (!painted) return taken;
  setMask(await base64Of(painted), painted.type);
  await by("mask-thumb").decode();
  startFrom(by("mask-thumb"));
  return [...taken, "mask"];
}

/** null: there is none, or no longer. */
const before = (said) => (said?.sha256 ? given(said.sha256).catch(() => null) : null);

async function into(field, said) {
  const [file, files] = [await before(said), new DataTransfer()];
  if (file) files.items.add(file);
  field.files = files.files;
  return file;
}

function setMask(painted, kind = "image/png") {
  mask = painted;
  show(mask, by("mask-thumb"), by("drop-mask"));
  if (mask) by("mask-thumb").src = `data:${kind};base64,${mask}`;
  changed();
}

function leave() {
  if (image) URL.revokeObjectURL(by("thumb").src);
  image = null;
  by("file").value = ""; // or the same file could not be chosen again
  forgetMask();
  setMask(null);
  by("picture").disabled = true;
  show(false, by("picture"));
}
