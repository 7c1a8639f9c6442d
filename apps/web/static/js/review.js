// Verdicts by key. What is shown as saved was saved: until the server has said so it reads "saving", and a failure is
// reported and leaves everything as it was. Verdicts are sent one after the other, in the order of the keys; going on to
// another field waits for what is still being saved. A saved decision leads to the next field that needs one.
import { say } from "./app.js";
import { draftOf, keepDraft } from "./drafts.js";
import { typing } from "./keys.js";

let started = false;
let saving = 0;
let queue = Promise.resolve();
let chosen = null; // where somebody wants to go
let following = null; // the field that the last decision leads to

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
      chosen = link.href;
      note("Saving, then going on…");
    }
    if (event.target.closest("[data-comment]")) openComment();
  });
  for (const name of ["htmx:responseError", "htmx:sendError", "htmx:timeout"]) document.addEventListener(name, noPicture);
  comments();
  prefetch();
}

const bar = () => document.querySelector("[data-review]");
const box = () => document.querySelector("[data-comment-box]");
const area = () => box()?.querySelector("textarea");

function key(event) {
  if (event.target.closest?.("[data-review] textarea")) {
    if (event.key === "Escape") closeComment();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) box().querySelector("button").click();
    else return;
    event.preventDefault();
    return;
  }
  if (event.defaultPrevented || event.repeat || typing(event)) return;
  if (event.key.startsWith("Arrow") && event.target.matches("input")) return; // sliders and choices have their own use
  // The keys of a slide's page decide on the whole slide, and who stands on one of its fields may mean that field.
  const onField = event.target.closest?.(".list, .strip");
  if (onField && event.key === "Escape") document.activeElement.blur();
  if (onField && bar() && /^[a1-9ufc]$/.test(event.key)) {
    note("Nothing was saved: one field has the focus, and these keys are for the whole slide. Enter opens the field, Esc leaves it.");
    event.preventDefault();
    return;
  }
  const go = { j: "next", ArrowRight: "next", k: "previous", ArrowLeft: "previous", l: "list", b: "back" }[event.key];
  if (go) {
    // A list on the page has j and k for its lines; there, nothing is to go on to.
    const link = document.querySelector(`[data-go=${go}]`);
    if (link) link.click();
    else if (document.querySelector("[data-go]") && go === "next") say("This is the last field of the list.");
    else if (document.querySelector("[data-go]") && go === "previous") say("This is the first field of the list.");
    else return;
    event.preventDefault();
  } else if (event.key === "c") {
    openComment();
    event.preventDefault();
  } else {
    const button = bar()?.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    const none = event.key === "a" && bar()?.querySelector("[data-no-answer]");
    if (none) note(none.dataset.noAnswer);
    if (!button) return;
    event.preventDefault();
    if (button.disabled) note(button.dataset.why ?? "");
    else if (button.hasAttribute("data-decides") && document.querySelector(".review .waiting")) note("Wait for the picture: nothing was saved.");
    else if (button.hasAttribute("data-decides") && document.querySelector("[data-no-picture]")) note("There is no picture, so no key decides: nothing was saved.");
    else button.click();
  }
}

function noPicture() {
  const place = document.querySelector(".review .waiting");
  if (!place) return;
  place.classList.replace("waiting", "failed");
  place.querySelector("p").textContent = "The picture could not be loaded. Load the page again to retry.";
}

// --- comments

function comments() {
  if (!area()) return;
  const kept = draftOf(bar());
  area().addEventListener("input", () => keepDraft(bar(), area().value));
  if (!kept) return;
  area().value = kept;
  showComment(true);
  note("Your unsaved comment was restored.");
}

// What is hidden is not sent along with a decision.
function showComment(on) {
  box().hidden = !on;
  area().disabled = !on;
}

function openComment() {
  if (!box()) return;
  showComment(true);
  area().focus();
}

function closeComment() {
  showComment(false);
  document.querySelector("[data-comment]").focus();
}

// --- what is shown

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
    if (means === "withdraw") {
      button.disabled = !standing.dataset.said;
      button.value = `withdraw:${standing.dataset.said}`;
    } else press(button, means === "flag" ? flagged : means === standing.dataset.decision);
  }
}

function press(button, on) {
  button.setAttribute("aria-pressed", String(on));
  if (button.dataset.means === "flag") button.value = on ? "unflag" : "flag";
}

// While something is being saved, they show what the server will hold.
function expect(pressed) {
  if (!pressed?.dataset.means) return;
  if (pressed.dataset.means === "flag") {
    press(pressed, pressed.value === "flag");
    return;
  }
  for (const button of bar().querySelectorAll("[data-means]")) {
    if (button.hasAttribute("data-decides")) press(button, button === pressed);
  }
}

// --- saving

function submit(event) {
  const form = event.target.closest("[data-review]");
  if (!form) return;
  event.preventDefault();
  const body = new URLSearchParams(new FormData(form, event.submitter)); // as it is now, whatever is pressed next
  expect(event.submitter);
  saving += 1;
  note("Saving…");
  queue = queue.then(() => send(form, body));
}

async function send(form, body) {
  const { why, next, words } = await post(form.action, body);
  saving -= 1;
  if (why) {
    chosen = following = null;
    reflect();
    note(`Not saved: ${why}`, "bad");
    return;
  }
  if (body.get("comment") && body.get("comment") === area().value) {
    area().value = "";
    keepDraft(form, "");
    closeComment();
  }
  if (next) following = next;
  if (body.get("act").startsWith("withdraw")) following = null;
  if (saving) return; // the buttons show what is still on its way
  reflect();
  note([`Saved ${new Date().toISOString().slice(11, 16)} UTC.`, words].filter(Boolean).join(" "), "good");
  const writing = document.activeElement === area();
  if (chosen || (following && !writing)) location.assign(chosen ?? following);
}

// Why it was not kept; else where to go on to, and what there is to say.
async function post(action, body) {
  let answer;
  try {
    answer = await fetch(action, {
      method: "POST", body, keepalive: true, redirect: "error",
      headers: { "HX-Request": "true", "X-CSRF-Token": document.querySelector("meta[name=csrf]").content },
    });
  } catch {
    return { why: "the server is not responding. Nothing was changed; try again." };
  }
  const words = answer.headers.get("X-Message");
  if (!answer.ok) {
    const known = {
      401: "you are signed out. Sign in in another tab, then try again.",
      403: "you are not allowed to do this, or the page is too old: load it again.",
    };
    return { why: words || known[answer.status] || `the server could not do it (error ${answer.status}). Nothing was changed.` };
  }
  const holder = document.createElement("template");
  holder.innerHTML = await answer.text();
  document.getElementById("standing").replaceWith(holder.content.getElementById("standing"));
  return { next: answer.headers.get("X-Next"), words };
}

// The next field's picture is fetched ahead, so that j answers at once: that which its page will ask for, if any.
function prefetch() {
  const ahead = document.querySelector("[data-ahead]")?.dataset.ahead;
  if (!ahead) return;
  const fetchIt = async () => {
    try {
      const answer = await fetch(ahead, { headers: { "HX-Request": "true" } });
      const holder = document.createElement("template");
      if (answer.ok) holder.innerHTML = await answer.text();
      const picture = holder.content.querySelector("image[href]")?.getAttribute("href");
      if (picture) new Image().src = picture;
    } catch { /* it comes when it is asked for */ }
  };
  if ("requestIdleCallback" in window) requestIdleCallback(fetchIt, { timeout: 3000 });
  else setTimeout(fetchIt, 800);
}
