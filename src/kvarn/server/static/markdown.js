// A little markdown as DOM nodes: code blocks, lists, headings, bold, italics, inline code. Text only ever becomes text
// nodes, so nothing a model writes can become markup or a link.

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*/g;

function inline(text, parent) {
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    parent.append(text.slice(at, match.index));
    const [, code, bold, italic] = match;
    const node = document.createElement(code !== undefined ? "code" : bold !== undefined ? "strong" : "em");
    node.textContent = code ?? bold ?? italic;
    parent.append(node);
    at = match.index + match[0].length;
  }
  parent.append(text.slice(at));
}

function element(name, text, parent) {
  const node = document.createElement(name);
  inline(text, node);
  parent.append(node);
  return node;
}

export function render(text, target) {
  target.replaceChildren();
  const parts = text.split(/^```.*$/m);
  parts.forEach((part, index) => {
    if (index % 2) {
      const pre = document.createElement("pre");
      const code = document.createElement("code");
      code.textContent = part.replace(/^\n/, "").replace(/\n$/, "");
      pre.append(code);
      target.append(pre);
      return;
    }
    for (const block of part.split(/\n{2,}/)) blocks(block, target);
  });
}

function blocks(block, target) {
  let list = null;
  let paragraph = null;
  for (const line of block.split("\n")) {
    const bullet = line.match(/^\s*[-*+]\s+(.*)/);
    const numbered = line.match(/^\s*\d+[.)]\s+(.*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)/);
    if (bullet || numbered) {
      const kind = bullet ? "UL" : "OL";
      if (list?.tagName !== kind) {
        list = document.createElement(kind);
        if (numbered) list.start = parseInt(line.trim(), 10);
        target.append(list);
      }
      element("li", (bullet ?? numbered)[1], list);
      paragraph = null;
    } else if (heading) {
      element("h3", heading[2], target);
      list = paragraph = null;
    } else if (line.trim()) {
      list = null;
      if (paragraph) {
        paragraph.append(document.createElement("br"));
        inline(line, paragraph);
      } else {
        paragraph = element("p", line, target);
      }
    }
  }
}
