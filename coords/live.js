// The live page: a text of the reader's own, read by the chat server, and what if.

// Asks the server; a refusal is an error whose message is a sentence for the reader.
async function askServer(path, body) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer: is chat.py still running?");
  }
  if (!response.ok) throw new Error((await response.text()).trim());
  return response.json();
}

// The field for the text, and the questions of the views. One question is asked at a time, because
// the model answers one.
class Live {
  constructor(actions) {
    this.actions = actions;
    this.shown = null; // the text of the page
    this.queue = Promise.resolve();
    this.field = element("textarea", {
      id: "sentence",
      rows: 2,
      placeholder: "Write a sentence: the page shows how the model reads it",
      autocomplete: "off",
      spellcheck: false,
    });
    this.button = element("button", { className: "primary", type: "submit", textContent: "Look inside" });
    this.button.title = "Ctrl Enter";
    this.said = element("p", { className: "note" });
    this.said.setAttribute("role", "status");
    this.hint = note(
      "The page then shows what pulled each token, what each head looks at and what the model expects next. You can also change the model, without lasting effect: switch a head off, cut a pull, make a token heavier or move it, and see what it would say.",
    );
    document.body.classList.add("unread");
    this.suggestions = element("div", { className: "suggestions" }, ...this.suggest());
    const label = element("label", { htmlFor: "sentence", textContent: "Your sentence" });
    const row = element("div", { className: "row" }, this.field, this.button);
    this.node = element("form", { className: "live" });
    this.node.append(label, row, this.suggestions, this.said, this.hint);
    this.node.onsubmit = (event) => {
      event.preventDefault();
      this.look({ text: this.field.value });
    };
    this.field.onkeydown = (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.look({ text: this.field.value });
    };
    // the shown text is a part of the page's address, as all that was chosen
    ADDRESS.text = { write: () => this.shown, read: () => undefined };
    addEventListener("hashchange", () => this.followAddress());
    queueMicrotask(() => this.followAddress()); // when the page is built
  }

  suggest() {
    return (GIVEN.suggestions ?? []).map((text) =>
      element("button", {
        className: "plain",
        type: "button",
        textContent: text,
        onclick: () => this.look({ text }),
      }),
    );
  }

  followAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const text = given.get("text");
    if (text && text !== this.shown) this.look({ text });
    else if (given.has("conversation") && !text) this.look({ conversation: true });
    else if (!this.shown) this.field.focus();
  }

  // Whether the address asks for a text that is not this one.
  isOfAnotherText(shown = this.shown) {
    const text = new URLSearchParams(location.hash.slice(1)).get("text");
    return text !== null && text !== shown;
  }

  ask(path, body) {
    const answer = this.queue.then(() => askServer(path, body));
    this.queue = answer.catch(() => {});
    return answer;
  }

  // Asks for a text and shows it; what is wrong is said under the field.
  async look(body, path = "/look") {
    if (body.text !== undefined) this.field.value = body.text;
    if (body.text === "") return this.say("Write a sentence first.");
    this.say("The model reads …");
    this.button.disabled = true;
    const given = await this.ask(path, body).catch((error) => this.say(error.message, true));
    this.button.disabled = false;
    if (given) this.show(given, body.text ?? given.text);
  }

  // `text` is all of what was read; of a long one the page shows the end.
  show(given, text) {
    this.shown = this.field.value = text;
    this.suggestions.hidden = this.hint.hidden = true;
    document.body.classList.remove("unread");
    this.field.blur(); // the keys are for the picture now, and a phone hides its keyboard
    this.say(given.note);
    // what was chosen stays, but for the token, which was one of another text
    const address = new URLSearchParams(location.hash.slice(1));
    const isNew = this.isOfAnotherText();
    if (isNew) address.delete("token");
    address.delete("conversation");
    address.set("text", text);
    // the browser's Back shows the text before this one
    history[isNew ? "pushState" : "replaceState"](null, "", `#${address}`);
    openPage({ ...GIVEN, ...given });
    if (given.token !== undefined) this.actions.set({ token: given.token });
  }

  say(text, isBad = false) {
    this.said.textContent = text;
    this.said.classList.toggle("bad", isBad);
  }

  async whatIf(run, changes, token) {
    const answer = await this.ask("/look/what-if", { tokens: run.tokens, changes, at: token });
    return { ...answer, source: "computed now" };
  }

  branch(run, token, id) {
    return this.look({ tokens: run.tokens, at: token, id }, "/look/branch");
  }
}
