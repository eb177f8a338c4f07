"""What the chat makes of markdown, in the browser it is for: never more than text and a few harmless elements."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.e2e

ALLOWED = {
    "P": [], "BR": [], "HR": [], "STRONG": [], "EM": [], "DEL": [], "CODE": [], "BLOCKQUOTE": [], "UL": [], "LI": [],
    "H3": [], "H4": [], "H5": [], "H6": [], "OL": ["start"], "TABLE": [], "THEAD": [], "TBODY": [], "TR": [], "TH": [],
    "TD": [], "DIV": ["class", "tabindex"], "PRE": ["tabindex"], "FIGURE": [], "FIGCAPTION": [], "SPAN": [],
    "BUTTON": ["type", "class", "aria-label"], "A": ["href", "title", "target", "rel"],
}  # fmt: skip
"""Elements and their attributes."""

CHECK = """
([text, allowed]) => {
  const target = document.createElement("div");
  document.body.append(target);
  window.render(text, target);
  const wrong = [];
  for (const node of target.querySelectorAll("*")) {
    const attributes = allowed[node.tagName];
    if (!attributes) wrong.push(node.tagName);
    for (const { name } of node.attributes) if (!attributes?.includes(name)) wrong.push(`${node.tagName} ${name}`);
    if (node.tagName === "A") {
      if (!/^(https?|mailto):/.test(node.href)) wrong.push(node.href);
      if (!node.rel.includes("noopener") || node.target !== "_blank") wrong.push(`rel ${node.rel}`);
    }
  }
  target.remove();
  return wrong;
}
"""
HTML = """
(text) => {
  const target = document.createElement("div");
  window.render(text, target);
  for (const caption of target.querySelectorAll("figcaption")) caption.replaceChildren(caption.firstChild.textContent);
  for (const name of ["title", "target", "rel"]) {
    for (const node of target.querySelectorAll("a")) node.removeAttribute(name);
  }
  return target.innerHTML.replaceAll(' tabindex="0"', "");
}
"""
GROWN = """
([text, size]) => {
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  for (let end = size; end < text.length; end += size) window.render(text.slice(0, end), grown);
  window.render(text, grown);
  window.render(text, whole);
  return grown.innerHTML === whole.innerHTML;
}
"""

MARKS = [
    "*", "**", "_", "__", "~~", "`", "``", "```", "```js\n", "~~~\n", "\n", "\n\n", " ", "    ", "- ", "1. ", "99) ",
    "> ",
    "# ", "###### ", "---", "|", "|-|-|\n", "| a | b |\n", "\\", "[", "]", "(", ")", "![", "](", "<", ">", "&lt;", "&",
    '"', "'", "a", "b c", "é", "\u202e", "\x00", "<!--", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>", "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)", "[x](vbscript:x)", "![x](https://evil.example/x.png)",
    "[x](https://a.example/ \"onmouseover=alert(1)\")", "<https://a.example/?q=\">", "<javascript:alert(1)>",
    "https://a.example/x", "https://user@evil.example", "[x](https://good.example@evil.example)", "[x](//evil.example)",
    "[x](mailto:a@b.example)", "<a href=javascript:alert(1)>x</a>", "<iframe src=https://evil.example>", "{{7*7}}",
]  # fmt: skip
ATTACKS = [mark for mark in MARKS if "example" in mark or "alert" in mark]
PLACES = [
    "{}", "**{}**", "`{}`", "[{}](https://a.example)", "[x]({})", "# {}", "> {}", "- x\n  - {}", "a|b\n-|-\n{}|{}",
    "```\n{}\n```", "```{}\nx\n```", "~~~html\n{}", "| {} |\n|-|",
]  # fmt: skip
LINES = st.lists(st.sampled_from(MARKS), max_size=6).map("".join)
TEXTS = st.one_of(st.lists(LINES, max_size=8).map("\n".join), st.text(max_size=200))


@pytest.fixture(scope="module")
def page(chromium, site):
    context = chromium.new_context(base_url=site)
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: asked.append(f"a dialog: {dialog.message}"))
    page.goto("/")
    page.evaluate('async () => { window.render = (await import("/static/markdown.js")).render; }')
    page.wait_for_selector("#model:enabled")
    asked.clear()
    yield page
    assert asked == []
    context.close()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("**b** *i* __b__ _i_ ~~d~~ `c`", "<p><strong>b</strong> <em>i</em> <strong>b</strong> <em>i</em> <del>d</del> "
         "<code>c</code></p>"),
        ("***both*** and **b *i* b**", "<p><strong><em>both</em></strong> and <strong>b <em>i</em> b</strong></p>"),
        ("snake_case_name, 2 * 3 * 4, \\*no\\*", "<p>snake_case_name, 2 * 3 * 4, *no*</p>"),
        ("`` a`b `` and `unclosed", "<p><code>a`b</code> and `unclosed</p>"),
        ("# One\n## Two #\ntext", "<h3>One</h3><h4>Two</h4><p>text</p>"),
        ("- a\n- b\n  - c\n\n- d", "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'),
        ("1. x\n   ```\n   code\n   ```\n2. y", '<ol start="1"><li><p>x</p><figure><figcaption></figcaption><pre><code>'
         "code</code></pre></figure></li><li>y</li></ol>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a | b\n- | :-:\n`x\\|y` | **z** | more", '<div class="scroller"><table><thead><tr><th>a</th><th>b</th></tr>'
         "</thead><tbody><tr><td><code>x|y</code></td><td><strong>z</strong></td></tr></tbody></table></div>"),
        ("```python\nif a < b:\n    pass\n```\nend", "<figure><figcaption>python</figcaption><pre><code>if a &lt; b:"
         "\n    pass</code></pre></figure><p>end</p>"),
        ("```\nnever closed\n**no**", "<figure><figcaption></figcaption><pre><code>never closed\n**no**"
         "</code></pre></figure>"),
        ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
        ("[site](https://a.example/x_(y) \"t\"), see https://b.example/z.", '<p><a href="https://a.example/x_(y)">site</a>'
         ', see <a href="https://b.example/z">https://b.example/z</a>.</p>'),
        ("![picture](https://a.example/p.png)", '<p><a href="https://a.example/p.png">picture</a></p>'),
    ],
)  # fmt: skip
def test_what_becomes_of_markdown(page, text, html):
    assert page.evaluate(HTML, text) == html


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](/v1/models)",
     "[x](https://good.example@evil.example)", "<b>bold</b> &lt;i&gt;", "<javascript:alert(1)>",
     "[x](data:text/html,y)"],
)  # fmt: skip
def test_what_could_hurt_is_shown_as_it_was_written(page, text):
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert page.evaluate(HTML, text) == f"<p>{escaped}</p>"


@pytest.mark.parametrize("place", PLACES)
def test_no_attack_becomes_anything_anywhere(page, place):
    for attack in ATTACKS:
        assert page.evaluate(CHECK, [place.replace("{}", attack), ALLOWED]) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_no_text_becomes_anything_but_what_is_allowed(page, text):
    assert page.evaluate(CHECK, [text, ALLOWED]) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(1, 9))
def test_a_text_that_came_in_pieces_looks_like_one_that_came_at_once(page, text, size):
    assert page.evaluate(GROWN, [text, size])


@pytest.mark.parametrize(
    "text",
    ["*" * 20_000, "**a " * 5_000, "[" * 20_000, "[a](" * 5_000, "`" * 20_001 + "a", "`a``b```c" * 2_000, "> " * 10_000,
     "- " * 10_000, "\n".join(" " * i + "- x" for i in range(500)), "|" * 20_000 + "\n" + "|-" * 10_000,
     "<https://" * 3_000, "_a" * 10_000, "~~a ~~ " * 4_000, "# " + "#" * 20_000, " " * 50_000 + "x"],
    ids=range(15),
)  # fmt: skip
def test_hostile_texts_come_to_an_end(page, text):
    assert page.evaluate(CHECK, [text, ALLOWED]) == []
