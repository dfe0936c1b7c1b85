// Of a row: the word that is chosen becomes an `input` event. Gradio gives element and trigger.
element.addEventListener("click", (event) => {
    const chosen = event.target.closest("[role=radio]");
    if (!chosen) return;
    for (const word of element.querySelectorAll("[role=radio]")) word.setAttribute("aria-checked", word === chosen);
    const phrase = element.querySelector("[role=radiogroup] > div").textContent;
    trigger("input", {phrase, word: Number(chosen.dataset.word)});
});
