// Comments that were started and not saved yet. They stay in this tab's memory, for the person who is signed in, until
// they are saved or that person signs out; nothing of them is sent anywhere, or outlives the tab.
const PREFIX = "leukoflow-draft:";

const who = () => document.querySelector("meta[name=who]")?.content ?? "";
const place = (form) => `${PREFIX}${who()}:${new URL(form.action).pathname}`;

export const draftOf = (form) => sessionStorage.getItem(place(form)) ?? "";

export function keepDraft(form, text) {
  if (text.trim()) sessionStorage.setItem(place(form), text);
  else sessionStorage.removeItem(place(form));
}

export function startDrafts() {
  if (who()) dropDrafts((key) => !key.startsWith(`${PREFIX}${who()}:`)); // somebody else was here before
  document.addEventListener("submit", (event) => {
    if (event.target.matches("[data-sign-out]")) dropDrafts(() => true);
  });
}

function dropDrafts(which) {
  for (const key of Object.keys(sessionStorage)) if (key.startsWith(PREFIX) && which(key)) sessionStorage.removeItem(key);
}
