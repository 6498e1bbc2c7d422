"""The page as people use it: in a browser, by mouse and by keyboard, two at once, with odd files."""

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from browser import chromium
from explorers import small_explorer

from vitreg.app import serve
from vitreg.app.explorer import Explorer
from vitreg.data.images import demo_photos

# Closed, gradio leaves sockets and an event loop to the garbage collector, and its thread may fail.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
WAIT = 30_000  # ms, generous: other tests run beside this one


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    pytest.importorskip("gradio", reason="needs gradio. Install it with: pip install -e '.[app]'")
    return small_explorer(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    page = serve(explorer)
    yield page.local_url
    page.close()
    gc.collect()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class User:
    """Somebody with a browser window of their own; nothing outside of the server may be asked for."""

    def __init__(self, browser: Any, address: str, query: str = "", **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self._asked(request.url, address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.opened(address + query)

    def opened(self, address: str) -> None:
        """Go there, and wait until the view is drawn and its address is shown."""
        self.page.goto(address)
        self.page.wait_for_function("document.querySelector('#address textarea, #address input')?.value")

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.outside.append(url)

    def reads(self, selector: str, pattern: str) -> str:
        """What stands there, once it is like the pattern."""
        words = re.compile(pattern, re.DOTALL)
        self.page.wait_for_function(
            """([selector, pattern]) =>
                new RegExp(pattern, 's').test(document.querySelector(selector)?.innerText)""",
            arg=[selector, pattern],
        )
        found = words.search(self.page.inner_text(selector))
        assert found
        return found[0]

    def picture(self, name: str) -> str:
        """The address of a picture; another one whenever it is drawn anew."""
        return str(self.page.locator(f"#{name} img").first.get_attribute("src"))

    def clicks(self, name: str, x: float, y: float) -> None:
        """Click on a picture, at shares of its width and height, once all pictures have their places."""
        self.page.wait_for_function(
            "[...document.images].every(image => image.complete || !image.offsetParent)"
        )
        self.page.wait_for_timeout(300)
        picture = self.page.locator(f"#{name} img").first
        picture.wait_for(state="visible")
        box = picture.bounding_box()
        assert box
        picture.click(position={"x": box["width"] * x, "y": box["height"] * y})

    def redraws(self, name: str, before: str) -> None:
        self.page.wait_for_function(f"document.querySelector('#{name} img').src != {before!r}")

    def opens(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def close(self) -> None:
        self.context.close()
        assert self.outside == []
        assert self.errors == []


@pytest.fixture
def user(browser: Any, address: str) -> Iterator[User]:
    someone = User(browser, address)
    yield someone
    someone.close()


def most_outliers(explorer: Explorer) -> int:
    return int(np.argmax([explorer.outliers(photo).sum() for photo in explorer.gallery]))


# -- norms -----------------------------------------------------------------------------------------


def test_moving_the_threshold_changes_the_count(user: User, explorer: Explorer) -> None:
    layer = explorer.report.detect_layer
    norms = explorer.look(explorer.gallery[0]).norms[layer]
    user.reads("#norms-text", rf"{explorer.outliers(explorer.gallery[0]).sum()} of 20 patches")
    median, before = round(float(np.median(norms)), 3), user.picture("norms-photo")
    user.page.locator("#threshold input").fill(str(median))
    user.reads("#norms-text", rf"{(norms >= median).sum()} of 20 patches .* norms of")
    user.redraws("norms-photo", before)
    slider = user.page.locator("#drag input[type=range]")
    slider.focus()
    slider.press("End")  # by keyboard, to the largest norm of all images
    user.reads("#norms-text", "0 of 20 patches")
    assert "threshold=" in user.page.url
    user.page.locator("#automatic").click()
    user.reads("#norms-text", rf"{explorer.outliers(explorer.gallery[0]).sum()} of 20 patches")


def test_a_layer_and_a_photo_can_be_chosen(user: User, explorer: Explorer) -> None:
    user.reads("#norms-text", "of 20 patches")
    user.page.locator("#layer input[type=number]").fill("0")
    user.reads("#norms-text", "no second population")
    user.page.locator("#layer input[type=number]").fill(str(explorer.report.detect_layer))
    some = most_outliers(explorer)
    count = explorer.outliers(explorer.gallery[some]).sum()
    assert count > 0
    user.page.locator("#gallery button.thumbnail-item, #gallery .thumbnail-lg").nth(some).click()
    user.reads("#norms-text", rf"{count} of 20 patches")
    user.page.wait_for_url(re.compile(f"photo={some}(&|$)"))


# -- attention -------------------------------------------------------------------------------------


def test_attention_before_and_after_and_from_a_clicked_patch(user: User, explorer: Explorer) -> None:
    user.opens("Attention")
    user.reads("#attention-text", r"in block 2: before .*%, after .*%")
    first = user.picture("attention-maps")
    user.clicks("attention-photo", 4.5 / 5, 2.5 / 4)
    user.page.wait_for_url(re.compile("source=patch&row=2&column=4"))
    user.redraws("attention-maps", first)
    user.page.locator("#row input").fill("0")  # the same by keyboard
    user.page.wait_for_url(re.compile("row=0&column=4"))
    user.page.get_by_label("register 0").check()
    user.reads("#attention-text", r"in block 2: after .*%")


# -- features --------------------------------------------------------------------------------------


def test_features_before_and_after_and_likeness_to_a_clicked_patch(user: User) -> None:
    user.opens("Features")
    user.reads("#features-text", "row 2, column 2: the cosine")
    colours, alike = user.picture("features-colours"), user.picture("features-alike")
    assert colours
    user.clicks("features-photo", 4.5 / 5, 0.5 / 4)
    user.page.wait_for_url(re.compile("tab=features.*like_row=0&like_column=4"))
    user.reads("#features-text", "row 0, column 4: the cosine")
    user.redraws("features-alike", alike)


# -- neurons ---------------------------------------------------------------------------------------


def test_switching_neurons_changes_norms_attention_and_prediction(user: User, explorer: Explorer) -> None:
    some = most_outliers(explorer)
    user.opened(user.page.url.split("?")[0] + f"?tab=neurons&photo={some}")
    user.reads("#neurons-text", r"Largest patch norm after block \d+: .*, switched")
    norms, attention = user.picture("neurons-norms"), user.picture("neurons-attention")
    on = user.page.locator("#neurons input[type=checkbox]:checked")
    while on.count():
        on.first.uncheck()
    user.page.wait_for_url(re.compile("neurons=&"))
    user.reads("#neurons-text", r"block \d+: (\S+), switched \1\. ")  # as without the switch, in the end
    user.redraws("neurons-norms", norms)
    user.redraws("neurons-attention", attention)


def test_the_sink_goes_where_one_clicks(user: User, explorer: Explorer) -> None:
    some = most_outliers(explorer)
    user.opened(user.page.url.split("?")[0] + f"?tab=neurons&photo={some}")
    user.reads("#neurons-text", "switched")
    user.clicks("neurons-photo", 0.5 / 5, 3.5 / 4)
    user.page.wait_for_url(re.compile("does=fire.*to_row=3&to_column=0"))
    with user.page.expect_download() as download:
        user.page.locator("#neurons-data").click()
    data = json.loads(Path(download.value.path()).read_text())
    assert np.argmax(data["norms"]["switched"]) == 3 * 5
    assert len(data["activation"]) == 4


# -- objects, comparison ---------------------------------------------------------------------------


def test_objects_and_the_comparison(user: User, explorer: Explorer) -> None:
    user.opens("Objects")
    user.reads("#objects-text", "One box around the object")
    assert user.picture("objects-boxes")
    user.opens("Compare")
    user.reads("#compare-text", "four controls")
    user.page.locator("#measure").click()
    user.reads("#compare-text", "The fix: (helps|harms|no effect)")
    user.reads("#compare-table", "outlier")
    with user.page.expect_download() as download:
        user.page.locator("#compare-data").click()
    data = json.loads(Path(download.value.path()).read_text())
    assert data["verdict"]["verdict"] == explorer.verdict().verdict


# -- photos of one's own ---------------------------------------------------------------------------


def test_a_photo_of_ones_own_and_a_bad_file(user: User, tmp_path: Path) -> None:
    user.reads("#norms-text", "of 20 patches")
    before = user.picture("norms-photo")
    (tmp_path / "holiday <b>.jpg").write_text("this is no photo")
    user.page.locator("#upload input[type=file]").set_input_files(tmp_path / "holiday <b>.jpg")
    user.reads("#message", "holiday.*cannot be shown: not an image")
    user.page.locator("#upload input[type=file]").set_input_files(demo_photos()[2])
    user.reads("#message", f"{demo_photos()[2].name} is shown")
    user.redraws("norms-photo", before)
    user.page.wait_for_url(lambda url: "photo=" not in url)


def test_a_pasted_photo(user: User, tmp_path: Path) -> None:
    user.reads("#norms-text", "of 20 patches")
    PIL.Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    user.page.evaluate(
        """bytes => {
          const handed = new DataTransfer();
          handed.items.add(new File([new Uint8Array(bytes)], 'pasted.png', { type: 'image/png' }));
          document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: handed, bubbles: true }));
        }""",
        list((tmp_path / "a.png").read_bytes()),
    )
    user.reads("#message", "pasted.png is shown")


# -- several users, addresses, looks ---------------------------------------------------------------


def test_two_users_do_not_see_each_other(
    browser: Any, address: str, explorer: Explorer, tmp_path: Path
) -> None:
    one, two = User(browser, address, "?tab=norms&layer=0"), User(browser, address, "?tab=attention&photo=3")
    one.reads("#norms-text", "no second population")
    two.reads("#attention-text", "in block 2")
    picture = two.picture("attention-photo")
    one.page.locator("#upload input[type=file]").set_input_files(demo_photos()[1])
    one.reads("#message", "is shown")
    one.opens("Attention")
    one.page.locator("#block input[type=number]").fill("1")
    one.reads("#attention-text", "in block 1")
    two.page.wait_for_timeout(500)
    assert "in block 2" in two.page.inner_text("#attention-text")
    assert two.picture("attention-photo") == picture
    assert two.page.inner_text("#message") == ""
    assert "photo=3" in two.page.url
    one.close()
    two.close()


def test_an_address_shows_the_same_view_to_others(browser: Any, address: str, user: User) -> None:
    user.opens("Attention")
    user.reads("#attention-text", "in block 2")
    user.page.locator("#block input[type=number]").fill("1")
    user.reads("#attention-text", "in block 1")
    user.page.wait_for_url(re.compile("block=1"))
    text = user.page.inner_text("#attention-text")
    other = User(browser, "", user.page.url)
    other.outside.clear()
    other.reads("#attention-text", re.escape(text.strip()))
    assert other.page.locator("#block input[type=number]").input_value() == "1"
    other.context.close()


@pytest.mark.parametrize(
    "query", ["?tab=<script>&photo=99&layer=-4&threshold=nan&head=77", "?tab=neurons&neurons=99:99,x"]
)
def test_an_odd_address_shows_a_page(browser: Any, address: str, query: str) -> None:
    someone = User(browser, address, query)
    someone.reads("#neurons-text" if "neurons" in query else "#norms-text", "patch")
    someone.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, address: str, scheme: str) -> None:
    someone = User(browser, address, viewport={"width": 375, "height": 800}, color_scheme=scheme)
    someone.reads("#norms-text", "of 20 patches")
    assert someone.page.evaluate("document.documentElement.scrollWidth") <= 375
    someone.close()


def test_tabs_and_controls_are_reached_by_keyboard(user: User) -> None:
    user.reads("#norms-text", "of 20 patches")
    user.page.get_by_role("tab", name="Norms").focus()
    user.page.keyboard.press("Tab")
    user.page.keyboard.press("Enter")
    user.reads("#attention-text", "in block 2")
    reached = set()
    for _ in range(40):
        user.page.keyboard.press("Tab")
        reached.add(
            user.page.evaluate(
                "document.activeElement.closest('[id]')?.closest('#source, #row, #column, #block, #head')?.id"
            )
        )
    assert {"source", "row", "column", "block", "head"} <= reached
