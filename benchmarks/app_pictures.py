"""The pictures of docs/app.md and the README: the explorer's views in a real browser.

    python benchmarks/app_pictures.py MODEL docs/

Writes docs/app.png and docs/app/*.png. Needs playwright and a chromium.
"""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from vitreg.app import explorer_of, serve

WIDTH = 1180
VIEWS = {
    "app/norms.png": "?tab=norms&photo=2",
    "app/attention.png": "?tab=attention&photo=0&source=patch&row=3&column=5&block=10",
    "app/features.png": "?tab=features&photo=0&like_row=4&like_column=7",
    "app.png": "?tab=neurons&photo=2",
    "app/neurons.png": "?tab=neurons&photo=2&does=fire+at+the+chosen+patch&to_row=6&to_column=7",
    "app/objects.png": "?tab=objects&photo=2",
    "app/compare.png": "?tab=compare",
}


def main(model: str, out: Path) -> None:
    (out / "app").mkdir(exist_ok=True)
    explorer = explorer_of(model)
    page = serve(explorer)
    while not explorer.ready:
        time.sleep(0.5)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": WIDTH, "height": 700}, color_scheme="light")
        for name, address in VIEWS.items():
            window.goto(page.local_url + address)
            settle(window, "compare" in address)
            window.screenshot(path=out / name, full_page=True)
            print(out / name)
        browser.close()
    page.close()


def settle(window: Page, measure: bool) -> None:
    """Wait until the view is drawn."""
    if measure:
        window.locator("#measure").click(timeout=60_000)
        window.wait_for_function("document.querySelector('#compare-figure img')", timeout=600_000)
    window.wait_for_function("document.querySelector('#address textarea, #address input')?.value")
    window.wait_for_timeout(3000)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
