// What is asked: settings and a conversation as the body of a request, and that as a command to copy.

const NUMBERS = ["thinking_budget", "max_crops", "min_pixels", "max_pixels", "temperature", "seed", "max_tokens"];

/** The settings of the form that differ from the server's own. */
export function settingsOf(form) {
  const data = new FormData(form);
  const settings = { thinking: data.has("thinking"), crops: data.has("crops") };
  for (const name of NUMBERS) {
    if (data.get(name)) settings[name] = Number(data.get(name));
  }
  if (!settings.crops) delete settings.max_crops;
  if (!settings.thinking) delete settings.thinking_budget;
  return settings;
}

function contentOf(turn) {
  const pictures = turn.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  return [...pictures, { type: "text", text: turn.text }];
}

/** The body that asks the last of the turns; `answersOf` gives the answer to an earlier one. */
export function bodyOf({ model, system, settings, turns, answersOf }) {
  const messages = system ? [{ role: "system", content: system }] : [];
  turns.forEach((turn, place) => {
    messages.push({ role: "user", content: contentOf(turn) });
    if (place < turns.length - 1) messages.push({ role: "assistant", content: answersOf(turn) });
  });
  const stream = { stream: true, stream_options: { include_usage: true }, crop_images: true };
  return { model, messages, ...settings, ...stream };
}

/** A shell command that asks the same; pictures are read from files of their names. */
export function curlOf(body, pictures, origin, hasKey) {
  const plain = { ...body };
  for (const name of ["stream", "stream_options", "crop_images"]) delete plain[name];
  const files = [];
  const named = JSON.stringify(plain, (key, value) => {
    const number = key === "url" ? pictures.findIndex((picture) => picture.url === value) : -1;
    if (number < 0) return value;
    files[number] = pictures[number];
    return `\u0000${number + 1}\u0000`;
  }, 2);
  const escaped = named.replace(/[\\`$]/g, "\\$&").replace(/\\\\u0000(\d+)\\\\u0000/g, "$$IMAGE_$1");
  const reads = files.flatMap((picture, number) => picture ? [
    `IMAGE_${number + 1}="data:${picture.type};base64,$(base64 < '${picture.name.replaceAll("'", "'\\''")}' | tr -d '\\n')"`,
  ] : []);
  const key = hasKey ? ' -H "Authorization: Bearer $LOOKTWICE_API_KEY"' : "";
  return [
    ...reads,
    `curl ${origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d @- <<END`,
    escaped,
    "END",
  ].join("\n");
}
