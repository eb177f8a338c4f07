"""The pages in a real browser: headless Chromium, driven by playwright, against `kvarn serve` with the real SmolLM2."""

import os
import re
import shutil
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest

CHROMIUM = os.environ.get("KVARN_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def site(smollm2_path):
    """The URL of a running server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvarn", "serve", str(smollm2_path), "--port", "0", "--max-num-seqs", "8",
         "--max-model-len", "1024", "--kv-cache-bytes", "100MiB", "--served-model-name", "smol", "--no-commit-memory"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    found = next(filter(None, (re.match(r"http://[\d.]+:\d+", line) for line in process.stdout)), None)
    if found is None:
        pytest.fail("the server ended without listening")
    yield found.group()
    process.kill()
    watchdog.cancel()
    process.wait()


@pytest.fixture(scope="module")
def chromium():
    """The browser. Not for the whole session: while playwright runs, this thread can run no other event loop."""
    missing = "playwright is not installed: pip install 'kvarn[dev]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=missing)
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or KVARN_CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, site):
    """`open_page(path, **options of the browser's context)`: a page in a profile of its own, as a new visitor has it.

    In the end no page may have asked anybody but the server, nor have complained on its console, but for answers with
    an error, which browsers write there themselves.
    """
    contexts, elsewhere, complaints = [], [], []

    def heard(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    def asked(request):
        if urlsplit(request.url).scheme not in ("data", "blob") and not request.url.startswith(f"{site}/"):
            elsewhere.append(request.url)

    def opened(path="/", *, before=lambda page: None, **options):
        """before: what to do with the page before it loads."""
        context = chromium.new_context(base_url=site, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.on("console", heard)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("request", asked)
        page = context.new_page()
        before(page)
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert complaints == []
