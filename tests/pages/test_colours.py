"""Both pages in the dark and in the light: as the system has it, or as the button says; always readable."""

import pytest
from sse import answers

pytestmark = pytest.mark.e2e

FAINT = """
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const behind = [];
    for (let over = node; over; over = over.parentElement) behind.unshift(getComputedStyle(over).backgroundColor);
    const [a, b] = [light(rgb([...behind, getComputedStyle(node).color])), light(rgb(behind))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)} ${text.data.trim().slice(0, 40)}`);
  }
  return found;
}
"""
BACK = "getComputedStyle(document.body).backgroundColor"


def is_dark(page):
    return sum(int(part) for part in page.evaluate(BACK)[4:-1].split(",")) < 200


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_the_page_is_as_the_system_has_it_until_the_button_says_otherwise(open_page, scheme, path):
    page = open_page(path, color_scheme=scheme)
    assert is_dark(page) == (scheme == "dark")
    page.click("#theme")
    assert is_dark(page) != (scheme == "dark")
    page.reload()
    assert is_dark(page) != (scheme == "dark")
    page.click("#theme")
    assert is_dark(page) == (scheme == "dark")
    page.emulate_media(color_scheme={"dark": "light", "light": "dark"}[scheme])
    assert is_dark(page) != (scheme == "dark")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_text_of_the_chat_stands_out(open_page, scheme):
    page = open_page("/", color_scheme=scheme)
    assert page.evaluate(FAINT) == []
    table = "| a | b |\n|-|-|\n| x | y |"
    answers(page, f"# T\n> q\n\n`c` [l](https://a.example)\n\n```py\nx\n```\n{table}", finish="length")
    page.fill("#prompt", "Hello?")
    page.keyboard.press("Enter")
    page.get_by_text("Regenerate").wait_for()
    page.click("#settings-button")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_text("Regenerate").click()
    page.get_by_text("Try again", exact=True).wait_for()
    assert page.evaluate(FAINT) == []
    page.locator("#conversations li").hover()
    page.get_by_label("Delete “Hello?”").click()
    page.get_by_text("Undo").wait_for()
    page.click("#key-button")
    assert page.evaluate(FAINT) == []


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_text_of_the_dashboard_stands_out(open_page, scheme):
    page = open_page("/dashboard", color_scheme=scheme)
    page.get_by_text("Live").wait_for()
    assert page.evaluate(FAINT) == []
    page.route("**/dashboard/state", lambda route: route.abort())
    page.get_by_text("No numbers").wait_for()
    assert page.evaluate(FAINT) == []
