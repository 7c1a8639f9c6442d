// A field: layers, zoom, movement, and the link between its outlines and the gallery. The picture is an SVG; what is
// seen of it is its view box, so outlines stay sharp at every zoom.
import { typing } from "./keys.js";

const MOST = 16;
const remembered = "leukoflow-layers";

export function start(root) {
  const scenes = root.matches?.("[data-scene]") ? [root] : root.querySelectorAll("[data-scene]");
  for (const scene of scenes) if (!scene.dataset.ready) new Viewer(scene);
}

class Viewer {
  constructor(scene) {
    scene.dataset.ready = "yes";
    this.scene = scene;
    this.svg = scene.querySelector(".canvas");
    this.width = Number(this.svg.dataset.width);
    this.height = Number(this.svg.dataset.height);
    this.box = [0, 0, this.width, this.height];
    this.fingers = new Map();
    this.listen();
    this.recall();
  }

  // --- what is seen

  show() {
    const [x, y, w, h] = this.box;
    this.svg.setAttribute("viewBox", `${x} ${y} ${w} ${h}`);
  }

  zoom(factor, px = 0.5, py = 0.5) {
    let [x, y, w, h] = this.box;
    const smaller = Math.min(this.width, Math.max(this.width / MOST, w / factor));
    const change = smaller / w;
    x += (w - w * change) * px;
    y += (h - h * change) * py;
    this.box = [x, y, w * change, h * change];
    this.keepInside();
  }

  move(dx, dy) {
    this.box[0] += dx;
    this.box[1] += dy;
    this.keepInside();
  }

  keepInside() {
    const [, , w, h] = this.box;
    this.box[0] = Math.min(this.width - w, Math.max(0, this.box[0]));
    this.box[1] = Math.min(this.height - h, Math.max(0, this.box[1]));
    this.show();
  }

  whole() {
    this.box = [0, 0, this.width, this.height];
    this.show();
  }

  // Where a pointer is within the picture's window, 0 to 1; the picture may have margins at its sides.
  place(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    return [(at.x - this.box[0]) / this.box[2], (at.y - this.box[1]) / this.box[3]];
  }

  listen() {
    const svg = this.svg;
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [px, py] = this.place(event);
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), px, py);
    }, { passive: false });
    svg.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      svg.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, event);
      this.travelled = 0;
    });
    svg.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) {
      svg.addEventListener(name, (event) => {
        if (name === "pointerup" && this.fingers.has(event.pointerId) && this.travelled < 5) this.pick(event);
        this.fingers.delete(event.pointerId);
        svg.classList.remove("dragging");
      });
    }
    svg.addEventListener("dblclick", (event) => this.zoom(2, ...this.place(event)));
    svg.addEventListener("keydown", (event) => this.key(event));
    for (const button of this.scene.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => {
        if (button.dataset.zoom === "whole") this.whole();
        else this.zoom(button.dataset.zoom === "in" ? 1.5 : 1 / 1.5);
      });
    }
    for (const input of this.scene.querySelectorAll(".layers input, .layers select")) {
      input.addEventListener("input", () => { this.layers(); this.remember(); });
    }
    this.scene.addEventListener("pointerover", (event) => this.link(event));
    this.scene.addEventListener("focusin", (event) => this.link(event));
    this.scene.addEventListener("pointerleave", () => this.mark(null));
    for (const button of this.scene.querySelectorAll(".cell button")) {
      button.addEventListener("click", () => this.goTo(button.dataset.box.split(" ").map(Number)));
    }
  }

  drag(event) {
    const before = this.fingers.get(event.pointerId);
    if (!before) return;
    const matrix = this.svg.getScreenCTM();
    if (this.fingers.size === 2) {
      const other = [...this.fingers.entries()].find(([id]) => id !== event.pointerId)[1];
      const was = Math.hypot(before.clientX - other.clientX, before.clientY - other.clientY);
      const is = Math.hypot(event.clientX - other.clientX, event.clientY - other.clientY);
      const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      if (was > 0) this.zoom(is / was, ...this.place(middle));
    } else {
      this.svg.classList.add("dragging");
    }
    const share = 1 / this.fingers.size;
    this.move(-(event.clientX - before.clientX) / matrix.a * share, -(event.clientY - before.clientY) / matrix.d * share);
    this.travelled += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
    this.fingers.set(event.pointerId, event);
  }

  key(event) {
    if (typing(event)) return;
    const step = this.box[2] / 8;
    const act = {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), "0": () => this.whole(),
      ArrowLeft: () => this.move(-step, 0), ArrowRight: () => this.move(step, 0),
      ArrowUp: () => this.move(0, -step), ArrowDown: () => this.move(0, step),
    }[event.key];
    if (!act) return;
    const arrow = event.key.startsWith("Arrow");
    if (arrow && this.box[2] >= this.width) return; // nothing to move: the page may have the key
    act();
    event.preventDefault();
    event.stopPropagation();
  }

  // --- layers

  layers() {
    const base = this.scene.querySelector("[name=base]:checked")?.value ?? "original";
    const over = new Set([...this.scene.querySelectorAll("[name=over]:checked")].map((i) => i.value));
    const map = this.scene.querySelector("[name=map]")?.value ?? "";
    const strength = Number(this.scene.querySelector("[name=strength]").value) / 100;
    for (const layer of this.scene.querySelectorAll(".layer")) {
      const name = layer.dataset.layer;
      const on = layer.classList.contains("over") ? over.has(name) || name === `map-${map}` : name === base;
      if (on) for (const image of layer.querySelectorAll("image[data-href]")) {
        image.setAttribute("href", image.dataset.href);
        image.removeAttribute("data-href");
      }
      layer.toggleAttribute("hidden", !on);
      if (layer.classList.contains("over")) layer.setAttribute("opacity", String(strength));
    }
    const shown = this.scene.querySelector(`.layer[data-layer=${base}] image`)?.getAttribute("href");
    if (shown) for (const image of this.scene.querySelectorAll("[data-follow]")) image.setAttribute("href", shown);
    const key = this.scene.querySelector("[data-mapkey]");
    if (key) {
      key.hidden = !map;
      if (map) key.querySelector("[data-mapname]").textContent = this.scene.querySelector("[name=map]").selectedOptions[0].text;
    }
  }

  // The choice of layers stays from field to field; it says nothing of any field.
  remember() {
    const over = [...this.scene.querySelectorAll("[name=over]:checked")].map((i) => i.value);
    const base = this.scene.querySelector("[name=base]:checked")?.value;
    const map = this.scene.querySelector("[name=map]");
    const strength = this.scene.querySelector("[name=strength]").value;
    sessionStorage.setItem(remembered, JSON.stringify({ over, base, strength, map: Boolean(map?.value) }));
  }

  recall() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(remembered)); } catch { /* as the server sent it */ }
    if (kept) {
      for (const i of this.scene.querySelectorAll("[name=over]")) i.checked = kept.over.includes(i.value);
      for (const i of this.scene.querySelectorAll("[name=base]")) i.checked = i.value === kept.base;
      this.scene.querySelector("[name=strength]").value = kept.strength;
      const map = this.scene.querySelector("[name=map]");
      if (map && kept.map) map.value = map.dataset.mine;
    }
    this.layers();
  }

  // --- outlines and gallery

  link(event) {
    const of = event.target.closest?.("[data-cell]");
    this.mark(of ? of.dataset.cell : null);
  }

  pick(event) {
    const path = document.elementsFromPoint(event.clientX, event.clientY).find((e) => e.matches?.("path[data-cell]"));
    if (!path) return;
    const card = this.scene.querySelector(`.cell[data-cell="${path.dataset.cell}"] button`);
    card?.focus({ preventScroll: true });
    card?.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  }

  mark(cell) {
    if (cell === this.marked) return;
    this.marked = cell;
    for (const element of this.scene.querySelectorAll(".hot")) element.classList.remove("hot");
    const ring = this.scene.querySelector("[data-ring]");
    ring.toggleAttribute("hidden", cell === null);
    if (cell === null) return;
    for (const element of this.scene.querySelectorAll(`[data-cell="${CSS.escape(cell)}"]`)) element.classList.add("hot");
    const box = this.scene.querySelector(`.cell[data-cell="${CSS.escape(cell)}"] button`)?.dataset.box.split(" ").map(Number);
    if (!box) return;
    ring.setAttribute("x", box[0]); ring.setAttribute("y", box[1]);
    ring.setAttribute("width", box[2] - box[0]); ring.setAttribute("height", box[3] - box[1]);
  }

  goTo([x0, y0, x1, y1]) {
    const w = Math.min(this.width, Math.max(x1 - x0, y1 - y0) * 2.2);
    const h = w * this.height / this.width;
    this.box = [(x0 + x1) / 2 - w / 2, (y0 + y1) / 2 - h / 2, w, h];
    this.keepInside();
    this.svg.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  }
}

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const keys = { o: "base", t: "attention", n: "nucleus", y: "cytoplasm", m: "map" };

// Keys for layers hold wherever the focus is, for the first field of the page.
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || typing(event) || !keys[event.key]) return;
  const scene = document.querySelector("[data-scene]");
  if (!scene) return;
  const input = { base: "base", map: "map" }[keys[event.key]];
  const element = input === "base" ? scene.querySelector("[name=base]:not(:checked):not(:disabled)")
    : input === "map" ? scene.querySelector("[name=map]") : scene.querySelector(`[name=over][value=${keys[event.key]}]`);
  if (!element) return;
  if (input === "map" && !element.value && !element.dataset.mine) { element.focus(); return; } // no answer: choose a class
  if (input === "map") element.value = element.value ? "" : element.dataset.mine;
  else element.checked = input === "base" ? true : !element.checked;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  event.preventDefault();
});
