// How does a model's text become a page? A small subset of Markdown, built from nodes and never from markup.
//
// Invariants: text enters the document only as text nodes, and no attribute is made from it but the number a list
// starts with; links and images stay the characters they are. Every pass is linear in the text's length, whatever
// it holds. Blocks that can no longer change are not drawn again while an answer grows.

const FENCE = /^\s{0,12}(`{3,}|~{3,})\s*([\w+#.-]{0,24})/;
const HEADING = /^(#{1,6})[ \t]+(\S[^]*)/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+([^]*)/;
const RULE = /^ {0,3}([-*_])[ \t]*\1[ \t]*\1[-*_ \t]*$/;
const MAX_LIST_DEPTH = 6;

/** Return the blocks of a text, each with `start`, the offset of its first line. */
export function blocksOf(text) {
  const blocks = [];
  let open = null;
  let offset = 0;
  for (const line of text.split("\n")) {
    open = takeLine(blocks, open, line, offset);
    offset += line.length + 1;
  }
  return blocks;
}

/** Add a line to the open block or begin one; returns the block that is open then. */
function takeLine(blocks, open, line, start) {
  const begin = (block) => {
    blocks.push({ ...block, start });
    return blocks[blocks.length - 1];
  };
  if (open?.kind === "code") {
    if (isFenceEnd(line, open.fence)) return null;
    open.lines.push(line);
    return open;
  }
  const fence = FENCE.exec(line);
  if (fence) return begin({ kind: "code", fence: fence[1], language: fence[2], lines: [] });
  if (line.trim() === "") {
    if (open?.kind === "list") open.isLoose = true;
    return open?.kind === "list" ? open : null;
  }
  const heading = HEADING.exec(line);
  if (heading) {
    begin({ kind: "heading", level: heading[1].length, text: heading[2] });
    return null;
  }
  if (RULE.test(line)) {
    begin({ kind: "rule" });
    return null;
  }
  const item = ITEM.exec(line);
  if (item) {
    const goesOn = open?.kind === "list" && isOfList(open.items[0], item);
    const list = goesOn ? open : begin({ kind: "list", items: [], isLoose: false });
    list.items.push({ indent: width(item[1]), mark: item[2], lines: [item[3]] });
    list.isLoose = false;
    return list;
  }
  if (open?.kind === "list" && (!open.isLoose || /^\s{2,}/.test(line))) {
    open.items[open.items.length - 1].lines.push(line.trim());
    return open;
  }
  if (open?.kind === "paragraph") {
    open.lines.push(line);
    return open;
  }
  return begin({ kind: "paragraph", lines: [line] });
}

/** Say whether an item belongs to a list: below its first item, or marked like it. */
function isOfList(first, [, indent, mark]) {
  const isNumber = (text) => /\d/.test(text);
  return width(indent) > first.indent || isNumber(first.mark) === isNumber(mark);
}

function isFenceEnd(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text[0] === fence[0] && /^(`+|~+)$/.test(text);
}

function width(indent) {
  return indent.replaceAll("\t", "    ").length;
}

/** Return the node of a block. */
function nodeOf(block) {
  if (block.kind === "code") return codeNode(block);
  if (block.kind === "list") return listNode(block.items);
  if (block.kind === "rule") return document.createElement("hr");
  // A heading of an answer stands below those of the page.
  const isHeading = block.kind === "heading";
  const node = document.createElement(isHeading ? `h${Math.min(block.level + 2, 6)}` : "p");
  node.append(inline(isHeading ? block.text : block.lines.join("\n")));
  return node;
}

function codeNode(block) {
  const figure = document.createElement("figure");
  const bar = document.createElement("figcaption");
  const copy = document.createElement("button");
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  copy.type = "button";
  copy.className = "copy plain";
  copy.textContent = "Copy";
  bar.append(document.createTextNode(block.language || "code"), copy);
  code.textContent = block.lines.join("\n");
  pre.tabIndex = 0;
  pre.append(code);
  figure.append(bar, pre);
  return figure;
}

/** Return a list with the lists that its indents make; each level is a list element of its own. */
function listNode(items) {
  const levels = [];
  for (const item of items) {
    while (levels.length > 1 && item.indent < levels[levels.length - 1].indent) levels.pop();
    const last = levels[levels.length - 1];
    const isDeeper = last && item.indent > last.indent + 1 && levels.length < MAX_LIST_DEPTH;
    if (!last || isDeeper) {
      const list = newList(item.mark);
      if (last) last.list.lastElementChild.append(list);
      levels.push({ indent: item.indent, list });
    }
    const entry = document.createElement("li");
    entry.append(inline(item.lines.join("\n")));
    levels[levels.length - 1].list.append(entry);
  }
  return levels[0].list;
}

function newList(mark) {
  const number = parseInt(mark, 10);
  const list = document.createElement(Number.isNaN(number) ? "ul" : "ol");
  if (number > 1) list.start = number;
  return list;
}

/** Return a fragment for a piece of text: code, bold, italics; what does not close stays as it is written. */
export function inline(text) {
  const nodes = [];
  // The marks that are open, outermost first; one of a kind at most, so nothing is wrapped more than twice.
  const open = [];
  for (const token of tokensOf(text)) {
    const place = open.findIndex((mark) => mark.text === token.text);
    if (token.canClose && place >= 0 && nodes.length > open[place].at + 1) {
      // The first node is the opening mark itself.
      const inner = nodes.splice(open[place].at).slice(1);
      open.length = place;
      nodes.push(filled(document.createElement(token.kind), inner));
      continue;
    }
    if (token.canOpen && !open.some((mark) => mark.kind === token.kind)) {
      open.push({ kind: token.kind, text: token.text, at: nodes.length });
    }
    nodes.push(token.node ?? document.createTextNode(token.text));
  }
  return filled(document.createDocumentFragment(), nodes);
}

/** Append nodes one by one: as arguments of one call there may be too many. */
function filled(parent, nodes) {
  for (const node of nodes) parent.append(node);
  return parent;
}

/** Cut text into code, marks and what is between. */
function* tokensOf(text) {
  const closing = codeEnds(text);
  const special = /`+|\*{1,2}|_{1,2}|\\[\\`*_]/g;
  let from = 0;
  for (let found = special.exec(text); found; found = special.exec(text)) {
    const mark = found[0];
    const end = mark[0] === "`" ? closing(found.index, mark.length) : -1;
    if (mark[0] === "`" && end < 0) continue;
    if (found.index > from) yield { text: text.slice(from, found.index) };
    from = special.lastIndex;
    if (mark[0] === "\\") yield { text: "", node: document.createTextNode(mark[1]) };
    else if (end < 0) yield markToken(text, found.index, mark);
    else {
      const code = document.createElement("code");
      code.textContent = text.slice(from, end).trim();
      special.lastIndex = from = end + mark.length;
      yield { text: "", node: code };
    }
  }
  if (from < text.length) yield { text: text.slice(from) };
}

/** Say what a mark can do by what stands beside it: it opens before a word and closes after one. */
function markToken(text, at, mark) {
  const before = text[at - 1] ?? " ";
  const after = text[at + mark.length] ?? " ";
  // snake_case and 2*3 are no emphasis.
  const part = mark[0] === "_" ? /[\p{L}\p{N}]/u : /\p{N}/u;
  const isInWord = part.test(before) && part.test(after);
  return {
    text: mark,
    kind: mark.length === 2 ? "strong" : "em",
    canOpen: !isInWord && /\S/.test(after),
    canClose: !isInWord && /\S/.test(before),
  };
}

/** Return a function from a run of backticks to the next run as long; places are asked for in rising order. */
function codeEnds(text) {
  const runs = new Map();
  for (const run of text.matchAll(/`+/g)) {
    const length = run[0].length;
    if (!runs.has(length)) runs.set(length, { places: [], next: 0 });
    runs.get(length).places.push(run.index);
  }
  return (at, length) => {
    const run = runs.get(length);
    while (run.next < run.places.length && run.places[run.next] <= at) run.next += 1;
    return run.places[run.next] ?? -1;
  };
}

/** An answer that grows: blocks that cannot change any more keep their nodes. */
export class GrowingText {
  constructor(parent) {
    this.parent = parent;
    this.tail = "";
    this.nodes = [];
  }

  /** Add text and draw what it changes. */
  append(text) {
    this.tail += text;
    const blocks = blocksOf(this.tail);
    for (const node of this.nodes) node.remove();
    this.nodes = blocks.map(nodeOf);
    filled(this.parent, this.nodes);
    // A block is final once a whole line of the next one is there.
    let firstOpen = Math.max(blocks.length - 1, 0);
    if (firstOpen > 0 && !this.tail.includes("\n", blocks[firstOpen].start)) firstOpen -= 1;
    if (firstOpen === 0) return;
    this.nodes.splice(0, firstOpen);
    this.tail = this.tail.slice(blocks[firstOpen].start);
  }
}
