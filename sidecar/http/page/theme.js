// Light or dark: as the system has it, or as it was chosen here. Runs before the page is drawn, so that it does not flash.
"use strict";
{
  const root = document.documentElement;
  const chosen = localStorage.getItem("trunkline-theme");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#theme")) return;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("trunkline-theme", root.dataset.theme);
  });
}
