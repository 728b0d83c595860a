// The server's API: OpenAI's chat completions, and votes.

/** What the server, or the way to it, said instead of an answer. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // of HTTP; 0: there was none
  }
}

let key = "";

/** The API key that goes with every request from now on. */
export function useKey(text) {
  key = text;
}

async function request(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers } : {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, { ...options, signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let told;
  try {
    const { error } = JSON.parse(text);
    told = error?.message ?? error;
  } catch {
    told = null; // not ours: a proxy's page
  }
  throw new Refused(response.status, typeof told === "string" ? told : `The server answered with status ${response.status}.`);
}

/** The models that answer chats, each { id, max_model_len, … }. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.filter((model) => !["reward", "classify"].includes(model.kind)); // those only score
}

/** How many votes have been kept, and where; null where the server takes none. */
export async function votes() {
  const kept = await (await request("votes")).json();
  return kept.file ? kept : null;
}

/** Keep a vote; the counts after it. */
export async function vote(body) {
  return (await request("votes", body)).json();
}

/** The chunks of a chat completion, as they come. */
export async function* completion(body, signal) {
  const response = await request("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The connection broke before the answer was whole.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.startsWith("data:") ? event.slice(5).trim() : "";
        if (data === "[DONE]") return;
        if (!data) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(chunk.error.code ?? 500, chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Refused(0, "The connection broke before the answer was whole.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
