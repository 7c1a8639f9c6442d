// Images come by drop, paste, choice or camera; all of them end in the file field of one form, which is then sent.
import { say } from "./app.js";

let started = false;

export function start() {
  if (started) return;
  started = true;
  const form = document.querySelector("[data-bench]");
  const field = form.querySelector("input[type=file][name=files]");
  const zone = form.querySelector(".drop") ?? form;

  const send = (files) => {
    const list = [...files].filter((file) => file.size);
    if (!list.length) { say("There is no image in that.", true); return; }
    const most = Number(form.dataset.files);
    if (list.length > most) { say(`Up to ${most} files at once; these are ${list.length}.`, true); return; }
    const mb = list.reduce((sum, file) => sum + file.size, 0) / 2 ** 20;
    if (mb > Number(form.dataset.mb)) { say(`Up to ${form.dataset.mb} MB at once; these are ${Math.ceil(mb)} MB.`, true); return; }
    const carrier = new DataTransfer();
    for (const file of list) carrier.items.add(file);
    field.files = carrier.files;
    form.requestSubmit();
  };

  field.addEventListener("change", () => { if (field.files.length) send(field.files); });
  let depth = 0;
  addEventListener("dragenter", (event) => { if (hasFiles(event)) { depth += 1; zone.classList.add("over"); event.preventDefault(); } });
  addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) zone.classList.remove("over"); });
  addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    depth = 0;
    zone.classList.remove("over");
    if (!hasFiles(event)) return;
    event.preventDefault();
    send(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) { event.preventDefault(); send(files); }
  });
  form.addEventListener("htmx:afterRequest", (event) => { if (event.detail.elt === form) field.value = ""; });
  form.addEventListener("htmx:beforeRequest", () => form.querySelector("[data-progress]")?.removeAttribute("hidden"));
  form.addEventListener("htmx:afterRequest", () => form.querySelector("[data-progress]")?.setAttribute("hidden", ""));
  form.addEventListener("htmx:xhr:progress", (event) => {
    const bar = form.querySelector("progress");
    if (bar && event.detail.lengthComputable) bar.value = event.detail.loaded / event.detail.total;
  });
  camera(form, send);
}

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

function camera(form, send) {
  const open = form.querySelector("[data-camera]");
  if (!open) return;
  if (!navigator.mediaDevices?.getUserMedia) { open.hidden = true; return; }
  const box = form.querySelector("[data-camera-box]");
  const video = box.querySelector("video");
  let stream = null;

  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    box.hidden = true;
    open.hidden = false;
  };
  open.addEventListener("click", async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment", width: { ideal: 3840 }, height: { ideal: 2160 } }, audio: false,
      });
    } catch (error) {
      say(error.name === "NotAllowedError" ? "The browser does not let this page use the camera." : "There is no camera that can be used.", true);
      return;
    }
    video.srcObject = stream;
    box.hidden = false;
    open.hidden = true;
    box.querySelector("[data-shot]").focus();
  });
  box.querySelector("[data-close]").addEventListener("click", stop);
  box.querySelector("[data-shot]").addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      stop();
      if (blob) send([new File([blob], `camera-${new Date().toISOString().slice(11, 19).replaceAll(":", "")}.png`, { type: "image/png" })]);
    }, "image/png");
  });
  addEventListener("pagehide", stop);
}
