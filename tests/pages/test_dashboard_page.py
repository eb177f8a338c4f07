"""The dashboard: its numbers move under load and go back to zero, and what follows from them is computed rightly."""

import concurrent.futures
import json
import re
import threading

import httpx
import pytest

pytestmark = pytest.mark.e2e

PROMPT = "Write a long story about a mill and its miller. "


@pytest.fixture
def load(site):
    """Six clients that ask until the test ends; call it to end them before."""
    ended = threading.Event()

    def client(number):
        body = {"messages": [{"role": "user", "content": PROMPT * 3 + str(number)}], "max_tokens": 60}
        while not ended.is_set():
            assert httpx.post(f"{site}/v1/chat/completions", json=body, timeout=60).status_code == 200

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, number) for number in range(6)]

        def end():
            ended.set()
            for done in clients:
                done.result(60)

        yield end
        end()


def positive(page, name):
    page.locator(f"#{name}", has_text=re.compile(r"[1-9]")).wait_for()


def test_numbers_move_under_load_and_return_to_zero(open_page, load):
    page = open_page("/dashboard")
    page.get_by_text("Live").wait_for()
    for name in ("running", "generated", "prompts", "cache", "hits"):
        positive(page, name)
    for row in ("First token", "Between tokens", "Whole answer", "In the queue"):
        page.get_by_role("row", name=row).get_by_text(re.compile(r"^[\d.]+ m?s$")).nth(2).wait_for()
    everybody = page.get_by_role("row", name="everybody")
    everybody.get_by_text(re.compile(r"^[1-9][\d,]*$")).first.wait_for()
    page.locator("#chart-generated path.line[d*=L]").wait_for(state="attached")
    assert "Generated tokens a second, last" in page.locator("#chart-generated svg").get_attribute("aria-label")
    load()
    for name in ("running", "waiting", "generated", "prompts"):
        page.locator(f"#{name}").get_by_text(re.compile("^0$")).or_(
            page.locator(f"#{name}:text-is('0')")
        ).first.wait_for()
    page.locator("#cache:text-is('0 %')").wait_for()
    assert everybody.get_by_role("cell").first.inner_text() == "0"


def test_it_can_be_paused_and_goes_on(open_page):
    page = open_page("/dashboard")
    page.get_by_text("Live").wait_for()
    page.get_by_role("button", name="Pause").click()
    asked = []
    page.wait_for_timeout(200)
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert asked == []
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("Live").wait_for()
    assert asked


def test_a_server_that_is_gone_is_told_and_found_again(open_page):
    page = open_page("/dashboard")
    page.route("**/dashboard/state", lambda route: route.abort())
    page.get_by_text("connection to the server was lost").wait_for()
    page.unroute("**/dashboard/state")
    page.get_by_text("Live").wait_for()
    assert page.locator("#notice").is_hidden()


def test_several_models_and_keys_are_shown(open_page, site):
    state = httpx.get(f"{site}/dashboard/state").json()
    model = {**state["models"][0], "running": 3, "rejections": {"queued_requests": 2, "ttft_slo": 0}}
    model["counters"] = {**model["counters"], "draft_tokens": 8}
    other = {**model, "name": "<b>other</b>", "state": "unloaded", "running": 0}
    tenants = [{"name": "<i>ann</i>", "answering": 2, "waiting": 1, "tokens": 1234}]
    body = json.dumps({**state, "models": [model, other], "tenants": tenants})

    def made_up(page):
        page.route("**/dashboard/state", lambda route: route.fulfill(content_type="application/json", body=body))

    page = open_page("/dashboard", before=made_up)
    page.get_by_text("Live").wait_for()
    assert page.locator("#running").inner_text() == "3"
    rows = page.locator("#models tbody tr")
    assert rows.nth(1).locator("th, td").all_inner_texts() == ["<b>other</b>", "unloaded", "0", "0", "–", "–"]
    assert page.locator("#tenants tbody tr").locator("th, td").all_inner_texts()[:4] == [
        "<i>ann</i>",
        "2",
        "1",
        "1,234",
    ]
    trouble = page.locator("#trouble tbody th").all_inner_texts()
    assert trouble == ["Preempted", "Failed steps", "Refused", "… queue full"]
    assert page.locator("#guesses").is_visible()
    page.select_option("#model", "<b>other</b>")
    page.locator("#title", has_text="<b>other</b> (unloaded)").wait_for()
    assert page.locator("#running").inner_text() == "0"


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_on_any_screen(open_page, width):
    page = open_page("/dashboard", viewport={"width": width, "height": 800})
    page.get_by_text("Live").wait_for()
    assert page.evaluate("document.querySelector('main').scrollWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.fixture
def history(open_page):
    """`history(samples, method, …)`: what a History says after samples of [time, counters, counts of a histogram]."""
    page = open_page("/dashboard")
    script = """async ([samples, method, ...arguments_]) => {
      const { History } = await import("/static/history.js");
      const history = new History();
      for (const [time, counters, counts] of samples) {
        const histograms = { itl: { bounds: [1, 2, 4], counts } };
        history.add(time, { counters: { steps: time, ...counters }, histograms });
      }
      return history[method](...arguments_);
    }"""
    return lambda samples, *call: page.evaluate(script, [samples, *call])


NONE = [0, 0, 0, 0]


def test_rates_are_of_the_last_seconds(history):
    samples = [[t, {"n": n}, NONE] for t, n in ((0, 0), (1, 0), (2, 30), (3, 60), (4, 90))]
    assert history(samples, "rate", "n") == 30
    assert history(samples, "rateLine", "n") == [[4, None], [3, 0], [2, 30], [1, 30], [0, 30]]
    assert history(samples[:1], "rate", "n") is None


def test_shares_are_of_what_was_counted_in_a_minute(history):
    samples = [[t, {"a": t, "b": 2 * t if t < 100 else 200}, NONE] for t in (0, 50, 100)]
    assert history(samples, "share", "a", "b") == pytest.approx(0.5)
    assert history([[0, {"a": 5, "b": 5}, NONE], [1, {"a": 5, "b": 5}, NONE]], "share", "a", "b") is None


def test_percentiles_are_of_the_time_asked_for(history):
    samples = [[0, {}, [100, 0, 0, 0]], [30, {}, [100, 10, 0, 0]], [90, {}, [100, 10, 10, 0]]]
    assert history(samples, "percentiles", "itl", [0.5, 1], 60) == [3, 4]
    assert history(samples, "percentiles", "itl", [0.5], 300) == [2]
    assert history(samples, "percentiles", "itl", [0.5], 0) == [0.6]
    assert history(samples[:1], "percentiles", "itl", [0.5], 60) == [None]
    above = [[0, {}, NONE], [1, {}, [0, 0, 0, 3]]]
    assert history(above, "percentiles", "itl", [0.5], 60) == [4]


def test_a_server_that_began_anew_has_a_new_history(history):
    samples = [[100, {"n": 50}, NONE], [101, {"n": 60}, NONE], [3, {"n": 5}, NONE], [4, {"n": 7}, NONE]]
    assert history(samples, "rateLine", "n") == [[1, None], [0, 2]]


def test_five_minutes_are_kept(history):
    samples = [[t, {"n": t}, NONE] for t in range(0, 1000, 10)]
    line = history(samples, "rateLine", "n")
    assert len(line) == 31
    assert line[0][0] == 300
