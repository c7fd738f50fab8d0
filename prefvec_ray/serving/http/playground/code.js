// The request as code that runs elsewhere. A key is never part of it, only where to put one.

import { key } from "./api.js";
import { $, copy } from "./dom.js";

const url = () => new URL("v1", document.baseURI).href;
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(body) {
  const lines = [`curl ${quoted(`${url()}/chat/completions`)}`, "-H 'Content-Type: application/json'"];
  if (key.get()) lines.push('-H "Authorization: Bearer $PREFVEC_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

function python({ model, messages, preferences, ...sampling }) {
  const secret = key.get() ? 'os.environ["PREFVEC_API_KEY"]' : '"none"';
  const fields = [["model", literal(model)], ["messages", list(messages)], ...Object.entries(sampling).map(([k, v]) => [k, literal(v)])];
  if (preferences) fields.push(["extra_body", `{"preferences": ${literal(preferences)}}`]);
  return [
    ...(key.get() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(url())}, api_key=${secret})`,
    "answer = client.chat.completions.create(",
    ...fields.map(([name, value]) => `    ${name}=${value},`),
    ")",
    "print(answer.choices[0].message.content)",
    "print(answer.preferences, answer.system_fingerprint)",
  ].join("\n");
}

/** A JSON value as Python writes it. JSON's strings and numbers are Python's; its `true`, `false` and `null` never occur. */
function literal(value) {
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
}

const list = (messages) =>
  messages.length === 1 ? `[${literal(messages[0])}]` : `[\n${messages.map((one) => `        ${literal(one)},\n`).join("")}    ]`;

/** The dialog. `body()` is the request to show. */
export function codeDialog(body) {
  const dialog = $("code"), tabs = [$("tab-curl"), $("tab-python")];
  let shownTab = tabs[0];
  const show = (tab) => {
    shownTab = tab;
    for (const one of tabs) {
      one.setAttribute("aria-selected", String(one === tab));
      one.tabIndex = one === tab ? 0 : -1;
    }
    $("code-text").setAttribute("aria-labelledby", tab.id);
    $("code-text").textContent = tab.id === "tab-curl" ? curl(body()) : python(body());
    $("code-note").textContent = key.get() ? "Put your key into PREFVEC_API_KEY." : "";
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = tabs[1 - tabs.indexOf(tab)];
      show(other);
      other.focus();
    });
  }
  $("code-open").addEventListener("click", () => {
    show(shownTab);
    dialog.showModal();
  });
  $("code-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  $("code-copy").addEventListener("click", async () => {
    if (await copy($("code-text").textContent)) {
      $("code-note").textContent = "Copied";
    } else {
      getSelection().selectAllChildren($("code-text"));
      $("code-note").textContent = "The browser does not let the page copy; it is selected, press Ctrl C";
    }
  });
}
