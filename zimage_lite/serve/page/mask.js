/** A mask painted over a picture: white is drawn anew. What was done is kept as a list, so undo is its end cut off. */

import { by } from "./elements.js";

const canvas = by("canvas");
const pen = canvas.getContext("2d");
const COLOUR = "magenta"; // seen on white and on black
let done = []; // of strokes {width, points}, "invert", and a canvas to start from
let place = { x: 0, y: 0 }; // of the brush, for the keyboard
let finish = () => {};

/** picture: an <img> that is loaded; finished: called with the mask as PNG in base64, or null if nothing is white. */
export function paintOver(picture, finished) {
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  place = { x: canvas.width / 2, y: canvas.height / 2 };
  by("under").src = picture.src;
  finish = finished;
  repaint();
  by("painter").showModal();
}

export function forgetMask() {
  done = [];
}

/** One that is there already: what is painted goes on from it. picture: an <img> that is loaded, white on black. */
export function startFrom(picture) {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [picture.naturalWidth, picture.naturalHeight];
  const paper = whole.getContext("2d");
  paper.drawImage(picture, 0, 0);
  const pixels = paper.getImageData(0, 0, whole.width, whole.height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([255, 0, 255, pixels.data[at]], at); // magenta
  paper.putImageData(pixels, 0, 0);
  done = [whole];
}

function repaint() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const one of done)
    if (one === "invert") invert();
    else if (one.points) stroke(one);
    else pen.drawImage(one, 0, 0, canvas.width, canvas.height);
}

function invert() {
  pen.globalCompositeOperation = "xor";
  pen.fillStyle = COLOUR;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "source-over";
}

function stroke({ width, points }) {
  Object.assign(pen, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: COLOUR });
  pen.beginPath();
  pen.moveTo(points[0].x, points[0].y);
  for (const { x, y } of points) pen.lineTo(x, y);
  pen.stroke();
}

function inBase64() {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [canvas.width, canvas.height];
  const paper = whole.getContext("2d");
  const fill = (colour, how) => {
    Object.assign(paper, { fillStyle: colour, globalCompositeOperation: how });
    paper.fillRect(0, 0, whole.width, whole.height);
  };
  paper.drawImage(canvas, 0, 0);
  fill("white", "source-in");
  fill("black", "destination-over");
  return whole.toDataURL("image/png").split(",")[1];
}

/** In pixels of the picture, however large it is shown. */
function pointOf(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
}

const brushWidth = () => (Math.max(canvas.width, canvas.height) * by("brush").value) / 100;

function begin(event) {
  canvas.setPointerCapture(event.pointerId);
  done.push({ width: brushWidth(), points: [pointOf(event)] });
  repaint();
}

function go(event) {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  const last = done.at(-1);
  const from = last.points.at(-1);
  last.points.push(pointOf(event));
  stroke({ width: last.width, points: [from, last.points.at(-1)] }); // only what is new
}

function byKey(event) {
  const step = brushWidth() / 2;
  const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (!way && event.key !== " ") return;
  event.preventDefault();
  if (way) {
    const [x, y] = [place.x + way[0], place.y + way[1]];
    place = { x: Math.min(Math.max(x, 0), canvas.width), y: Math.min(Math.max(y, 0), canvas.height) };
  } else done.push({ width: brushWidth(), points: [place] });
  repaint();
  ring();
}

/** Where the brush is, until the next repaint. */
function ring() {
  pen.beginPath();
  pen.arc(place.x, place.y, brushWidth() / 2, 0, 2 * Math.PI);
  Object.assign(pen, { lineWidth: canvas.width / 200, strokeStyle: "black" });
  pen.stroke();
}

canvas.addEventListener("pointerdown", begin);
canvas.addEventListener("pointermove", go);
canvas.addEventListener("keydown", byKey);
by("undo").onclick = () => (done.pop(), repaint());
by("invert").onclick = () => (done.push("invert"), repaint());
by("done").onclick = () => by("painter").close();
by("painter").addEventListener("close", () => {
  repaint(); // without the ring
  finish(done.length ? inBase64() : null);
});
