"use strict";

// The token of the address signs in by itself, once the browser knows its person's name. Without JavaScript it is typed.
const signIn = document.getElementById("sign-in");
// The page that asked for the sign-in, also if the address of the studio is opened after it in this tab.
if (signIn) {
  const back = signIn.elements.back;
  if (back.value === "/") back.value = sessionStorage.getItem("back") ?? "/";
  sessionStorage.setItem("back", back.value);
} else {
  sessionStorage.removeItem("back");
}
function sendToken() {
  if (!signIn || !location.hash.startsWith("#token=")) return;
  signIn.elements.secret.value = decodeURIComponent(location.hash.slice("#token=".length));
  history.replaceState(null, "", location.pathname);
  if ("known" in signIn.dataset) return signIn.submit();
  for (const each of signIn.querySelectorAll("[for=secret], #secret")) each.hidden = true;
  signIn.elements.reviewer.select();
}
sendToken();
// The address may be opened in a tab that shows this page already.
addEventListener("hashchange", sendToken);

// A letter presses the button or opens the part that shows it, unless somebody is typing.
// Answers have numbers, of two digits if there are more than nine.
let sent = false, digits = "", waking;
const keys = document.getElementById("keys");
const say = text => document.querySelectorAll(".verdicts output").forEach(place => { place.textContent = text; });
document.addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, select");
  const field = typing ?? document.querySelector("main [aria-invalid]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && field) {
    (field.closest("details") ?? field.form)?.querySelector("[data-enter]")?.click();
    return;
  }
  if (event.key === "Escape" && typing) {
    typing.blur();
    return;
  }
  if (typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat || keys?.open) return;
  // Enter is the key of a link or button that has the focus.
  if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
  let pressed = event.key.toLowerCase();
  if (/^\d$/.test(pressed)) {
    digits = document.querySelector(`[data-key^="${digits}${pressed}"]`) ? digits + pressed : pressed;
    pressed = digits;
  } else {
    digits = "";
  }
  const target = document.querySelector(`[data-key="${CSS.escape(pressed)}"]`);
  const more = digits && !target && document.querySelector(`[data-key^="${digits}"]`);
  say(more ? `${digits}…: type the next digit of the answer's number.` : "");
  if (!target) return;
  digits = "";
  event.preventDefault();
  // What opens a part or leads to a page judges nothing; letters after an ignored "note" would press buttons.
  if (document.body.dataset.keys === "resting" && target.form) {
    say(`${event.key} pressed nothing: keys rest for a second after a page change. Press it again.`);
    return;
  }
  const part = target.closest("details");
  // A part that is open stays open: its key leads back to the text.
  if (!(part?.open && target.localName === "summary")) target.click();
  part?.querySelector("textarea")?.focus();
});

// A text that is typed chooses what it belongs to.
document.addEventListener("input", event => {
  const choice = document.getElementById(event.target.dataset?.chooses);
  if (choice && event.target.value) choice.checked = true;
});

// Typed text comes back after a reload, a restart of the studio or `u`, until its form is recorded. The browser keeps
// it: the studio would need a request a key press, and would store text that nobody sent. Passwords and keys are not kept.
const typedBefore = document.getElementById("typed-before"), posts = document.querySelectorAll("main form[method=post]");
const TYPED = "textarea, input:is(:not([type]), [type=text], [type=number]):not([data-confirms], [name*=api_key])";
const fieldsOf = form => [...form.elements].filter(each => each.matches(TYPED));
// A form of a row or a file keeps a text for each of them.
function draftOf(form) {
  const about = ["key", "file", "after"].map(name => form.elements[name]?.value).filter(Boolean).join(" ");
  return [typedBefore.dataset.drafts, form.dataset.drafts ?? form.getAttribute("action"), about || fieldsOf(form)[0]?.name].join(" ");
}
const draftSent = sessionStorage.getItem("sent"), judging = document.querySelector("form#judge");
sessionStorage.removeItem("sent");
// A form that is recorded leads to another address. After a lost connection there is none.
const redirected = performance.getEntriesByType("navigation")[0]?.redirectCount > 0;
if (draftSent && !document.querySelector("[data-refused]") && (redirected || document.querySelector("[data-recorded]"))) {
  localStorage.removeItem(draftSent);
}
const keepers = new Map();
for (const form of typedBefore ? posts : []) {
  const draft = draftOf(form), kept = JSON.parse(localStorage.getItem(draft) ?? "{}");
  const keep = () => (Object.keys(kept).length ? localStorage.setItem(draft, JSON.stringify(kept)) : localStorage.removeItem(draft));
  keepers.set(form, keep);
  for (const field of fieldsOf(form)) {
    // A page that answers a form shows texts that are not saved.
    const isSaved = () => field.value === field.defaultValue && !("answers" in document.body.dataset);
    const typed = kept[field.name];
    if (typed !== undefined && typed !== field.value) {
      field.value = typed;
      field.dispatchEvent(new Event("input", { bubbles: true }));
      const part = field.closest("details");
      if (part) part.open = true;
      if (typedBefore.hidden) form.before(typedBefore);
      typedBefore.hidden = false;
    } else if (isSaved() && typed !== undefined) {
      delete kept[field.name];
      keep();
    }
    field.addEventListener("input", () => {
      kept[field.name] = field.value;
      if (isSaved()) delete kept[field.name];
      keep();
    });
  }
}
for (const link of document.querySelectorAll("[data-discard]")) {
  link.addEventListener("click", () => { for (const form of keepers.keys()) localStorage.removeItem(draftOf(form)); });
}

// The field of a refusal. The second of two letters that were pressed as keys would be typed into it.
const refusedField = document.querySelector("[aria-invalid]");
if (refusedField && sessionStorage.getItem("typing")) refusedField.focus();
else (refusedField ?? document.querySelector("main form .wrong"))?.scrollIntoView({ block: "center" });
sessionStorage.removeItem("typing");
// On a phone the menu scrolls.
const menu = document.querySelector("header nav ul");
const current = menu?.querySelector("[aria-current]");
if (current) menu.scrollLeft = current.offsetLeft - menu.offsetLeft - menu.clientWidth / 3;

// Keys rest for a second after a change of the row: a key pressed twice was meant for the row before.
function rest() {
  document.body.dataset.keys = "resting";
  clearTimeout(waking);
  waking = setTimeout(() => { document.body.dataset.keys = "awake"; }, 1000);
}
if (typedBefore && judging && draftSent === draftOf(judging)) document.body.dataset.keys = "awake";
else rest();

// The list of the page's keys, from its buttons.
const keyed = [...document.querySelectorAll("main :is([data-key], [data-enter]):not(:disabled)")];
const showKeys = document.getElementById("show-keys");
if (showKeys && keyed.length) {
  showKeys.hidden = false;
  const numbered = keyed.filter(each => each.closest("#labels"));
  for (const each of keyed.filter(each => !numbered.includes(each))) {
    const [key, text, name] = [document.createElement("dt"), document.createElement("dd"), each.cloneNode(true)];
    key.append(name.querySelector("kbd"));
    text.textContent = name.textContent.trim();
    keys.querySelector("dl").append(key, text);
  }
  if (numbered.length) {
    const [key, text] = [document.createElement("dt"), document.createElement("dd")];
    key.textContent = "number";
    text.textContent = "the answer with this number on the page";
    keys.querySelector("dl").append(key, text);
  }
  showKeys.addEventListener("click", () => keys.showModal());
  keys.querySelector("button").addEventListener("click", () => keys.close());
}

// A key that is pressed twice before the next page is there is one verdict.
document.addEventListener("submit", event => {
  if (sent) return event.preventDefault();
  sent = true;
  if (document.activeElement?.matches("input, textarea, button")) sessionStorage.setItem("typing", "yes");
  if (keepers.has(event.target)) {
    sessionStorage.setItem("sent", draftOf(event.target));
    // A verdict in another tab has removed the texts of this one, which may be refused.
    keepers.get(event.target)();
  }
  // An answer that nobody changed does not travel with a verdict.
  const shown = event.submitter?.closest(".verdicts") && document.querySelector("[data-shown]");
  if (shown) shown.disabled = shown.value === shown.defaultValue;
});
addEventListener("pageshow", event => {
  sent = false;
  if (event.persisted) {
    sessionStorage.removeItem("sent");
    rest();
  }
});

// A file that the studio would refuse is not sent first.
document.addEventListener("change", event => {
  const largest = Number(event.target.dataset?.largest);
  if (!largest) return;
  const tooLarge = [...event.target.files].some(file => file.size > largest);
  event.target.setCustomValidity(tooLarge ? `The file is larger than ${largest.toLocaleString("en")} bytes.` : "");
  event.target.reportValidity();
});
// On a phone a row of a table is a card, where each value needs the name of its column.
function label(part) {
  for (const table of part.querySelectorAll("table")) {
    const names = [...(table.tHead?.rows[0]?.cells ?? [])].map(cell => cell.textContent);
    for (const body of table.tBodies) {
      for (const row of body.rows) [...row.cells].forEach((cell, place) => { cell.dataset.label = names[place] ?? ""; });
    }
  }
}
label(document);
// A long text scrolls in its box, which the keyboard has to reach.
for (const box of document.querySelectorAll(".conversation dd, .text")) {
  if (box.scrollHeight > box.clientHeight) box.tabIndex = 0;
}
// A field to copy is marked as a whole, and has a button where the browser lets a page copy.
for (const button of document.querySelectorAll("[data-copy]")) {
  const field = document.getElementById(button.dataset.copy);
  field.addEventListener("focus", () => field.select());
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(field.value);
    button.textContent = "Copied";
    button.setAttribute("aria-label", button.ariaLabel.replace("Copy:", "Copied:"));
  });
}
// Answers of the playground, as they are computed. The page that is loaded then has their tokens.
const asked = document.getElementById("asked");
if (asked) {
  const events = new EventSource(asked.dataset.events);
  events.onmessage = event => {
    const piece = JSON.parse(event.data);
    document.getElementById(`answer-${piece.model}`).append(piece.text);
  };
  events.addEventListener("finished", () => {
    events.close();
    location.reload();
  });
  // After a lost connection the answers begin again.
  events.onopen = () => {
    for (const answer of document.querySelectorAll("[id^=answer-]")) answer.textContent = "";
  };
}

// This page as it is now; null if the connection ended before it was there, or in the middle of it.
async function newest() {
  const text = await fetch(location.href).then(answer => answer.text()).catch(() => null);
  return text === null ? null : new DOMParser().parseFromString(text, "text/html");
}

// A part of the page that the studio still computes is shown when it is there.
async function complete(part) {
  const waited = await fetch(part.dataset.computing).catch(() => null);
  const next = waited?.ok ? (await newest()) : null;
  if (next) {
    const made = next.getElementById(part.id);
    if (!made) return location.reload();
    if (!made.dataset.computing) {
      label(made);
      return part.replaceWith(made);
    }
    part.dataset.computing = made.dataset.computing;
  }
  setTimeout(complete, 1000, part);
}
document.querySelectorAll("[data-computing]").forEach(complete);

// A job in progress: its part of the page is made again, and at its end the whole page, unless a form was changed.
const still = matchMedia("(prefers-reduced-motion: reduce)");
async function refresh() {
  const live = document.getElementById("live");
  const page = document.hidden ? null : await newest();
  if (page) {
    const next = page.getElementById("live");
    const fields = [...document.querySelectorAll("main :is(input, textarea)")];
    const changed = fields.some(each => each.checked !== each.defaultChecked || (each.type !== "checkbox" && each.value !== each.defaultValue));
    if (!next && !changed) return location.reload();
    // Who reads a table by keys keeps the place.
    if (next && !live.contains(document.activeElement)) {
      label(next);
      live.replaceWith(next);
    }
  }
  setTimeout(refresh, still.matches ? 20000 : 4000);
}
if (document.getElementById("live")) setTimeout(refresh, still.matches ? 20000 : 4000);

// A job's log, line by line.
const log = document.getElementById("log");
if (log) {
  const events = new EventSource(log.dataset.events);
  events.onmessage = event => {
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    log.append(event.data + "\n");
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  // Above the log: one bar, and the newest message.
  events.addEventListener("progress", event => {
    const place = document.getElementById("progress");
    if (!place) return;
    const { done, total, text } = JSON.parse(event.data);
    document.getElementById("progress-text").textContent = text;
    Object.assign(place.querySelector("progress"), { max: total, value: done });
    place.hidden = false;
  });
  events.addEventListener("said", event => {
    const place = document.getElementById("said");
    if (place) place.textContent = event.data;
  });
  events.addEventListener("finished", event => {
    events.close();
    const state = document.getElementById("state");
    if (state.textContent === "running") location.reload();
    else state.textContent = event.data;
  });
  // After a lost connection the log begins again.
  events.onopen = () => { log.textContent = ""; };
}
