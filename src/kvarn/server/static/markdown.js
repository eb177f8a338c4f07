// Markdown as DOM nodes: paragraphs, headings, lists, tables, quotes, code. No markup is ever parsed from a text; what is
// made is named here and in inline.js, and a test holds that hostile texts come to nothing else.
import { copyButton } from "./copy.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // lists and quotes inside one another; deeper ones are paragraphs
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const DELIMITER = /^:?-+:?$/;

const shown = new WeakMap(); // of each target: the source of each block in it

// Makes `text` what `target` shows. Blocks whose source has not changed stay as they are, so that a text that grows costs
// its last block, and what somebody has selected above stays selected.
export function render(text, target) {
  const found = [...blocks(text.replace(/\r\n?/g, "\n").split("\n"))];
  const sources = found.map((block) => `${block.kind}\n${block.lines.join("\n")}`);
  const before = shown.get(target) ?? [];
  let same = 0;
  while (same < before.length && before[same] === sources[same]) same += 1;
  while (target.childElementCount > same) target.lastElementChild.remove();
  for (const block of found.slice(same)) target.append(build(block, 0));
  shown.set(target, sources);
}

// The blocks of some lines, one after the other: {kind, lines, …}.
function* blocks(lines, depth = 0) {
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindAt(lines, at, depth);
    const end = ENDS[kind](lines, at, depth);
    yield { kind, lines: lines.slice(at, end) };
    at = end;
  }
}

function kindAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence && !(fence[1][0] === "`" && fence[2].includes("`"))) return "code";
  if (HEADING.test(line)) return "heading";
  if (isRule(line)) return "rule";
  if (line.includes("|") && isDelimiter(lines[at + 1] ?? "", cells(line).length)) return "table";
  if (depth < MAX_DEPTH && QUOTE.test(line)) return "quote";
  if (depth < MAX_DEPTH && ITEM.test(line)) return "list";
  return "paragraph";
}

// Of each kind: the line after the block that begins at a line.
const ENDS = {
  code(lines, at) {
    const mark = FENCE.exec(lines[at])[1];
    for (let end = at + 1; end < lines.length; end += 1) {
      const line = lines[end].trim();
      if (line.length >= mark.length && line === mark[0].repeat(line.length)) return end + 1;
    }
    return lines.length;
  },
  heading: (_, at) => at + 1,
  rule: (_, at) => at + 1,
  table(lines, at) {
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return end;
  },
  quote(lines, at) {
    let end = at + 1;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return end;
  },
  list(lines, at) {
    const ordered = isOrdered(lines[at]);
    const margin = indent(lines[at]);
    let end = at + 1;
    let last = end; // without the empty lines that follow
    for (; end < lines.length; end += 1) {
      const line = lines[end];
      if (!line.trim()) continue;
      const item = ITEM.test(line) && !isRule(line) && indent(line) <= margin + 1;
      if (item ? isOrdered(line) !== ordered || indent(line) + 1 < margin : indent(line) <= margin) break;
      last = end + 1;
    }
    return last;
  },
  paragraph(lines, at, depth) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && kindAt(lines, end, depth) === "paragraph") end += 1;
    return end;
  },
};

function build(block, depth) {
  return BUILD[block.kind](block.lines, depth);
}

const BUILD = {
  code(lines) {
    const [, mark, info] = FENCE.exec(lines[0]);
    const last = lines.at(-1).trim();
    const closed = lines.length > 1 && last.length >= mark.length && last === mark[0].repeat(last.length);
    const margin = indent(lines[0]);
    const body = lines.slice(1, closed ? -1 : undefined).map((line) => line.slice(Math.min(margin, indent(line))));
    return codeBlock(body.join("\n"), info.trim().split(/\s/)[0].slice(0, 30));
  },
  heading(lines) {
    const mark = HEADING.exec(lines[0]);
    // The page's own headings come first: those of an answer are below them.
    return spelt(`h${Math.min(6, mark[1].length + 2)}`, unhashed(lines[0].slice(mark[0].length)));
  },
  rule: () => document.createElement("hr"),
  table(lines) {
    const table = document.createElement("table");
    const columns = cells(lines[0]).length;
    table.createTHead().append(row(lines[0], "th", columns));
    const body = table.createTBody();
    for (const line of lines.slice(2)) body.append(row(line, "td", columns));
    const scroller = document.createElement("div");
    scroller.className = "scroller";
    scroller.tabIndex = 0;
    scroller.append(table);
    return scroller;
  },
  quote(lines, depth) {
    const quote = document.createElement("blockquote");
    for (const block of blocks(lines.map((line) => line.replace(QUOTE, "")), depth + 1)) {
      quote.append(build(block, depth + 1));
    }
    return quote;
  },
  list(lines, depth) {
    const list = document.createElement(isOrdered(lines[0]) ? "ol" : "ul");
    if (list.tagName === "OL") list.start = parseInt(lines[0].trim(), 10);
    for (const item of items(lines)) {
      const node = document.createElement("li");
      for (const block of blocks(item, depth + 1)) node.append(build(block, depth + 1));
      const only = node.children.length === 1 ? node.firstElementChild : null;
      if (only?.tagName === "P") node.replaceChildren(...only.childNodes);
      list.append(node);
    }
    return list;
  },
  paragraph(lines) {
    const paragraph = document.createElement("p");
    lines.forEach((line, index) => {
      if (index) paragraph.append(document.createElement("br"));
      inline(line.trim(), paragraph);
    });
    return paragraph;
  },
};

// The lines of each item of a list, without its mark and margin.
function items(lines) {
  const found = [];
  const margin = indent(lines[0]);
  let width = 0;
  for (const line of lines) {
    const mark = ITEM.exec(line);
    if (mark && indent(line) <= margin + 1 && !(found.length && isRule(line))) {
      width = Math.min(mark[0].length, mark[1].length + mark[2].length + 4);
      found.push([line.slice(width)]);
    } else {
      found.at(-1).push(line.slice(Math.min(width, indent(line))));
    }
  }
  return found;
}

function indent(line) {
  return line.length - line.trimStart().length;
}

function isOrdered(line) {
  return /^\s*\d/.test(line);
}

function isRule(line) {
  const marks = line.replace(/\s/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function isDelimiter(line, columns) {
  if (!line.includes("-")) return false;
  const found = cells(line);
  return found.length === columns && found.every((cell) => DELIMITER.test(cell));
}

// The cells of a table's row; `\|` is no border.
function cells(line) {
  let text = line.trim();
  if (text.startsWith("|")) text = text.slice(1);
  if (text.endsWith("|") && !text.endsWith("\\|")) text = text.slice(0, -1);
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function row(line, name, columns) {
  const made = document.createElement("tr");
  const found = cells(line);
  for (let column = 0; column < columns; column += 1) made.append(spelt(name, found[column] ?? ""));
  return made;
}

function unhashed(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(trimmed[end - 1]) ? trimmed.slice(0, end).trim() : trimmed;
}

function spelt(name, text) {
  const node = document.createElement(name);
  inline(text, node);
  return node;
}

function codeBlock(text, language) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = language;
  caption.append(name, copyButton(() => text, "Copy code"));
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}
