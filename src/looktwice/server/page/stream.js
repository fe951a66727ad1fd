// The server's API: models, and an answer as it is written.

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function headersOf(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export async function fetchModels(key) {
  const response = await fetch("/v1/models", { headers: headersOf(key) });
  if (!response.ok) throw Object.assign(new Error(await problemOf(response)), { status: response.status });
  return (await response.json()).data.map((model) => model.id);
}

/** The chunks of an answer. Throws what the server says when it refuses, or breaks off. */
export async function* chunksOf(body, key, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headersOf(key), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await problemOf(response));
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off; ask again");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
