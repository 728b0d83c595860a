// The page: what its fields and buttons do.

import { Refused, models, useKey, vote, votes } from "./api.js";
import { Answer, Conversation, Turn, VOTES } from "./conversation.js";
import { follow } from "./tokens.js";
import { TurnView, make } from "./view.js";

const $ = (id) => document.getElementById(id);
const talk = $("talk");
const views = new Map(); // turn -> its view
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const ADVICE = { 401: " Settings has a field for the API key.", 429: " Try again in a moment." };
let conversation = new Conversation();
let voting = null; // { pairs, ties } where the server takes votes
const hideTip = follow(talk, $("tip"));

function say(text, bad = false) {
  $("news").textContent = text;
  $("news").classList.toggle("bad", bad);
}

function failed(error) {
  if (error.status === 401) unlock();
  say(error instanceof Refused ? error.message + (ADVICE[error.status] ?? "") : `The page failed: ${error}`, true);
}

/** Show the field for the API key. */
function unlock() {
  $("keyed").hidden = false;
  open(true);
  $("key").focus();
}

function open(wide) {
  $("settings").hidden = !wide;
  $("options").setAttribute("aria-expanded", String(wide));
}

/** Ask for fewer tokens by default where a model has room for few, prompt and answer together. */
function fit(room) {
  const field = $("max_tokens");
  const untouched = field.value === field.defaultValue;
  field.defaultValue = String(Math.max(1, Math.min(512, Math.floor(room / 4))));
  if (untouched) field.value = field.defaultValue;
}

/** Fill the lists of models; keep what was chosen. */
async function load() {
  try {
    const found = await models();
    const names = found.map((model) => model.id);
    fit(Math.min(...found.map((model) => model.max_model_len ?? Infinity)));
    for (const [list, first] of [[$("left"), []], [$("right"), [""]]]) {
      const before = list.value;
      list.replaceChildren(...[...first, ...names].map((name) => make("option", { value: name }, name || "none")));
      if (names.includes(before)) list.value = before;
    }
    voting = await votes();
    for (const view of views.values()) view.voting = Boolean(voting);
    say("");
  } catch (error) {
    failed(error);
  }
}

/** Sampling as the fields ask for it; null, with the field shown, where one is wrong. `again`: how often it was asked. */
function sampling(again = 0) {
  const wrong = NUMBERS.map($).find((field) => !field.validity.valid);
  if (wrong) {
    open(true);
    wrong.reportValidity();
    return null;
  }
  const given = Object.fromEntries(NUMBERS.filter((id) => $(id).value !== "").map((id) => [id, Number($(id).value)]));
  if ("seed" in given) given.seed = (given.seed + again) % 2 ** 32;
  const stop = $("stop").value.split("\n").filter(Boolean);
  return stop.length ? { ...given, stop } : given;
}

/** Ask for one answer of a turn, and show it as it comes. */
async function fill(turn, side, settings) {
  const answer = turn.answers[side];
  turn.sampling = settings;
  let due = false;
  const show = () => {
    due = false;
    const below = talk.scrollHeight - talk.scrollTop - talk.clientHeight;
    views.get(turn)?.refresh();
    if (below < 80) talk.scrollTop = talk.scrollHeight;
  };
  await answer.ask(turn.messages, settings, () => {
    if (!due) requestAnimationFrame(show);
    due = true;
  });
  if (answer.locked) unlock();
  if (turn.done && !turn.answers[turn.kept].text.trim()) {
    turn.kept = Math.max(0, turn.answers.findIndex((each) => each.text.trim()));
  }
  views.get(turn)?.refresh();
  busy();
  if (!conversation.busy) $("told").textContent = `Answered: turn ${conversation.turns.length}`;
}

function busy() {
  $("stop-all").hidden = !conversation.busy;
  $("send").hidden = conversation.busy;
}

/** A new turn. */
async function ask(text) {
  const settings = sampling();
  if (!settings || conversation.busy) return false;
  const names = [$("left").value, $("right").value].filter(Boolean);
  if (!names.length) {
    say("There is no model to ask.", true);
    return false;
  }
  const turn = new Turn(text, conversation.messages($("system").value));
  turn.hidden = names.length === 2 && $("blind").checked;
  if (turn.hidden && Math.random() < 0.5) names.reverse();
  turn.answers = names.map((name) => new Answer(name));
  conversation.turns.push(turn);
  const view = new TurnView(turn, actions, Boolean(voting));
  views.set(turn, view);
  $("hello").hidden = true;
  talk.append(view.element);
  for (const each of views.values()) each.refresh();
  talk.scrollTop = talk.scrollHeight;
  say("");
  busy();
  const twice = names[0] === names[1]; // two draws of one model: with a seed they would be the same
  turn.asked = twice ? 1 : 0;
  for (const side of names.keys()) fill(turn, side, sampling(twice ? side : 0));
  return true;
}

/** Forget the turns from number `first` on. */
function forget(first) {
  for (const turn of conversation.turns.splice(first)) {
    views.get(turn).element.remove();
    views.delete(turn);
  }
}

/** Whether the turns after this one may go. */
function alone(turn) {
  const later = conversation.turns.length - 1 - conversation.turns.indexOf(turn);
  return !later || confirm(`This removes the ${later === 1 ? "turn" : `${later} turns`} after it.`);
}

const actions = {
  isLast: (turn) => turn === conversation.turns.at(-1),

  edit(turn, text) {
    if (conversation.busy || !sampling() || !alone(turn)) return;
    forget(conversation.turns.indexOf(turn));
    ask(text);
  },

  again(turn, side) {
    const settings = sampling(turn.asked + 1);
    if (!settings || conversation.busy || !alone(turn)) return;
    turn.asked += 1;
    const number = conversation.turns.indexOf(turn);
    forget(number + 1);
    if (turn.answers.length === 1) turn.before = conversation.messages($("system").value, number); // two answer the same
    turn.answers[side] = new Answer(turn.answers[side].model);
    turn.vote = null;
    turn.note = "";
    views.get(turn).rebuild();
    busy();
    fill(turn, side, settings);
  },

  keep(turn, side) {
    turn.kept = side;
    turn.hidden = false;
    views.get(turn).refresh();
  },

  async vote(turn, given) {
    if (turn.vote) return;
    turn.vote = given;
    views.get(turn).refresh();
    try {
      voting = await vote(turn.ballot(given, turn.sampling));
      turn.note = `Kept: ${voting.pairs} pair${voting.pairs === 1 ? "" : "s"}, ${voting.ties} tie${voting.ties === 1 ? "" : "s"}.`;
      if (given !== "tie" && actions.isLast(turn)) turn.kept = VOTES.indexOf(given);
      turn.hidden = false;
    } catch (error) {
      turn.vote = null;
      turn.note = error.message;
      if (error.status === 401) unlock();
    }
    views.get(turn)?.refresh();
  },
};

/** Download the conversation as one row that align.sft reads. */
function save() {
  const messages = conversation.messages($("system").value);
  if (!messages.some((message) => message.role === "assistant")) {
    say("There is no answer to export yet.", true);
    return;
  }
  const blob = new Blob([`${JSON.stringify({ messages })}\n`], { type: "application/jsonl" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversation.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  say("Exported: conversation.jsonl");
}

function renew() {
  conversation.stop();
  forget(0);
  conversation = new Conversation();
  $("hello").hidden = false;
  say("");
  busy();
  $("words").focus();
}

function recolour() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

const finger = matchMedia("(pointer: coarse)").matches; // its keyboard has no Shift+Enter
$("words").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || finger) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("words").value.trim();
  if (text && (await ask(text))) $("words").value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    hideTip();
    conversation.stop();
  }
  const given = { 1: "left", 2: "right", 0: "tie" }[event.key];
  const turn = conversation.turns.at(-1);
  if (!given || !voting || !turn?.comparable || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!event.target.closest("input, textarea, select")) actions.vote(turn, given);
});
$("stop-all").addEventListener("click", () => conversation.stop());
$("new").addEventListener("click", renew);
$("export").addEventListener("click", save);
$("theme").addEventListener("click", recolour);
$("options").addEventListener("click", () => open($("settings").hidden));
$("shade").addEventListener("change", () => talk.classList.toggle("shaded", $("shade").checked));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => {
  useKey($("key").value);
  load();
});
load();
