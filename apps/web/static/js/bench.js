// Images come by drop, paste, choice or camera; all of them end in the file field of one form, which is then sent. What
// cannot be sent goes along by its name and the reason, in a field of its own: everything that was chosen gets an answer.
import { say } from "./app.js";

let started = false;

export function start() {
  if (started) return;
  started = true;
  const form = document.querySelector("[data-bench]");
  const field = form.querySelector("input[type=file][name=files]");
  const zone = form.querySelector(".drop") ?? form;

  const unsent = form.querySelector("input[type=file][name=unsent]");

  const send = async (files, folders = new Set()) => {
    const list = [...files];
    if (!list.length) { say("That contains no image.", true); return; }
    const most = Number(form.dataset.files);
    if (list.length > most) { say(`Nothing was sent: you chose ${list.length} files, and at most ${most} can be sent at once.`, true); return; }
    const sent = new DataTransfer();
    const left = new DataTransfer();
    let bytes = 0;
    for (const file of list) {
      const why = folders.has(file) ? "folder" : tooLarge(file) ? "large" : await unreadable(file) ? "unreadable" : "";
      if (why) left.items.add(new File([why], file.name));
      else { sent.items.add(file); bytes += file.size; }
    }
    const mb = Math.ceil(bytes / 2 ** 20);
    if (mb > Number(form.dataset.mb)) { say(`Nothing was sent: you chose ${mb} MB, and at most ${form.dataset.mb} MB can be sent at once.`, true); return; }
    field.files = sent.files;
    unsent.files = left.files;
    form.requestSubmit();
  };

  const tooLarge = (file) => !/\.zip$/i.test(file.name) && file.size > Number(form.dataset.fileMb) * 2 ** 20;

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
    const dropped = [...event.dataTransfer.items].filter((item) => item.kind === "file");
    const files = dropped.map((item) => item.getAsFile() ?? new File([], item.webkitGetAsEntry()?.name ?? "unnamed"));
    send(files, new Set(files.filter((_, i) => dropped[i].webkitGetAsEntry()?.isDirectory)));
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) { event.preventDefault(); send(files); }
  });
  form.addEventListener("htmx:afterRequest", (event) => { if (event.detail.elt === form) { field.value = ""; unsent.value = ""; } });
  form.addEventListener("htmx:beforeRequest", () => form.querySelector("[data-progress]")?.removeAttribute("hidden"));
  form.addEventListener("htmx:afterRequest", () => form.querySelector("[data-progress]")?.setAttribute("hidden", ""));
  form.addEventListener("htmx:xhr:progress", (event) => {
    const bar = form.querySelector("progress");
    if (bar && event.detail.lengthComputable) bar.value = event.detail.loaded / event.detail.total;
  });
  camera(form, send);
}

// A folder where the browser does not say so, or a file that is gone: sending it would end the whole upload.
const unreadable = async (file) => {
  try { await file.slice(0, 1).arrayBuffer(); return false; } catch { return true; }
};

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
      say(error.name === "NotAllowedError" ? "The browser does not let this page use the camera." : "No camera is available.", true);
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
