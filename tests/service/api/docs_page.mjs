// Runs the page at /docs on a small document of its own, opens everything there is, sends one request, and tells as JSON
// what was seen. Called by test_docs.py: node docs_page.mjs PAGE DESCRIPTION
import { readFileSync } from "node:fs";

class Element {
  constructor(tag) { Object.assign(this, { tag, children: [], listeners: {}, attributes: {}, className: "", value: "", hidden: false, words: "" }); }
  append(...parts) {
    for (const part of parts) {
      if (part === undefined || part === null) throw new Error(`${part} appended to <${this.tag}>`);
      if (part instanceof Element) this.children.push(part); else this.children.push(Object.assign(new Element("#text"), { words: String(part) }));
    }
  }
  replaceChildren(...parts) { this.children = []; this.append(...parts); }
  set textContent(text) { this.children = []; this.words = text; }
  get textContent() { return this.words + this.children.map((child) => child.textContent).join(""); }
  get firstChild() { return this.children[0]; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(kind, act) { this.listeners[kind] = act; }
  reportValidity() { return !this.required || this.value !== ""; }
  all() { return [this, ...this.children.flatMap((child) => child.all())]; }
  querySelectorAll(selector) { return this.all().filter((element) => element.className === selector.slice(1)); }
}

const [pagePath, descriptionPath] = process.argv.slice(2);
const page = readFileSync(pagePath, "utf8"), description = readFileSync(descriptionPath, "utf8");
const named = Object.fromEntries([...page.matchAll(/<(\w+) id="(\w+)"/g)].map(([, tag, id]) => [id, new Element(tag)]));
const requests = [];
const answers = (address, options = {}) => {
  requests.push([String(address), options.method || "GET", options.headers || {}, options.body || null]);
  const isDescription = String(address).endsWith("/openapi.json");
  if (isDescription && !(options.headers || {}).Authorization) return new Response("{}", { status: 401 });
  if (options.method === "DELETE") return new Response(null, { status: 204, statusText: "No Content" });
  return new Response(isDescription ? description : '{"answer": 42}', { headers: { "Content-Type": "application/json" } });
};
const scope = {
  document: { getElementById: (id) => named[id], createElement: (tag) => new Element(tag) },
  location: { href: "https://here.example/behind/docs" },
  fetch: async (...asked) => answers(...asked),
};
const settled = () => new Promise((resolve) => setTimeout(resolve, 20));
new Function(...Object.keys(scope), page.match(/<script>([^]*?)<\/script>/)[1])(...Object.values(scope));
await settled();
const refused = named.status.textContent;
named.key.value = "a-key";
named.key.listeners.change();
await settled();

/** Opens disclosures down to a depth: some schemas hold themselves. */
function open(element, depth) {
  if (element.tag === "details" && depth) { element.open = true; element.listeners.toggle(); }
  for (const child of element.children) open(child, depth - (element.tag === "details"));
}
const rows = named.operations.querySelectorAll(".operation");
for (const row of rows) open(row, 4);
const seen = Object.fromEntries(rows.map((row) => [row.firstChild.children.slice(0, 2).map((part) => part.textContent).join(" "), row.textContent]));

const row = rows.find((candidate) => candidate.firstChild.textContent.includes("get/v1/models/{name}"));
const [send] = row.all().filter((element) => element.textContent === "Send");
const [input] = row.all().filter((element) => element.tag === "input");
await send.listeners.click();
const whileEmpty = requests.length;
input.value = "a model";
await send.listeners.click();
const posted = rows.find((candidate) => candidate.firstChild.textContent.includes("post/v1/completions"));
await posted.all().find((element) => element.textContent === "Send").listeners.click();
const shown = posted.all().find((element) => element.attributes["aria-live"]).textContent;
const deletion = rows.find((candidate) => candidate.firstChild.textContent.includes("delete/admin/models/{name}"));
deletion.all().find((element) => element.tag === "input").value = "m";
await deletion.all().find((element) => element.textContent === "Send").listeners.click();
const emptied = deletion.all().find((element) => element.attributes["aria-live"]).textContent;
const asked = requests.slice(1, -1);
named.filter.value = "rerank";
named.filter.listeners.input();
const left = rows.filter((candidate) => !candidate.hidden).length;
console.log(JSON.stringify({ refused, seen, whileEmpty, requests: asked, shown, emptied, left }));
