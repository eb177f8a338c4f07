"""Screenshots of the two pages, with a real model and real load, into this folder.

    python docs/screenshots.py [MODEL] [--seconds 75]

Starts a server of its own with three keys on a free port of the loopback interface, has clients ask it for a while, and
shows both pages in headless Chromium, dark and light, wide and narrow: chat-light.png, chat-dark-narrow.png, …
Needs `pip install 'kvarn[dev]'` and a Chromium.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "bench"))
from serving import served  # noqa: E402

KEYS = {"KEY-OF-ANN": 5, "KEY-OF-BOB": 3, "KEY-OF-CLEO": 1}
"""Each with its clients."""
OPTIONS = ("--max-num-seqs", "8", "--max-model-len", "2048", "--kv-cache-bytes", "160MiB", "--policy", "fair",
           "--speculative", "method=ngram,k=2", "--max-num-queued-requests", "4")  # fmt: skip
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
LOOKS = (("light", WIDE, ""), ("dark", WIDE, ""), ("light", NARROW, "-narrow"), ("dark", NARROW, "-narrow"))
CHROMIUM = os.environ.get("KVARN_CHROMIUM") or shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
QUESTIONS = ("Write a Python function that reverses a list, with an example.", "List three kinds of mills.")
TOPICS = ("rivers", "bread", "sorting", "the moon", "violins", "glaciers", "bees", "steam engines", "chess")
HEIGHT = "document.querySelector('main').scrollHeight + document.querySelector('.bar').clientHeight"
MAX_BYTES = 300_000


def main() -> None:
    """Takes them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=75, help="of load, which the dashboard's charts show")
    arguments = parser.parse_args()
    keys = [part for key in KEYS for part in ("--api-key", key)]
    with served(arguments.model, *OPTIONS, *keys) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for scheme, size, suffix in LOOKS:
            chat(browser, server.url, scheme, size, f"chat-{scheme}{suffix}.png")
        with load(server.url):
            dashboards(browser, server.url, arguments.seconds)
        browser.close()


def opened(browser: Browser, url: str, scheme: Any, size: Any) -> Page:
    """A page of a visitor who has a key."""
    page = browser.new_context(color_scheme=scheme, viewport=size).new_page()
    key = next(iter(KEYS))
    page.add_init_script(f"sessionStorage.setItem('kvarn.key', '{key}')")
    page.goto(url)
    return page


def chat(browser: Browser, url: str, scheme: str, size: dict[str, int], name: str) -> None:
    """A conversation."""
    page = opened(browser, url, scheme, size)
    page.wait_for_selector("#model:enabled")
    settings = '{"temperature": "0.2", "top_p": "0.95", "max_tokens": "300", "seed": "4", "system": ""}'
    page.evaluate("(text) => localStorage.setItem('kvarn.settings', text)", settings)
    page.reload()
    for question in QUESTIONS:
        page.click("#new") if page.locator("#new").is_visible() else page.goto(url)
        page.wait_for_selector("#model:enabled")
        page.fill("#prompt", question)
        page.keyboard.press("Enter")
        page.get_by_text("Regenerate").wait_for(timeout=60_000)
    if page.locator("#list").is_visible():
        page.locator("#conversations .open").nth(1).click()
        page.click("#settings-button")
        page.click("#log", position={"x": 5, "y": 5})
    page.evaluate("document.querySelector('#log').scrollTop = 0")
    taken(page, name)


def dashboards(browser: Browser, url: str, seconds: float) -> None:
    """The dashboard in all looks, each of which has watched for so long."""
    pages = [(opened(browser, f"{url}/dashboard", *look[:2]), look) for look in LOOKS]
    time.sleep(seconds)
    for page, (scheme, size, suffix) in pages:
        page.set_viewport_size({"width": size["width"], "height": page.evaluate(HEIGHT)})
        taken(page, f"dashboard-{scheme}{suffix}.png")


def taken(page: Page, name: str) -> None:
    """Writes a picture. Raises SystemExit where it is too large for the repository."""
    path = HERE / name
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path}  {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{name} has {size} bytes, more than {MAX_BYTES}")


@contextmanager
def load(url: str) -> Iterator[None]:
    """Clients that ask, until the context ends. More come and go, so that the charts have something to show."""
    ended = threading.Event()
    clients = [key for key, number in KEYS.items() for _ in range(number)]
    threads = [threading.Thread(target=client, args=(url, key, number, ended)) for number, key in enumerate(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def client(url: str, key: str, number: int, ended: threading.Event) -> None:
    """One client: asks of what it likes, in bursts. A refusal is waited out."""
    chance = random.Random(number)
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
        while not ended.is_set():
            for _ in range(chance.randrange(1, 6)):
                topic = chance.choice(TOPICS)
                prompt = f"Tell me about {topic}. " + "Repeat what matters most at the end. " * chance.randrange(8)
                body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": chance.randrange(20, 160)}
                if http.post("/v1/chat/completions", json=body).status_code == 429:
                    ended.wait(1)
            ended.wait(chance.uniform(0, 4))


if __name__ == "__main__":
    main()
