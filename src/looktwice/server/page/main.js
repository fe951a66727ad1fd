// The page: pictures and questions come in, conversations are kept, answers go into panels.

import { Panel } from "/page/panel.js";
import { bodyOf, curlOf, settingsOf } from "/page/request.js";
import { chunksOf, fetchModels } from "/page/stream.js";

const find = (id) => document.getElementById(id);
const knobs = find("knobs").elements;
const conversations = [];
let present = null;
let shown = [];
let stopping = null;

function complain(message) {
  Object.assign(find("problem"), { textContent: message ?? "", hidden: !message });
}

// pictures

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function add(files) {
  complain();
  for (const file of files) {
    try {
      const image = new Image();
      image.src = await dataUrl(file);
      await image.decode();
      const { naturalWidth: width, naturalHeight: height, src: url } = image;
      shown.push({ name: file.name || "picture.png", type: file.type, url, width, height });
    } catch {
      complain(`${file.name}: not a picture that this browser can open`);
    }
  }
  draw();
}

function draw() {
  find("shown").replaceChildren(...shown.map((picture) => {
    const item = document.createElement("li");
    const image = Object.assign(document.createElement("img"), { src: picture.url, alt: picture.name });
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    button.setAttribute("aria-label", `Remove ${picture.name}`);
    button.onclick = () => {
      shown = shown.filter((one) => one !== picture);
      draw();
      find("question").focus();
    };
    item.append(image, button);
    return item;
  }));
}

// conversations

function begin() {
  present = { turns: [], root: document.createElement("div") };
  show(present);
  find("question").focus();
}

function show(conversation) {
  present = conversation;
  find("empty").hidden = conversation.turns.length > 0;
  for (const one of conversations) one.root.hidden = one !== conversation;
  for (const one of conversations) one.button.toggleAttribute("aria-current", one === conversation);
}

/** Put a conversation into the history at its first turn. */
function keep(conversation, turn) {
  conversations.push(conversation);
  find("thread").append(conversation.root);
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const [picture] = turn.pictures;
  if (picture) button.append(Object.assign(document.createElement("img"), { src: picture.url, alt: "" }));
  button.append(Object.assign(document.createElement("span"), { textContent: turn.text }));
  button.onclick = () => !stopping && show(conversation);
  conversation.button = button;
  const item = document.createElement("li");
  item.append(button);
  find("history").prepend(item);
  find("nothing").hidden = true;
}

// questions

async function ask(event) {
  event.preventDefault();
  const text = find("question").value.trim();
  if (stopping) return;
  if (!text) return complain("Write a question first.");
  complain();
  const turn = { text, pictures: shown, panels: [] };
  if (!present.turns.length) keep(present, turn);
  const conversation = present;
  const before = conversation.turns.flatMap((one) => one.pictures).map((picture) => ({ ...picture, isNew: false }));
  const pictures = [...before, ...shown.map((picture) => ({ ...picture, isNew: true }))];
  if (before.length && !shown.length) pictures[0].isNew = true;
  conversation.turns.push(turn);
  const models = [...new Set([knobs.model.value, knobs.other.value].filter(Boolean))];
  turn.panels = models.map((model) => new Panel(model, pictures));
  conversation.root.append(rootOf(turn));
  show(conversation);
  shown = [];
  find("question").value = "";
  draw();
  conversation.root.lastElementChild.scrollIntoView({ block: "start", behavior: "smooth" });
  await run(conversation, turn, turn.panels);
}

function rootOf(turn) {
  const asked = Object.assign(document.createElement("h2"), { className: "asked" });
  for (const { url, name } of turn.pictures) {
    asked.append(Object.assign(document.createElement("img"), { src: url, alt: name }));
  }
  asked.append(Object.assign(document.createElement("span"), { textContent: turn.text }));
  const answers = Object.assign(document.createElement("div"), { className: "answers" });
  answers.append(...turn.panels.map((panel) => panel.root));
  const root = Object.assign(document.createElement("article"), { className: "turn" });
  root.append(asked, answers);
  return root;
}

/** Let panels of a turn be answered, all at the same time, until the last is done or somebody stops them. */
async function run(conversation, turn, panels) {
  stopping = new AbortController();
  for (const name of ["ask", "new"]) find(name).disabled = true;
  find("stop").disabled = false;
  try {
    await Promise.all(panels.map((panel) => answer(conversation, turn, panel, stopping.signal)));
  } finally {
    stopping = null;
    panels.at(-1).root.scrollIntoView({ block: "nearest" });
    for (const name of ["ask", "new"]) find(name).disabled = false;
    find("stop").disabled = true;
  }
}

async function answer(conversation, turn, panel, signal) {
  const turns = conversation.turns.slice(0, conversation.turns.indexOf(turn) + 1);
  const answersOf = (earlier) => (
    (earlier.panels.find((one) => one.model === panel.model) ?? earlier.panels[0]).content || "(no answer)"
  );
  const body = bodyOf({
    model: panel.model, system: knobs.system.value.trim(), settings: settingsOf(find("knobs")), turns, answersOf,
  });
  const copy = async (text) => {
    await navigator.clipboard.writeText(text);
    return "copied";
  };
  panel.clear();
  try {
    for await (const chunk of chunksOf(body, knobs.key.value, signal)) panel.take(chunk);
  } catch (error) {
    if (signal.aborted) panel.say("stopped");
    else panel.fail(error.message);
  }
  panel.offer({
    again: async () => { if (!stopping) await run(conversation, turn, [panel]); },
    json: () => copy(JSON.stringify({ content: panel.content, ...panel.trace }, null, 2)),
    curl: () => copy(curlOf(body, turns.flatMap((one) => one.pictures), location.origin, Boolean(knobs.key.value))),
  });
}

// the server

async function connect() {
  try {
    const models = await fetchModels(knobs.key.value);
    for (const [name, first] of [["model", []], ["other", [new Option("nothing", "")]]]) {
      const chosen = knobs[name].value;
      knobs[name].replaceChildren(...first, ...models.map((model) => new Option(model, model)));
      if (models.includes(chosen)) knobs[name].value = chosen;
    }
    find("served").textContent = models.length > 1 ? `${models[0]} and ${models.length - 1} more` : models[0];
  } catch (error) {
    find("served").textContent = error.status === 401 ? "This server wants an API key: Settings." : error.message;
    if (error.status === 401) find("settings").open = true;
  }
}

function listen() {
  const composer = find("composer");
  composer.addEventListener("submit", ask);
  find("stop").addEventListener("click", () => stopping?.abort());
  find("new").addEventListener("click", begin);
  find("files").addEventListener("change", async ({ target }) => {
    await add(target.files);
    target.value = "";
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopping?.abort();
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) add(event.clipboardData.files);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      composer.classList.toggle("over", name === "dragover");
    });
  }
  document.addEventListener("drop", (event) => add(event.dataTransfer.files));
  knobs.key.addEventListener("change", connect);
  for (const name of ["model", "other"]) knobs[name].addEventListener("focus", connect);
  find("knobs").addEventListener("submit", (event) => event.preventDefault());
  if (matchMedia("(max-width: 50rem)").matches) find("settings").open = false;
}

listen();
begin();
await connect();
