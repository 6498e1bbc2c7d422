"""From a model's name to a page that is served."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreg.app.explorer import Explorer
from vitreg.data.images import demo_photos, read_images
from vitreg.data.photo_sources import Source
from vitreg.errors import MissingExtraError, OutputError
from vitreg.fixes import load_fix
from vitreg.models.backbone import Backbone
from vitreg.models.loading import load
from vitreg.phantoms.bundled import planted_example

if TYPE_CHECKING:
    from vitreg.fixes import Fix

IMAGES = 64  # that are diagnosed, and that a fix is made from
UPLOAD = "20mb"


def launch(
    model: str | Backbone | None = None,
    *,
    images: Source | None = None,
    fix: "str | Path | Fix | None" = None,
    limit: int = IMAGES,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Open the explorer and serve it until interrupted.

    `model`: a name as `vitreg.load` takes it (with its `options`), a Backbone, or None for the bundled
    example, whose artifacts are planted. `images`: by default the bundled photos. `fix`: a saved one; without
    it, one is made. `host`: 127.0.0.1, unless GRADIO_SERVER_NAME says otherwise. `port`: by default the first
    free one from 7860 on. `ready` is told the address.

    Raises what `load`, `read_images` and `load_fix` raise, MissingExtraError without gradio, OutputError for
    a port that is taken.
    """
    _require_gradio()  # before a model is loaded for nothing
    explorer = example_explorer() if model is None else explorer_of(model, images, fix, limit, **options)
    app = serve(explorer, host=host, port=port, open_browser=open_browser)
    if ready:
        ready(app.local_url)
    app.block_thread()


def example_explorer() -> Explorer:
    """The demo's: the bundled ViT with planted artifacts, and drawn photos."""
    _, phantom, photos = planted_example()
    return Explorer(phantom.vit, photos)


def explorer_of(
    model: str | Backbone,
    images: Source | None = None,
    fix: "str | Path | Fix | None" = None,
    limit: int = IMAGES,
    **options: Any,
) -> Explorer:
    """The explorer of a model, ready to look with; its fix is not made yet (`Explorer.prepare`)."""
    vit = load(model, **options) if isinstance(model, str) else model
    photos = read_images(demo_photos() if images is None else images, vit, limit=limit)
    found = load_fix(fix) if isinstance(fix, str | Path) else fix
    if found is not None:
        found.check(vit)
    return Explorer(vit, photos, found)


def serve(
    explorer: Explorer, *, host: str | None = None, port: int | None = None, open_browser: bool = False
) -> Any:
    """Serve the explorer and make its fix, in threads of their own. Returns gradio.Blocks, to `.close()`."""
    from vitreg.app.page import LAUNCH, build

    page = build(explorer)
    try:
        page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, max_file_size=UPLOAD, quiet=True,
            prevent_thread_lock=True, show_error=True, share=False, **LAUNCH,
        )  # fmt: skip
    except OSError as error:
        raise OutputError(f"the page cannot be served: {error}") from error
    threading.Thread(target=explorer.prepare, name="vitreg: making the fix", daemon=True).start()
    return page


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gradio", "app") from error
