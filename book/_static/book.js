// Paper is white and folded proofs cannot be clicked there: both are put right for printing, and back afterwards.
let opened = [];
let theme;
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((details) => (details.open = true));
  theme = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
window.addEventListener("afterprint", () => {
  opened.forEach((details) => (details.open = false));
  if (theme) document.documentElement.dataset.theme = theme;
});

// A link to something inside a folded proof or solution opens it.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  let folded = false;
  for (let at = target.closest("details"); at; at = at.parentElement.closest("details")) {
    if (!at.open) folded = at.open = true;
  }
  for (let at = target.closest(".toggle-hidden"); at; at = at.parentElement.closest(".toggle-hidden")) {
    const button = at.querySelector("button.toggle-button");
    if (button) button.click();
    folded = true;
  }
  if (folded) target.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
window.addEventListener("load", () => setTimeout(unfold, 100));

// A slider's handle is given the name that stands beside it, so that a screen reader can say it.
function nameSliders(root) {
  root.querySelectorAll(".widget-slider .noUi-handle:not([aria-label]), .widget-slider input:not([aria-label])").forEach((handle) => {
    const label = handle.closest(".widget-slider").querySelector(".widget-label");
    handle.setAttribute("aria-label", (label && label.textContent.trim()) || "slider");
  });
}
// A formula inside a sentence that is wider than its box (on a telephone) scrolls there.
function boxWideFormulas(root) {
  root.querySelectorAll("mjx-container:not([display='true'])").forEach((formula) => {
    formula.classList.remove("wider-than-its-box");
    const block = formula.closest("p, li, td, th, dd, dt, figcaption, div");
    if (block && block.clientWidth && formula.getBoundingClientRect().width > block.clientWidth)
      formula.classList.add("wider-than-its-box");
  });
}
// Boxes that scroll sideways can be reached and scrolled by keyboard.
function reachScrollers(root) {
  root.querySelectorAll("div.math, mjx-container[display='true'], div.highlight pre, .cell_output pre, .pst-scrollable-table-container").forEach((box) => {
    if (box.scrollWidth > box.clientWidth + 1 && !box.hasAttribute("tabindex")) box.setAttribute("tabindex", "0");
  });
}
window.addEventListener("load", () => {
  const page = document.querySelector(".bd-article") || document.body;
  const tidy = () => { nameSliders(page); boxWideFormulas(page); reachScrollers(page); };
  let waiting = 0;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(tidy, 100); };
  new MutationObserver(soon).observe(page, { childList: true, subtree: true });
  window.addEventListener("resize", soon);
  page.addEventListener("toggle", soon, true); // a proof unfolds
  tidy();
});
