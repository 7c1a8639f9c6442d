// Light, dark, or as the system has it; kept in a cookie, so that the server sends the page in the right colours.
export function startThemes() {
  const buttons = document.querySelectorAll("[data-theme-choice]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const choice = button.dataset.themeChoice;
      document.documentElement.dataset.theme = choice;
      const path = document.querySelector("meta[name=root]").content || "/";
      document.cookie = `leukoflow-theme=${choice}; path=${path}; max-age=31536000; samesite=strict`;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    });
  }
}
