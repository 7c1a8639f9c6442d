// Verdicts by key. What is shown as saved was saved: until the server has said so it reads "saving", and a failure is
// told and leaves everything as it was. Verdicts are sent one after the other, in the order of the keys; going on to
// another field waits for what is still being saved.
import { say } from "./app.js";
import { typing } from "./keys.js";

let started = false;
let saving = 0;
let queue = Promise.resolve();
let leaveTo = null;

export function start() {
  if (started) return;
  started = true;
  document.addEventListener("keydown", key);
  document.addEventListener("submit", submit);
  addEventListener("beforeunload", (event) => { if (saving) event.preventDefault(); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-go]");
    if (link && saving) {
      event.preventDefault();
      leaveTo = link.href;
      note("Saving, then on…");
    }
    if (event.target.closest("[data-comment]")) openComment();
  });
  prefetch();
}

const bar = () => document.querySelector("[data-review]");

function key(event) {
  if (event.key === "Escape" && event.target.closest?.("[data-review] textarea")) {
    closeComment();
    return;
  }
  if (event.defaultPrevented || event.repeat || typing(event)) return;
  if (event.key.startsWith("Arrow") && event.target.matches("input")) return; // sliders and choices have their own use
  const go = { j: "next", ArrowRight: "next", k: "previous", ArrowLeft: "previous", u: "list" }[event.key];
  if (go) {
    // A list on the page has j and k for its lines; there, nothing is to go on to.
    const link = document.querySelector(`[data-go=${go}]`);
    if (link) link.click();
    else if (document.querySelector("[data-go]")) say(go === "next" ? "This is the last field of the list." : "This is the first field of the list.");
    else return;
    event.preventDefault();
  } else if (event.key === "c") {
    openComment();
    event.preventDefault();
  } else {
    const button = bar()?.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    const none = event.key === "a" && bar()?.querySelector("[data-no-answer]");
    if (button && !button.disabled) {
      button.click();
      event.preventDefault();
    } else if (none) {
      say(none.dataset.noAnswer);
    }
  }
}

function openComment() {
  const box = document.querySelector("[data-comment-box]");
  if (!box) return;
  box.hidden = false;
  box.querySelector("textarea").focus();
}

function closeComment() {
  document.querySelector("[data-comment-box]").hidden = true;
  document.querySelector("[data-comment]").focus();
}

function note(text, kind = "") {
  const place = bar()?.querySelector("[data-saved]");
  if (!place) return;
  place.className = `saved ${kind}`;
  place.textContent = text;
}

// Buttons show what the server holds.
function reflect() {
  const standing = document.getElementById("standing");
  if (!standing) return;
  const flagged = standing.dataset.flagged === "yes";
  for (const button of bar().querySelectorAll("[data-means]")) {
    const means = button.dataset.means;
    press(button, means === "flag" ? flagged : means === standing.dataset.decision);
  }
}

function press(button, on) {
  button.setAttribute("aria-pressed", String(on));
  if (button.dataset.means === "flag") button.value = on ? "unflag" : "flag";
}

// While something is being saved, they show what the server will hold.
function expect(chosen) {
  if (!chosen?.dataset.means) return;
  if (chosen.dataset.means === "flag") {
    press(chosen, chosen.value === "flag");
    return;
  }
  for (const button of bar().querySelectorAll("[data-means]")) {
    if (button.dataset.means !== "flag") press(button, button === chosen);
  }
}

function submit(event) {
  const form = event.target.closest("[data-review]");
  if (!form) return;
  event.preventDefault();
  const body = new URLSearchParams(new FormData(form, event.submitter)); // as it is now, whatever is pressed next
  expect(event.submitter);
  saving += 1;
  note("Saving…");
  queue = queue.then(() => send(form.action, body));
}

async function send(action, body) {
  const why = await post(action, body);
  saving -= 1;
  if (why !== null) {
    leaveTo = null;
    reflect();
    note(`Not saved: ${why}`, "bad");
    return;
  }
  if (saving) return; // the buttons show what is still on its way
  reflect();
  note(`Saved ${new Date().toISOString().slice(11, 16)} UTC`, "good");
  if (body.get("act") === "comment") {
    bar().querySelector("textarea").value = "";
    closeComment();
  }
  if (leaveTo) location.href = leaveTo;
}

// Null once the server has kept it; else why not.
async function post(action, body) {
  let answer;
  try {
    answer = await fetch(action, {
      method: "POST", body, keepalive: true, redirect: "error",
      headers: { "HX-Request": "true", "X-CSRF-Token": document.querySelector("meta[name=csrf]").content },
    });
  } catch {
    return "the server does not answer. What stood before still holds; try again.";
  }
  if (!answer.ok) {
    const words = { 401: "you are signed out. Sign in in another tab, then try again.", 403: "this is not allowed; load the page anew." };
    return answer.headers.get("X-Message") || words[answer.status] || `the server could not do it (${answer.status}). What stood before still holds.`;
  }
  const holder = document.createElement("template");
  holder.innerHTML = await answer.text();
  document.getElementById("standing").replaceWith(holder.content.getElementById("standing"));
  return null;
}

// The next field's picture is fetched ahead, so that j answers at once.
function prefetch() {
  const next = document.querySelector("[data-go=next]");
  if (!next?.dataset.picture) return;
  const fetchIt = () => { new Image().src = next.dataset.picture; };
  if ("requestIdleCallback" in window) requestIdleCallback(fetchIt, { timeout: 3000 });
  else setTimeout(fetchIt, 800);
}
