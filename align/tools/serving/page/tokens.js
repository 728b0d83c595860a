// Tokens of an answer, and what the model thought of them.

const about = new WeakMap(); // element of a token -> its tokens

/** The element of one piece of an answer. */
export function tokenOf(piece) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = piece.text;
  if (piece.tokens.length) {
    about.set(span, piece.tokens);
    const least = Math.min(...piece.tokens.map((token) => token.logprob));
    span.style.setProperty("--doubt", (1 - Math.exp(least)).toFixed(3));
  }
  return span;
}

/** Show what is known of the token under the pointer, the finger or the arrow keys, within `talk`. */
export function follow(talk, tip) {
  let here = null;

  function leave() {
    here?.classList.remove("here");
    here = null;
    tip.hidden = true;
  }

  function enter(span) {
    leave();
    const tokens = about.get(span);
    if (!tokens) return;
    here = span;
    span.classList.add("here");
    tip.replaceChildren(...tokens.map(table));
    tip.hidden = false;
    place(span.getClientRects()[0] ?? span.getBoundingClientRect(), tip);
  }

  talk.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".token");
    if (span) enter(span);
    else leave();
  });
  talk.addEventListener("pointerleave", leave);
  talk.addEventListener("scroll", leave);
  talk.addEventListener("focusout", leave);
  talk.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const said = event.target.closest(".said");
    if (!step || !said) return;
    event.preventDefault();
    const tokens = [...said.querySelectorAll(".token")];
    const now = tokens.indexOf(here);
    const next = tokens[now < 0 ? 0 : Math.min(Math.max(now + step, 0), tokens.length - 1)];
    if (!next) return;
    next.scrollIntoView({ block: "nearest" });
    enter(next);
  });
  return leave;
}

/** Below the token, or above it where there is no room. */
function place(spot, tip) {
  const { width, height } = tip.getBoundingClientRect();
  const below = spot.bottom + 6;
  const top = below + height > window.innerHeight ? Math.max(4, spot.top - height - 6) : below;
  tip.style.top = `${top}px`;
  tip.style.left = `${Math.max(4, Math.min(spot.left, window.innerWidth - width - 4))}px`;
}

/** The token that was drawn, and the likeliest ones. */
function table(token) {
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  const title = document.createElement("th");
  title.colSpan = 2;
  title.textContent = `${shown(token.token)}  ${percent(token.logprob)}`;
  head.append(title);
  const body = made.createTBody();
  for (const other of token.top_logprobs ?? []) {
    const row = body.insertRow();
    row.classList.toggle("drawn", other.token === token.token);
    row.insertCell().textContent = shown(other.token);
    row.insertCell().textContent = percent(other.logprob);
  }
  return made;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.01 ? "< 0.01 %" : `${share.toFixed(share < 1 ? 2 : 1)} %`;
}

/** Blanks and line breaks as signs. */
function shown(text) {
  return text === "" ? "(nothing)" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
