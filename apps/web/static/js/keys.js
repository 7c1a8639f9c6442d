// Keys that hold on every page: ? for help, j and k through lists, / to the search. Keys in review.js come first.
export const typing = (event) =>
  event.ctrlKey || event.metaKey || event.altKey ||
  event.target.closest?.("input:not([type=radio],[type=checkbox],[type=range]), textarea, select, [contenteditable]") ||
  document.querySelector("dialog[open]");

export function startKeys() {
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-help]")) document.getElementById("keys")?.showModal();
  });
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || typing(event)) return;
    if (event.key === "?") {
      document.getElementById("keys")?.showModal();
      event.preventDefault();
    } else if (event.key === "/") {
      const search = document.querySelector("input[type=search]");
      if (search) { search.focus(); event.preventDefault(); }
    } else if (event.key === "j" || event.key === "k") {
      if (step(event.key === "j" ? 1 : -1)) event.preventDefault();
    }
  });
}

// The next or previous row of a list; at its end, the next or previous page.
function step(by) {
  const rows = [...document.querySelectorAll(".list a.go")];
  if (!rows.length) return false;
  const at = rows.indexOf(document.activeElement);
  const next = at < 0 ? (by > 0 ? 0 : rows.length - 1) : at + by;
  if (next >= 0 && next < rows.length) {
    rows[next].focus();
    rows[next].scrollIntoView({ block: "nearest" });
  } else {
    const page = document.querySelector(by > 0 ? "[data-page=next]" : "[data-page=previous]");
    if (page) {
      // The row that had the focus goes with its page: without another, the next key would mean the whole page.
      document.addEventListener("htmx:afterSwap", () => [...document.querySelectorAll(".list a.go")].at(by > 0 ? 0 : -1)?.focus(), { once: true });
      page.click();
    }
  }
  return true;
}
