"use strict";
// Search and filters of the answers. Without this script all answers are visible.
(() => {
  const section = document.getElementById("answers");
  if (!section) return;
  const list = section.querySelector(".answer-list");
  const controls = section.querySelector(".controls");
  const search = controls.querySelector("input");
  const source = controls.querySelector("select");
  const buttons = [...controls.querySelectorAll("button")];
  const status = section.querySelector("[role=status]");
  const answers = [...list.children];
  const texts = new Map(answers.map((answer) => [answer, fold(answer.textContent)]));
  let chosen = "all";

  const rules = {
    all: () => true,
    flipped: (answer) => answer.dataset.flipped !== "none",
    differ: (answer) => answer.dataset.differ === "true",
    worse: (answer) => answer.dataset.worse === "true",
    longest: () => true,
  };

  function fold(text) {
    return text.normalize("NFKC").toLocaleLowerCase().replace(/\s+/g, " ");
  }

  function show() {
    const words = fold(search.value).split(" ").filter(Boolean);
    const isFound = (answer) => words.every((word) => texts.get(answer).includes(word));
    const isOfSource = (answer) => !source?.value || answer.dataset.source === source.value;
    let found = 0;
    for (const answer of answers) {
      answer.hidden = !(rules[chosen](answer) && isOfSource(answer) && isFound(answer));
      found += answer.hidden ? 0 : 1;
    }
    const all = `${answers.length} answer${answers.length === 1 ? "" : "s"}`;
    status.textContent = found ? `Showing ${found} of ${all}` : `No answer matches, of ${all}`;
  }

  function sort() {
    const order = [...answers];
    if (chosen === "longest") {
      order.sort((one, other) => Number(other.dataset.length) - Number(one.dataset.length));
    }
    list.append(...order);
  }

  function choose(button) {
    chosen = button.dataset.filter;
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    sort();
    show();
  }

  for (const button of buttons) button.addEventListener("click", () => choose(button));
  source?.addEventListener("change", show);
  search.addEventListener("input", show);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && search.value) {
      search.value = "";
      show();
    }
  });
  controls.hidden = false;
  show();
})();
