// Loads what a page needs. Everything here only adds to pages that also work by links and forms.
import { startDrafts } from "./drafts.js";
import { startThemes } from "./themes.js";
import { startKeys } from "./keys.js";
import * as viewer from "./viewer.js";
import * as review from "./review.js";
import * as bench from "./bench.js";

export function say(text, bad = false) {
  const toast = document.getElementById("toast");
  toast.classList.toggle("bad", bad);
  toast.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { toast.textContent = ""; }, bad ? 12000 : 4000);
}

// All of them are there once the page is: a key that is pressed early must not be lost.
const wanted = [["[data-scene]", viewer], ["[data-review], [data-go]", review], ["[data-bench]", bench]];

function start(root) {
  for (const [selector, module] of wanted) {
    if (root.querySelector(selector) || root.matches?.(selector)) module.start(root);
  }
}

startThemes();
startDrafts();
startKeys();
start(document);

// What htmx has put into the page gets its behaviour too.
document.addEventListener("htmx:load", (event) => {
  if (event.detail.elt !== document.body) start(event.detail.elt);
});

// Failures are shown, never swallowed.
document.addEventListener("htmx:sendError", () => say("The server is not responding. Nothing was changed; try again.", true));
document.addEventListener("htmx:timeout", () => say("The server took too long. Try again.", true));
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  const words = {
    401: "You are signed out. Sign in again in another tab, then try again here.",
    403: "Your role does not allow this, or the page is out of date: load it again.",
    404: "This no longer exists. It may have been deleted.",
    413: "This is too large.",
    429: "Too many requests at once; try again in a moment.",
    503: "The server is busy; try again in a moment.",
  };
  say(event.detail.xhr.getResponseHeader("X-Message") || words[status] || `The server could not do this (error ${status}).`, true);
});

// Lists that choose something send their form at once.
document.addEventListener("change", (event) => {
  if (event.target.closest("[data-at-once]") && event.target.form) event.target.form.requestSubmit();
});

// Questions before something that cannot be taken back.
document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm || event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
