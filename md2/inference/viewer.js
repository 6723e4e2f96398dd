"use strict";
const $ = (id) => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const colours = bytes(page.colours);
const view = { yaw: -0.25, pitch: 0.1, near: 1 }; // from the camera itself the cloud would look like the image
let shown = null;

function picture(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

// What a sample needs to be drawn: depth in its unit, colours of its pixels, both at the depth map's size.
async function prepare(sample) {
  if (sample.z) return sample;
  const values = new DataView(bytes(sample.depth).buffer);
  const n = sample.width * sample.height;
  sample.z = new Float32Array(n);
  for (let i = 0; i < n; i++) sample.z[i] = sample.first * Math.exp(sample.step * values.getUint16(2 * i, true));
  sample.picture = await picture(sample.image);
  const small = new OffscreenCanvas(sample.width, sample.height).getContext("2d");
  small.drawImage(sample.picture, 0, 0, sample.width, sample.height);
  sample.rgb = new Uint32Array(small.getImageData(0, 0, sample.width, sample.height).data.buffer);
  return sample;
}

function length(z) {
  const text = z < 10 ? z.toFixed(2) : z.toFixed(1);
  return shown.unit ? `${text} ${shown.unit}` : text;
}

function colour(disparity) {
  const [low, high] = shown.ends;
  const share = Math.min(1, Math.max(0, (disparity - low) / (high - low || 1)));
  const i = 3 * Math.round(255 * share);
  return (255 << 24) | (colours[i + 2] << 16) | (colours[i + 1] << 8) | colours[i];
}

function paint(canvas, width, height, at) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const data = context.createImageData(width, height);
  const pixels = new Uint32Array(data.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = at(i);
  context.putImageData(data, 0, 0);
}

function drawPair(mark) {
  const image = $("image");
  image.width = shown.picture.width;
  image.height = shown.picture.height;
  image.getContext("2d").drawImage(shown.picture, 0, 0);
  paint($("disparity"), shown.width, shown.height, (i) => colour(1 / shown.z[i]));
  if (!mark) return;
  for (const canvas of [image, $("disparity")]) {
    const context = canvas.getContext("2d");
    const radius = canvas.width / 60;
    context.lineWidth = Math.max(1, canvas.width / 320);
    context.strokeStyle = "#2ee6a6";
    context.beginPath();
    context.arc(mark.x * canvas.width, mark.y * canvas.height, radius, 0, 2 * Math.PI);
    context.stroke();
  }
}

function point(event) {
  if (!shown) return;
  const box = event.currentTarget.getBoundingClientRect();
  const mark = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  const column = Math.min(shown.width - 1, Math.max(0, Math.floor(mark.x * shown.width)));
  const row = Math.min(shown.height - 1, Math.max(0, Math.floor(mark.y * shown.height)));
  const x = Math.floor(mark.x * shown.size[0]);
  const y = Math.floor(mark.y * shown.size[1]);
  const unit = shown.unit ? "" : " (the model's own unit)";
  $("reading").value = `x ${x}, y ${y}: depth ${length(shown.z[row * shown.width + column])}${unit}`;
  drawPair(mark);
}

// Every pixel's point, turned about the middle of the scene and drawn with a depth buffer. What is near follows a drag.
function drawCloud() {
  const canvas = $("cloud");
  const { width, height } = canvas;
  const context = canvas.getContext("2d", { willReadFrequently: true }); // drawn by the CPU
  const data = context.createImageData(width, height);
  const pixels = new Uint32Array(data.data.buffer).fill(0xff202020);
  const buffer = new Float32Array(width * height).fill(Infinity);
  const [fx, fy, cx, cy] = shown.camera;
  const scale = Math.min(width / shown.width, height / shown.height);
  const pivot = shown.pivot;
  const away = pivot / view.near;
  const [cosYaw, sinYaw] = [Math.cos(view.yaw), Math.sin(view.yaw)];
  const [cosPitch, sinPitch] = [Math.cos(view.pitch), Math.sin(view.pitch)];
  const left = (width - shown.width * scale) / 2;
  const top = (height - shown.height * scale) / 2;
  for (let row = 0, i = 0; row < shown.height; row++) {
    for (let column = 0; column < shown.width; column++, i++) {
      const z = shown.z[i];
      if (z > page.maxDepth) continue;
      const x = ((column - cx) / fx) * z;
      const y = ((row - cy) / fy) * z;
      const forward = z - pivot;
      const x1 = cosYaw * x + sinYaw * forward;
      const z1 = cosYaw * forward - sinYaw * x;
      const y1 = cosPitch * y - sinPitch * z1;
      const z2 = sinPitch * y + cosPitch * z1 + away;
      if (z2 < 0.02 * pivot) continue;
      const size = Math.min(8, Math.max(1, Math.ceil((scale * z) / z2)));
      const u = Math.round(left + ((fx * x1) / z2 + cx + 0.5) * scale - size / 2);
      const v = Math.round(top + ((fy * y1) / z2 + cy + 0.5) * scale - size / 2);
      for (let b = Math.max(0, v); b < Math.min(height, v + size); b++) {
        for (let a = Math.max(0, u); a < Math.min(width, u + size); a++) {
          const place = b * width + a;
          if (z2 < buffer[place]) {
            buffer[place] = z2;
            pixels[place] = shown.rgb[i];
          }
        }
      }
    }
  }
  context.putImageData(data, 0, 0);
}

let waiting = false;
function turned() {
  if (waiting || !shown) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawCloud();
  });
}

function middle(z) {
  const sorted = z.filter((value) => value <= page.maxDepth).sort();
  return sorted.length ? sorted[sorted.length >> 1] : 1;
}

async function show(number) {
  shown = await prepare(page.samples[number]);
  shown.pivot ??= middle(shown.z);
  [...$("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", i === number));
  $("name").textContent = shown.name;
  $("far").textContent = shown.unit ? length(1 / shown.ends[0]) : "far";
  $("near").textContent = shown.unit ? length(1 / shown.ends[1]) : "near";
  $("limit").textContent = shown.unit ? length(page.maxDepth) : `${page.maxDepth} units of the model`;
  drawPair(null);
  drawCloud();
}

paint($("scale"), 256, 1, (i) => (255 << 24) | (colours[3 * i + 2] << 16) | (colours[3 * i + 1] << 8) | colours[3 * i]);
page.samples.forEach((sample, number) => {
  const button = document.createElement("button");
  const small = document.createElement("img");
  small.src = sample.image;
  small.alt = button.title = sample.name;
  button.append(small);
  button.addEventListener("click", () => show(number));
  $("samples").append(button);
});
for (const id of ["image", "disparity"]) $(id).addEventListener("pointermove", point);
const cloud = $("cloud");
cloud.addEventListener("pointerdown", (event) => cloud.setPointerCapture(event.pointerId));
cloud.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  view.yaw -= event.movementX / 300;
  view.pitch = Math.min(1.5, Math.max(-1.5, view.pitch + event.movementY / 300));
  turned();
});
cloud.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    view.near = Math.min(20, Math.max(0.2, view.near * Math.exp(-event.deltaY / 800)));
    turned();
  },
  { passive: false },
);
cloud.addEventListener("dblclick", () => {
  Object.assign(view, { yaw: 0, pitch: 0, near: 1 });
  turned();
});
show(0);
