// Of the upload's box and of the examples: what is chosen becomes a `select` event. Gradio gives element, props, trigger.
const tell = (text) => { document.getElementById("amc-refused").textContent = text; };
const send = async (file) => {
    if (!file) return;
    const megabytes = (Math.ceil(file.size / 2 ** 20 * 10) / 10).toFixed(1);
    if (file.size > props.most) return tell(`${file.name}: ${megabytes} ${props.too_large}`);
    tell("");
    element.classList.add("amc-busy");
    try {
        const name = new URLSearchParams({name: file.name.slice(-100)});
        const answer = await fetch(`picture?${name}`, {method: "POST", body: file});
        const text = await answer.text();
        if (answer.ok) trigger("select", {picture: text});
        else tell(answer.status === 400 ? text : `${file.name}: the server does not take it now; try again`);
    } catch {
        tell(`${file.name}: the server cannot be reached`);
    } finally {
        element.classList.remove("amc-busy");
    }
};
element.addEventListener("change", (event) => {
    send(event.target.files[0]);
    event.target.value = "";
});
for (const kind of ["dragover", "drop"]) element.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop") send(event.dataTransfer.files[0]);
});
element.addEventListener("click", (event) => {
    const example = event.target.closest("[data-example]");
    if (!example) return;
    tell("");
    trigger("select", {example: Number(example.dataset.example)});
});
