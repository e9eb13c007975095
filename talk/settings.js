"use strict";
// The settings of an answer, as the fields of the page show them.

const settingName = (input) => input.labels[0].firstChild.textContent.trim();
const settingInputs = () => [...document.querySelectorAll(".settings [name]")];

// A setting as its field shows it: of the texts that end an answer one per line.
const writtenSetting = (value) =>
  Array.isArray(value)
    ? value.map((text) => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t")).join("\n")
    : String(value ?? "");

const readSetting = ({ name, value }) => {
  if (value === "") return null;
  return name === "stop" ? value.split("\n").filter(Boolean) : Number(value);
};

function showSettings(settings) {
  state.settings = settings;
  for (const input of settingInputs()) input.value = writtenSetting(settings[input.name]);
  describeSettings();
}

function describeSettings() {
  $("settings-now").textContent = settingInputs()
    .filter((input) => input.value !== "")
    .map((input) => `${settingName(input)} ${input.value.replaceAll("\n", " or ")}`)
    .join(", ");
}

// Only what was changed: a seed from the command line may be too long for a JavaScript number.
function changedSettings() {
  const changed = settingInputs().filter(
    (input) => input.value !== writtenSetting(state.settings[input.name]),
  );
  return Object.fromEntries(changed.map((input) => [input.name, readSetting(input)]));
}
