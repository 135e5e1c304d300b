// Filter the transcripts. Text is only ever compared and counted: nothing here makes elements.
(() => {
  "use strict";
  const STEP = 25, RELOAD_SECONDS = 15;
  const form = document.getElementById("filter");
  const cases = [...document.querySelectorAll("#cases > details")].map((element) => ({
    element, texts: [...element.querySelectorAll(".text")], words: null,
  }));
  let limit = STEP;

  function hits(text, want) {
    return (!want.stage || text.dataset.stage === want.stage) &&
      (!want.verdict || text.dataset.verdict === want.verdict) &&
      (!want.fate || text.dataset.fate === want.fate ||
        (want.fate === "dropped" && text.dataset.fate.startsWith("dropped")));
  }

  function says(item, words) {
    item.words ??= item.element.textContent.toLowerCase();
    return words.every((word) => item.words.includes(word));
  }

  function apply() {
    const want = Object.fromEntries(new FormData(form));
    const words = want.words.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = Boolean(want.stage || want.verdict || want.fate);
    let found = 0;
    for (const item of cases) {
      const data = item.element.dataset;
      const wanted = item.texts.map((text) => hits(text, want));
      const shown = wanted.includes(true) && (!want.where || data.where === want.where) &&
        (!want.kind || data.kind === want.kind) && (!want.task || data.task === want.task) &&
        says(item, words);
      item.texts.forEach((text, number) => {
        text.classList.toggle("hit", chosen && wanted[number]);
        text.hidden = Boolean(want.only) && !wanted[number];
      });
      found += shown;
      item.element.hidden = !shown || found > limit;
    }
    form.querySelector("output").value = `${found} of ${cases.length} prompts`;
    document.getElementById("more").hidden = found <= limit;
  }

  function follow(link) {
    form.reset();
    form.elements.stage.value = link.dataset.stage;
    if (form.elements.fate) form.elements.fate.value = link.dataset.fate;
    form.elements.where.value = "data stages";
    limit = STEP;
    apply();
  }

  function go(by) {
    const open = cases.map((item) => item.element).filter((element) => !element.hidden);
    const at = open.indexOf(document.activeElement?.closest("#cases > details"));
    const next = at < 0 ? open[0] : open[at + by];
    next?.querySelector("summary").focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  if (form) {
    form.hidden = false;
    form.addEventListener("input", () => { limit = STEP; apply(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { limit = STEP; apply(); }));
    document.getElementById("more").addEventListener("click", () => { limit += STEP; apply(); });
    for (const link of document.querySelectorAll("a[data-stage]")) {
      link.addEventListener("click", () => follow(link));
    }
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest("input, select, textarea");
      if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "j" || event.key === "k") go(event.key === "j" ? 1 : -1);
    });
    apply();
  }
  if ("running" in document.body.dataset) {
    // Whoever reads or filters is left alone.
    setInterval(() => {
      const busy = document.querySelector("details[open]") || form?.contains(document.activeElement);
      if (!busy && !document.hidden) location.reload();
    }, RELOAD_SECONDS * 1000);
  }
})();
