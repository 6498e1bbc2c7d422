"""A browser for pages that are to be used: Debian's chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WHAT_IS_MISSING = "needs {}. Install it with: {}"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Skips the test, and says what to install, where there is none."""
    api = pytest.importorskip(
        "playwright.sync_api", reason=WHAT_IS_MISSING.format("playwright", "pip install -e '.[dev]'")
    )
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip(WHAT_IS_MISSING.format("a chromium", "apt-get install chromium"))
    with api.sync_playwright() as playwright:
        # Containers often run as root, where chromium refuses its sandbox.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page opened from disk without a network, and all that it asked for or complained of."""

    def __init__(self, browser: Any, path: Path, address: str = "", **options: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(**options)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri() + address)

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(selector).inner_text().split())

    def set(self, selector: str, value: float) -> None:
        """Set a slider as a drag does."""
        self.page.locator(selector).evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
        )

    def close(self) -> None:
        self.context.close()
        outside = [url for url in self.requests if not url.startswith(("file:", "data:"))]
        assert not outside
        assert not self.complaints
