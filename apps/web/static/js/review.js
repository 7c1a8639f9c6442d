// Verdicts by key. What is shown as saved was saved: until the server has said so it reads "saving", and a failure is
// told and leaves everything as it was. Going on waits for what is still being saved.
import { say } from "./app.js";
import { typing } from "./keys.js";

let started = false;
let saving = 0;
let leaveTo = null;

export function start() {
  if (started) return;
  started = true;
  document.addEventListener("keydown", key);
  document.addEventListener("htmx:beforeRequest", before);
  document.addEventListener("htmx:afterRequest", after);
  addEventListener("beforeunload", (event) => { if (saving) event.preventDefault(); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-go]");
    if (link && saving) {
      event.preventDefault();
      leaveTo = link.href;
      note("Saving, then on to the next…");
    }
    if (event.target.closest("[data-comment]")) openComment();
  });
  prefetch();
}

const bar = () => document.querySelector("[data-review]");

function key(event) {
  if (event.key === "Escape" && event.target.closest?.("[data-review] textarea")) {
    document.querySelector("[data-comment-box]").hidden = true;
    document.querySelector("[data-comment]").focus();
    return;
  }
  if (event.defaultPrevented || typing(event)) return;
  const go = { j: "next", ArrowRight: "next", k: "previous", ArrowLeft: "previous", u: "list" }[event.key];
  if (go) {
    const link = document.querySelector(`[data-go=${go}]`);
    if (link) link.click();
    else if (go !== "list") say(go === "next" ? "This is the last field of the list." : "This is the first field of the list.");
    event.preventDefault();
  } else if (event.key === "c") {
    openComment();
    event.preventDefault();
  } else {
    const button = bar()?.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    if (button && !button.disabled) {
      button.click();
      event.preventDefault();
    }
  }
}

function openComment() {
  const box = document.querySelector("[data-comment-box]");
  if (!box) return;
  box.hidden = false;
  box.querySelector("textarea").focus();
}

function note(text, kind = "") {
  const place = bar()?.querySelector("[data-saved]");
  if (!place) return;
  place.className = `saved ${kind}`;
  place.textContent = text;
}

const sent = (event) => event.detail.requestConfig?.path?.includes("/verdicts");

// Buttons show what the server holds; while something is being saved, what it will hold.
function reflect(wanted) {
  const standing = document.getElementById("standing");
  if (!standing) return;
  const flagged = standing.dataset.flagged === "yes";
  for (const button of bar().querySelectorAll("[data-means]")) {
    const means = button.dataset.means;
    let on = means === "flag" ? flagged : means === standing.dataset.decision;
    if (wanted && means !== "flag" && wanted.dataset.means !== "flag") on = button === wanted;
    if (wanted && button === wanted && means === "flag") on = !flagged;
    button.setAttribute("aria-pressed", String(on));
    if (means === "flag" && !wanted) button.value = flagged ? "unflag" : "flag";
  }
}

function before(event) {
  if (!sent(event)) return;
  saving += 1;
  const button = event.detail.requestConfig.triggeringEvent?.submitter;
  if (button?.dataset.means) reflect(button);
  note("Saving…");
}

function after(event) {
  if (!sent(event)) return;
  saving = Math.max(0, saving - 1);
  reflect();
  if (!event.detail.successful) {
    const why = event.detail.xhr?.getResponseHeader?.("X-Message");
    note(why ? `Not saved: ${why}` : "Not saved. What stood before still holds; try again.", "bad");
    leaveTo = null;
    return;
  }
  note(`Saved ${new Date().toISOString().slice(11, 16)} UTC`, "good");
  const box = document.querySelector("[data-comment-box]");
  if (box && event.detail.requestConfig.triggeringEvent?.submitter?.value === "comment") {
    box.querySelector("textarea").value = "";
    box.hidden = true;
    bar().querySelector("[data-comment]").focus();
  }
  if (!saving && leaveTo) location.href = leaveTo;
}

// The next field's page and picture are fetched ahead, so that j answers at once.
function prefetch() {
  const next = document.querySelector("[data-go=next]");
  if (!next?.dataset.picture) return;
  const fetchIt = () => { new Image().src = next.dataset.picture; };
  if ("requestIdleCallback" in window) requestIdleCallback(fetchIt, { timeout: 3000 });
  else setTimeout(fetchIt, 800);
}
