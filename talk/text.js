"use strict";
// The conversation as one text, to copy and to save, and texts to begin one.

// The conversation as text, as far as the page still has it.
const conversationText = () => [...tokens.values()].map((token) => token.text).join("");

async function copy() {
  try {
    await copyText(conversationText());
    notify("Copied.");
  } catch {
    notify("The browser does not allow copying here: use Save.", true);
  }
}

function save() {
  const file = new Blob([conversationText()], { type: "text/plain" });
  const link = element("a", { download: "conversation.txt", href: URL.createObjectURL(file) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  if (dropped.size) notify(`Saved the newest ${plain.format(tokens.size)} tokens.`);
}

// In place of a conversation: what this is, and texts to begin with.
const empty = () =>
  element(
    "div",
    { className: "empty" },
    element("p", {
      textContent:
        "Nothing was said yet. The model continues your text, in the style of the text it was trained on. " +
        (hasPulls()
          ? "Point at a token, tap it or move to it with the arrow keys to see which earlier tokens pulled it."
          : ""),
    }),
    ...(state.about.suggestions.length ? [element("p", { textContent: "For example:" })] : []),
    ...state.about.suggestions.map((text) =>
      element("button", {
        className: "plain",
        type: "button",
        textContent: text,
        onclick: () => {
          $("prompt").value = text;
          $("prompt").focus();
        },
      }),
    ),
  );
