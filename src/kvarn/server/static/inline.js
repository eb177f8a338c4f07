// Markdown inside a line, as DOM nodes: code, bold, italics, strikes, links. What a model writes only ever becomes text
// nodes and the attributes below; every scan goes forward, so that no text takes more than linear time.

const MAX_DEPTH = 6;
const MAX_LABEL = 500; // characters between brackets in which a link's end is looked for
const MAX_URL = 2000;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;
const BARE_URL = /https?:\/\/[^\s<>"'`|\\^{}]+/iy;
const EMPHASIS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

// Appends `text` to `parent`. links: whether links may be made of it (a link has none inside).
export function inline(text, parent, { links = true, depth = 0 } = {}) {
  const none = new Set(); // closing marks that do not come any more
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  while (at < text.length) {
    const found = depth < MAX_DEPTH ? match(text, at, links, none, depth) : null;
    if (found) {
      flush();
      parent.append(found.node);
      at = found.end;
    } else if (text[at] === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      const run = text[at] === "`" ? runLength(text, at) : 1; // an unclosed run of backquotes is text as a whole
      plain += text.slice(at, at + run);
      at += run;
    }
  }
  flush();
}

function match(text, at, links, none, depth) {
  switch (text[at]) {
    case "`":
      return code(text, at, none);
    case "!":
    case "[":
      return links ? link(text, at, none, depth) : null;
    case "<":
    case "h":
    case "H":
      return links ? address(text, at) : null;
    case "*":
    case "_":
    case "~":
      return emphasis(text, at, links, none, depth);
    default:
      return null;
  }
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function code(text, at, none) {
  const length = runLength(text, at);
  const mark = "`".repeat(length);
  if (none.has(mark)) return null;
  let end = text.indexOf("`", at + length);
  while (end >= 0 && runLength(text, end) !== length) end = text.indexOf("`", end + runLength(text, end));
  if (end < 0) {
    none.add(mark);
    return null;
  }
  const node = document.createElement("code");
  const inner = text.slice(at + length, end);
  node.textContent = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
  return { node, end: end + length };
}

function emphasis(text, at, links, none, depth) {
  for (const [mark, name] of EMPHASIS) {
    if (!text.startsWith(mark, at) || none.has(mark)) continue;
    const start = at + mark.length;
    if (/\s/.test(text[start] ?? " ") || (mark.length === 1 && text[start] === mark)) continue;
    if (mark[0] === "_" && WORD.test(text[at - 1] ?? "")) continue;
    const end = closing(text, start + 1, mark);
    if (end < 0) {
      none.add(mark);
      continue;
    }
    const node = document.createElement(name);
    inline(text.slice(start, end), node, { links, depth: depth + 1 });
    return { node, end: end + mark.length };
  }
  return null;
}

// Where `mark` closes what stands before it; -1 where it never does.
function closing(text, from, mark) {
  for (let end = text.indexOf(mark, from); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (/\s/.test(text[end - 1]) || text[end - 1] === "\\") continue;
    if (mark.length === 1 && text[end + 1] === mark) {
      end += 1; // the beginning or end of what two marks enclose
      continue;
    }
    while (mark.length === 2 && text[end + 2] === mark[0]) end += 1; // ***both***
    if (mark[0] === "_" && WORD.test(text[end + mark.length] ?? "")) continue;
    return end;
  }
  return -1;
}

// [label](address "title"), and ![label](address), which is not loaded but becomes a link too.
function link(text, at, none, depth) {
  const open = text[at] === "!" ? at + 1 : at;
  if (text[open] !== "[" || none.has("](")) return null;
  if (text.indexOf("](", open) < 0) {
    none.add("](");
    return null;
  }
  const middle = labelEnd(text, open + 1);
  if (middle < 0 || text[middle + 1] !== "(") return null;
  const rest = text.slice(middle + 2, middle + 2 + MAX_URL);
  const target = /^\s{0,9}<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)?)>?(?:\s{1,9}"[^"\n]*")?\s{0,9}\)/.exec(rest);
  const url = target && safe(target[1]);
  if (!url) return null;
  const node = anchor(url);
  inline(text.slice(open + 1, middle), node, { links: false, depth: depth + 1 });
  if (!node.textContent.trim()) node.textContent = url.href;
  return { node, end: middle + 2 + target[0].length };
}

function labelEnd(text, from) {
  let inside = 0;
  for (let at = from; at < Math.min(text.length, from + MAX_LABEL); at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") inside += 1;
    else if (text[at] === "]" && inside-- === 0) return at;
  }
  return -1;
}

// <https://…> and https://… as they stand.
function address(text, at) {
  const enclosed = text[at] === "<";
  BARE_URL.lastIndex = enclosed ? at + 1 : at;
  let found = BARE_URL.exec(text)?.[0];
  if (!found || found.length > MAX_URL || (!enclosed && WORD.test(text[at - 1] ?? ""))) return null;
  if (enclosed && text[at + 1 + found.length] !== ">") return null;
  if (!enclosed) found = untrailed(found);
  const url = safe(found);
  if (!url) return null;
  const node = anchor(url);
  node.textContent = found;
  return { node, end: at + found.length + (enclosed ? 2 : 0) };
}

// Without the punctuation that ends a sentence, or closes a parenthesis that was opened before it.
function untrailed(url) {
  let end = url.length;
  while (end > 0 && (".,;:!?*_~]".includes(url[end - 1]) || (url[end - 1] === ")" && !url.slice(0, end).includes("(")))) {
    end -= 1;
  }
  return url.slice(0, end);
}

// The address, if following it can do no more than open a page or write a mail. Whoever is named before an @ is not
// where it leads, so such an address is none.
function safe(text) {
  if (!/^(https?:\/\/|mailto:)/i.test(text) || !URL.canParse(text)) return null;
  const url = new URL(text);
  return url.username || url.password ? null : url;
}

function anchor(url) {
  const node = document.createElement("a");
  node.href = url.href;
  node.title = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}
