"""The chat page, as somebody uses it: with a mouse, with keys only, on a phone, and when things go wrong."""

import json
import re

import httpx
import pytest
from live_server import wait_until
from sse import answers, refuses

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ATTACK = '<img src="https://evil.example/x.png" onerror="alert(1)"><script>alert(2)</script> [x](javascript:alert(3))'

OUTLINED = """
[document.activeElement, document.activeElement.closest(".box")].some(
  (node) => node && getComputedStyle(node).outlineStyle !== "none")
"""

WATCH = """
() => {
  window.seen = [];
  const look = () => {
    const text = document.querySelector("article[aria-busy=true] .text")?.textContent;
    if (text !== window.seen.at(-1)) window.seen.push(text);
  };
  new MutationObserver(look).observe(document.querySelector("#log"), { childList: true, subtree: true });
}
"""
"""Notes what an answer looks like while it comes."""


def send(page, text):
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def finished(page, answers=1):
    """Waits until so many answers are there; returns the text of the last one."""
    page.wait_for_selector("#send:not([hidden])")
    last = page.locator("article.assistant:not([aria-busy])")
    last.nth(answers - 1).wait_for()
    return last.nth(answers - 1).locator(".text").inner_text()


def grown(page, characters):
    """Waits until an answer that still comes has so many characters; returns them."""
    growing = page.locator("article[aria-busy=true] .text", has_text=re.compile(f".{{{characters}}}"))
    return growing.text_content()


def letters(text):
    """What markdown has no part in."""
    return re.sub(r"[\W\d_]", "", text)


def set_settings(page, **values):
    page.click("#settings-button")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#settings-close")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def press_of_conversation(page, name, title):
    """The buttons of a conversation are seen where the pointer is."""
    page.locator("#conversations li", has_text=title).hover()
    press(page, f"{name} “{title}”")


def focused(page):
    return page.evaluate("document.activeElement.id")


def test_a_message_is_answered_as_a_stream_with_its_figures(open_page, site):
    page = open_page()
    page.wait_for_selector("#model:enabled")
    assert page.input_value("#model") == "smol"
    set_settings(page, temperature=0, max_tokens=200)
    page.evaluate(WATCH)
    send(page, "Write a story about a river.")
    text = finished(page)
    seen = [early for early in page.evaluate("window.seen") if early]
    assert len(seen) > 2
    assert letters(text).startswith(letters(seen[0])[:10])
    figures = page.locator("article.assistant .figures").inner_text()
    assert "first token" in figures
    assert "tokens/s" in figures
    assert "prompt" in figures
    messages = [{"role": "user", "content": "Write a story about a river."}]
    asked = {"messages": messages, "temperature": 0, "max_tokens": 200}
    same = httpx.post(f"{site}/v1/chat/completions", json=asked)
    assert letters(same.json()["choices"][0]["message"]["content"]) == letters(text)


def test_parameters_are_sent_as_they_are_set(open_page):
    page = open_page()
    answers(page, "Aye.")
    page.wait_for_selector("#model:enabled")
    page.click("#settings-button")
    page.click("#reset")
    page.click("#settings-close")
    set_settings(page, temperature="0.3", top_p="0.5", max_tokens=33, seed=7, system="Be brief.")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "Hello?")
    sent = request.value.post_data_json
    assert sent == {
        "model": "smol", "temperature": 0.3, "top_p": 0.5, "max_tokens": 33, "seed": 7, "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
    }  # fmt: skip
    finished(page)
    page.reload()
    assert page.input_value("#system") == "Be brief."
    set_settings(page, temperature="", top_p="", max_tokens="", seed="", system="")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "And now?")
    assert set(request.value.post_data_json) == {"model", "messages", "stream", "stream_options"}


def test_a_setting_out_of_its_range_is_told_before_anything_is_sent(open_page):
    page = open_page()
    set_settings(page, top_p=3)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    send(page, "Hello?")
    page.locator("#settings").wait_for(state="visible")
    assert page.input_value("#prompt") == "Hello?"
    assert asked == []


def test_escape_stops_an_answer_and_the_server_stops_too(open_page, site):
    page = open_page()
    set_settings(page, temperature=1, seed=1, max_tokens=900)
    send(page, "Write a very long story about a mill.")
    grown(page, 40)
    page.keyboard.press("Escape")
    text = finished(page)
    assert len(text) > 20
    assert "stopped" in page.locator("article.assistant .figures").inner_text()
    wait_until(lambda: httpx.get(f"{site}/dashboard/state").json()["models"][0]["running"] == 0)
    assert focused(page) == "prompt"


def test_an_answer_can_be_made_again_and_the_question_edited(open_page):
    page = open_page()
    answers(page, "First answer.")
    send(page, "Question?")
    assert finished(page) == "First answer."
    page.unroute("**/v1/chat/completions")
    answers(page, "Second ", "answer.")
    with page.expect_request("**/v1/chat/completions") as request:
        page.click("text=Regenerate")
    assert finished(page) == "Second answer."
    assert [m["content"] for m in request.value.post_data_json["messages"]] == ["Question?"]
    send(page, "More?")
    assert finished(page, 2) == "Second answer."
    assert page.locator("text=Regenerate").locator("visible=true").count() == 1
    page.keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == "More?"
    page.fill("#prompt", "Better?")
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    contents = [m["content"] for m in request.value.post_data_json["messages"]]
    assert contents == ["Question?", "Second answer.", "Better?"]
    finished(page, 2)
    assert page.locator("article.user .text").all_inner_texts() == ["Question?", "Better?"]


def test_editing_can_be_given_up(open_page):
    page = open_page()
    answers(page, "Yes.")
    send(page, "Question?")
    finished(page)
    page.click("text=Edit")
    assert page.locator("#editing").is_visible()
    page.keyboard.press("Escape")
    assert page.input_value("#prompt") == ""
    assert page.locator("#editing").is_hidden()


def test_attacks_are_text_in_questions_and_answers(open_page):
    page = open_page()
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    answers(page, ATTACK[:30], ATTACK[30:])
    send(page, ATTACK)
    assert finished(page) == ATTACK
    assert page.locator("article.user .text").inner_text() == ATTACK
    assert page.locator("#conversations .open").inner_text().startswith(ATTACK[:50])
    page.reload()
    assert finished(page) == ATTACK
    assert page.locator("#log img, #log script, #log a[href^=javascript], #list img").count() == 0
    assert dialogs == []


def test_keys_alone_are_enough(open_page):
    page = open_page()
    answers(page, "Fine.")
    page.wait_for_selector("#model:enabled")
    assert focused(page) == "prompt"
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    assert finished(page) == "Fine."
    assert page.locator("article.user .text").inner_text() == "Two\nlines"
    seen = []
    page.focus(".skip")
    for _ in range(30):
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert page.evaluate(OUTLINED), f"nobody sees that {seen[-1]} has the focus"
        if seen[-1] == "prompt":
            break
        page.keyboard.press("Tab")
    links = ["To the message box", "list-button", "kvarn", "Chat", "Dashboard"]
    wanted = [*links, "model", "settings-button", "theme", "new"]
    assert [name for name in seen if name in wanted] == wanted
    assert seen[-4:] == ["Edit", "Copy", "Regenerate", "prompt"]
    page.focus("#settings-button")
    page.keyboard.press("Enter")
    assert focused(page) == "system"
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    assert focused(page) == "settings-button"


def test_everything_that_can_be_used_has_a_name(open_page):
    page = open_page()
    answers(page, "```py\ncode\n```")
    send(page, "Code")
    finished(page)
    page.click("#settings-button")
    page.click("#key-button")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a, dialog, [role], [tabindex]")]
          .filter((node) => !node.ariaLabel && !node.labels?.length && !node.textContent.trim()
            && !["status", "alert"].includes(node.role))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []


def test_conversations_are_kept_exported_and_deleted(open_page):
    page = open_page()
    answers(page, "The answer.")
    for title in ("First talk", "Second talk"):
        send(page, title)
        finished(page)
        page.click("#new")
    titles = page.locator("#conversations .open")
    assert titles.all_inner_texts() == ["Second talk", "First talk"]
    titles.nth(1).click()
    page.reload()
    assert page.locator("article.user .text").inner_text() == "First talk"
    with page.expect_download() as download:
        press_of_conversation(page, "Export", "First talk")
    assert download.value.suggested_filename == "First-talk.json"
    with open(download.value.path()) as file:
        (kept,) = json.load(file)
    assert kept["messages"] == [
        {"role": "user", "content": "First talk"}, {"role": "assistant", "content": "The answer."}
    ]  # fmt: skip
    press_of_conversation(page, "Delete", "First talk")
    assert titles.all_inner_texts() == ["Second talk"]
    assert page.locator(".greeting").is_visible()
    page.click("text=Undo")
    assert titles.all_inner_texts() == ["Second talk", "First talk"]
    assert page.locator("article.user .text").inner_text() == "First talk"
    page.click("#delete-all")
    assert titles.count() == 0
    page.reload()
    assert titles.count() == 0


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(open_page):
    def guard(page):
        def answer(route):
            if route.request.headers.get("authorization") == "Bearer good-key":
                route.fallback()
            else:
                body = json.dumps({"error": {"message": "the API key is missing or wrong", "code": "invalid_api_key"}})
                route.fulfill(status=401, content_type="application/json", body=body)

        answers(page, "Welcome.")
        page.route("**/v1/**", answer)

    page = open_page(before=guard)
    page.locator("dialog input").fill("bad-key")
    page.keyboard.press("Enter")
    page.locator("dialog [role=alert]:not(:empty)").wait_for()
    page.locator("dialog input").fill("good-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model:enabled")
    send(page, "Hello?")
    assert finished(page) == "Welcome."
    assert page.evaluate("JSON.stringify(localStorage)").count("good-key") == 0
    page.reload()
    page.wait_for_selector("#model:enabled")
    page.click("#settings-button")
    page.click("#key-forget")
    page.click("#settings-close")
    send(page, "Again?")
    page.locator("dialog").get_by_text("Cancel").click()
    assert "missing or wrong" in page.locator("article.failure").inner_text()


@pytest.mark.parametrize(
    ("status", "message", "headers", "says"),
    [
        (429, "1024 requests wait (max_num_queued_requests)", {"Retry-After": "7"}, "Try again in 7 s."),
        (503, "the model is loading", {"Retry-After": "1"}, "Try again in 1 s."),
        (404, "the model 'x' is not served here", {}, "Choose another model"),
        (400, "the prompt is too long for max_model_len 1024", {}, "Start a new chat"),
        (500, "a step failed (error id 123)", {}, "the server's log"),
        (413, "the body is larger than 8 bytes", {}, "send less"),
    ],
)
def test_a_refusal_is_told_with_what_to_do_about_it(open_page, status, message, headers, says):
    page = open_page()
    refuses(page, status, message, headers=headers, times=1)
    send(page, "Hello?")
    told = page.locator("article.failure").inner_text()
    assert message[1:] in told
    assert says in told
    answers(page, "Now it works.")
    press(page, "Try again")
    assert finished(page) == "Now it works."
    assert page.locator("article.failure").count() == 0


def test_a_server_that_is_gone_is_told(open_page):
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Hello?")
    assert "connection to the server was lost" in page.locator("article.failure").inner_text()


def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came(open_page):
    page = open_page()
    body = 'data: {"choices": [{"delta": {"content": "Half an"}}]}\n\ndata: {"error": {"message": "a step failed"}}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1
    )
    send(page, "Hello?")
    assert "A step failed." in page.locator("article.failure").inner_text()
    assert page.locator("article.assistant .text").inner_text() == "Half an"
    answers(page, "A whole one.")
    press(page, "Try again")
    assert finished(page) == "A whole one."
    assert page.locator("article.assistant").count() == 1


def test_several_models_can_be_chosen_from(open_page):
    def two(page):
        models = [{"id": "small", "state": "loaded"}, {"id": "large", "state": "unloaded"}]
        page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
        answers(page, "Large.")

    page = open_page(before=two)
    page.wait_for_selector("#model:enabled")
    assert page.locator("#model option").all_inner_texts() == ["small", "large (unloaded)"]
    page.select_option("#model", "large")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "Hello?")
    assert request.value.post_data_json["model"] == "large"


def test_thinking_is_folded_away(open_page):
    page = open_page()
    body = (
        'data: {"choices": [{"delta": {"reasoning_content": "Hm, <b>."}}]}\n\n'
        'data: {"choices": [{"delta": {"content": "Four."}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    send(page, "2 + 2?")
    assert finished(page) == "Four."
    assert page.locator("details.thinking div").is_hidden()
    assert page.locator("details.thinking div").text_content() == "Hm, <b>."


def test_the_server_is_waited_for_while_its_model_loads(open_page):
    page = open_page(before=lambda page: refuses(page, 503, "the model is loading", path="**/v1/models"))
    page.get_by_text("loading …").wait_for(state="attached")
    page.unroute("**/v1/models")
    page.wait_for_selector("#model:enabled")


def test_a_phone_has_room_for_it(open_page):
    page = open_page(viewport={"width": 360, "height": 700})
    answers(page, "| a | b |\n|-|-|\n| " + "long " * 40 + "| y |\n\n```\n" + "x" * 300 + "\n```")
    send(page, "w" * 300)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")
    assert page.locator("#list").is_hidden()
    page.click("#list-button")
    assert page.locator("#new").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#list").is_hidden()
    for button in page.locator("header.bar > *").locator("visible=true").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
