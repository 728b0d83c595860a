// A conversation: what was asked, what was answered, and which answer later turns stand on.

import { completion } from "./api.js";

/** One answer of one model, while it comes and afterwards. */
export class Answer {
  text = "";
  pieces = []; // { text, tokens: [{ token, logprob, top_logprobs }] }
  end = null; // why it says no more: stop, length, stopped, failed; null while it comes
  fault = "";
  first = null; // milliseconds until the first token
  each = null; // milliseconds a token after it
  tokens = 0;

  constructor(model) {
    this.model = model;
    this.stopping = new AbortController();
  }

  /** Ask for it. `changed` is called whenever there is more to show. */
  async ask(messages, settings, changed) {
    this.sampling = settings;
    const began = performance.now();
    let pending = []; // tokens that are no whole character yet
    try {
      const body = { model: this.model, messages, ...settings, logprobs: true, top_logprobs: 5 };
      for await (const chunk of completion(body, this.stopping.signal)) {
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        const fresh = choice.logprobs?.content ?? [];
        const text = choice.delta?.content ?? "";
        if (fresh.length || text) {
          const now = performance.now();
          if (this.first === null) {
            this.first = now - began;
            this.early = Math.max(fresh.length, 1);
          }
          this.tokens += Math.max(fresh.length, 1);
          if (this.tokens > this.early) this.each = (now - began - this.first) / (this.tokens - this.early);
        }
        pending.push(...fresh);
        if (text) {
          this.text += text;
          this.pieces.push(...split(text, pending));
          pending = [];
        }
        if (choice.finish_reason) this.end = choice.finish_reason;
        changed();
      }
      this.end ??= "stop";
    } catch (error) {
      this.end = error.name === "AbortError" ? "stopped" : "failed";
      if (this.end === "failed") this.fault = error.message;
      if (error.status === 401) this.locked = true;
    }
    changed();
  }

  stop() {
    this.stopping.abort();
  }
}

/** A text and its tokens as pieces of one token each; as one piece where tokens end within characters. */
function split(text, tokens) {
  if (tokens.map((each) => each.token).join("") !== text) return [{ text, tokens }];
  return tokens.map((each) => ({ text: each.token, tokens: [each] }));
}

/** What a turn may be voted. */
export const VOTES = ["left", "right", "tie"];

/** A user's turn and its answers, of which later turns see the kept one. */
export class Turn {
  answers = [];
  kept = 0;
  vote = null;
  hidden = false; // whether the models' names are not told yet

  constructor(text, before) {
    this.text = text;
    this.before = before; // messages that stood before it
  }

  get messages() {
    return [...this.before, { role: "user", content: this.text }];
  }

  get done() {
    return this.answers.every((answer) => answer.end);
  }

  /** Whether there are two whole answers that differ. */
  get comparable() {
    const texts = this.answers.map((answer) => answer.text.trim());
    return this.done && texts.length === 2 && texts.every(Boolean) && texts[0] !== texts[1]
      && !this.answers.some((answer) => ["failed", "stopped"].includes(answer.end));
  }

  /** What the server is told of a vote. */
  ballot(vote) {
    const answers = this.answers.map(({ model, text, sampling }) => ({ model, content: text, sampling }));
    return { messages: this.messages, answers, vote };
  }
}

/** All turns. */
export class Conversation {
  turns = [];

  /** Messages before turn number `end`. A turn without a word of an answer is left out. */
  messages(system, end = this.turns.length) {
    const said = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    for (const turn of this.turns.slice(0, end)) {
      const text = turn.answers[turn.kept]?.text.trim();
      if (text) said.push({ role: "user", content: turn.text }, { role: "assistant", content: text });
    }
    return said;
  }

  get busy() {
    return this.turns.some((turn) => !turn.done);
  }

  stop() {
    for (const turn of this.turns) for (const answer of turn.answers) if (!answer.end) answer.stop();
  }
}
