// A turn on the page. Whatever a model or a user wrote is set as text, never as markup.

import { tokenOf } from "./tokens.js";

/** An element with attributes (`on…` are listeners) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const SIDES = ["Left", "Right"];
const LABELS = { left: "Left is better", right: "Right is better", tie: "Tie" };

/** What is seen of one turn; `on` has what its buttons do: edit, again, keep, vote. */
export class TurnView {
  constructor(turn, on, voting) {
    this.turn = turn;
    this.on = on;
    this.voting = voting;
    this.asked = make("div", { class: "asked" });
    this.grid = make("div", { class: "answers" });
    this.votes = make("div", { class: "row vote", role: "group", "aria-label": "Which answer is better?" });
    this.element = make("article", { class: "turn" }, this.asked, this.grid, this.votes);
    this.showAsked();
    this.rebuild();
  }

  /** The user's words, with a button to edit them. */
  showAsked() {
    const text = make("div", { class: "text", dir: "auto" }, this.turn.text);
    const edit = make("button", { type: "button", class: "small edit", onclick: () => this.edit() }, "Edit");
    this.asked.classList.remove("editing");
    this.asked.replaceChildren(text, edit);
  }

  /** A field in the place of the user's words. */
  edit() {
    const field = make("textarea", { dir: "auto", rows: "3", "aria-label": "Your message" });
    field.value = this.turn.text;
    const save = () => field.value.trim() && this.on.edit(this.turn, field.value.trim());
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.showAsked();
        this.asked.querySelector("button").focus();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    const buttons = make("div", { class: "row" },
      make("button", { type: "button", class: "small", onclick: () => this.showAsked() }, "Cancel"),
      make("button", { type: "button", class: "small", onclick: save }, "Send again"));
    this.asked.classList.add("editing");
    this.asked.replaceChildren(field, buttons);
    field.focus();
  }

  /** All answers anew: after one was asked for again. */
  rebuild() {
    this.columns = this.turn.answers.map((answer, side) => new AnswerView(this, answer, side));
    this.grid.replaceChildren(...this.columns.map((column) => column.element));
    this.element.classList.toggle("two", this.columns.length === 2);
    this.refresh();
  }

  /** What has changed since it was last shown. */
  refresh() {
    for (const column of this.columns) column.refresh();
    this.refreshVotes();
  }

  refreshVotes() {
    const { turn } = this;
    this.votes.hidden = !(this.voting && turn.comparable);
    if (this.votes.hidden) return;
    if (!this.votes.children.length) {
      this.buttons = Object.fromEntries(Object.entries(LABELS).map(([vote, label]) => [
        vote, make("button", { type: "button", onclick: () => this.on.vote(turn, vote) }, label)]));
      this.note = make("span", { class: "soft", role: "status" });
      this.votes.append(...Object.values(this.buttons), this.note);
    }
    for (const [vote, button] of Object.entries(this.buttons)) {
      button.disabled = turn.vote !== null;
      button.setAttribute("aria-pressed", String(turn.vote === vote));
    }
    this.note.textContent = turn.note ?? "";
  }
}

class AnswerView {
  constructor(view, answer, side) {
    this.view = view;
    this.answer = answer;
    this.side = side;
    this.shown = 0; // pieces
    this.name = make("h2");
    this.said = make("div", { class: "said text", dir: "auto", tabindex: "0", role: "region" });
    this.figures = make("p", { class: "figures" });
    this.fault = make("p", { class: "fault", role: "alert", hidden: true });
    const button = (label, title, act) => make("button", { type: "button", class: "small", title, onclick: act }, label);
    const { on, turn } = view;
    this.stopping = button("Stop", "Stop this answer", () => answer.stop());
    this.again = button("Regenerate", "Another answer in place of this one", () => on.again(turn, side));
    this.copy = button("Copy", "Copy the answer", () => navigator.clipboard?.writeText(answer.text));
    this.keep = button("Go on with this", "Later turns follow this answer", () => on.keep(turn, side));
    const row = make("div", { class: "row" }, this.stopping, this.keep, this.again, this.copy);
    this.element = make("section", { class: "answer" }, this.name, this.said, this.fault, this.figures, row);
  }

  refresh() {
    const { answer, side } = this;
    const { turn, on } = this.view;
    const two = turn.answers.length === 2;
    this.name.textContent = turn.hidden ? SIDES[side] : answer.model;
    this.said.setAttribute("aria-label", `Answer of ${this.name.textContent}`);
    this.said.append(...answer.pieces.slice(this.shown).map(tokenOf));
    this.shown = answer.pieces.length;
    this.element.classList.toggle("busy", !answer.end);
    this.element.classList.toggle("kept", two && turn.kept === side && turn.done);
    this.fault.hidden = !answer.fault;
    this.fault.textContent = answer.fault;
    this.figures.textContent = figures(answer);
    this.stopping.hidden = Boolean(answer.end);
    this.again.hidden = !answer.end;
    this.copy.hidden = !answer.end || !answer.text || !navigator.clipboard;
    this.keep.hidden = !two || !turn.done || !answer.text.trim() || !on.isLast(turn);
    this.keep.setAttribute("aria-pressed", String(turn.kept === side));
  }
}

/** Times, count and end of an answer. */
function figures(answer) {
  const parts = [];
  if (answer.first !== null) parts.push(`first token ${seconds(answer.first)}`);
  if (answer.each !== null) parts.push(`${answer.each.toFixed(answer.each < 10 ? 1 : 0)} ms a token`);
  if (answer.tokens) parts.push(`${answer.tokens} token${answer.tokens === 1 ? "" : "s"}`);
  if (answer.end === "length") parts.push("cut off: most tokens reached");
  if (answer.end === "stopped") parts.push("stopped");
  if (answer.end === "stop" && !answer.text.trim()) parts.push("no answer; this turn is left out from here on");
  return parts.join(" · ");
}

function seconds(milliseconds) {
  return milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}
