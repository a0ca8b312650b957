// The pages work without this file: it adds the theme's choice, countdowns, copying, and a log that stays at its end.
(() => {
  const root = document.documentElement;
  const kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;

  document.addEventListener("click", (event) => {
    const toggle = event.target.closest("[data-theme-toggle]");
    if (toggle) {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("theme", root.dataset.theme);
    }
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      navigator.clipboard.writeText(document.getElementById(copy.dataset.copy).textContent.trim()).then(() => {
        copy.textContent = "Copied";
      });
    }
    for (const menu of document.querySelectorAll("details.menu[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const menu of document.querySelectorAll("details.menu[open]")) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });

  const loaded = performance.now();
  const tick = () => {
    for (const clock of document.querySelectorAll("[data-seconds]")) {
      const left = Math.max(0, Number(clock.dataset.seconds) - Math.floor((performance.now() - loaded) / 1000));
      clock.textContent = `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}`;
      if (left === 0) {
        clock.removeAttribute("data-seconds");
        if (clock.dataset.reload !== undefined) location.reload();
      }
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    tick();
    setInterval(tick, 1000);
    if (matchMedia("(max-width: 900px)").matches) {
      for (const fold of document.querySelectorAll("details.filters-fold")) fold.open = false;
    }
    const log = document.getElementById("log");
    if (log) log.scrollTop = log.scrollHeight;
  });

  let following = true;
  document.addEventListener("htmx:beforeSwap", () => {
    const log = document.getElementById("log");
    if (log) following = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  });
  document.addEventListener("htmx:afterSettle", () => {
    const log = document.getElementById("log");
    if (log && following) log.scrollTop = log.scrollHeight;
  });
})();
