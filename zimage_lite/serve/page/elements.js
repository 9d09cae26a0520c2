/** Elements, by text only: nothing that comes from anywhere is read as HTML. */

export const by = (id) => document.getElementById(id);

/** children: elements and texts. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const button = (text, onclick) => element("button", { type: "button", onclick }, text);

export const options = (names) => names.map((name) => new Option(name, name));

export const show = (shown, ...elements) => elements.forEach((one) => (one.hidden = !shown));

/** A file as base64. */
export function base64Of(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
