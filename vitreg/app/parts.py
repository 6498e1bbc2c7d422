"""The page's small parts: a picture, a slider of layers, a number, a button for data."""

from typing import Any

import gradio as gr

from vitreg.app.explorer import Explorer


def image(label: str, name: str, scale: int = 1) -> Any:
    """A picture, which has its title in it, or its label as a caption over it if it is a photo."""
    with gr.Column(scale=scale, min_width=240, elem_classes="picture"):
        if name.endswith("photo"):
            gr.Markdown(label)
        return gr.Image(
            label=label, show_label=False, format="png", type="pil", interactive=False,
            buttons=["download", "fullscreen"], elem_id=name, alt_text=label,
        )  # fmt: skip


def layer(explorer: Explorer, label: str, name: str) -> Any:
    last = explorer.vit.anatomy.depth - 1
    return gr.Slider(0, last, step=1, buttons=[], label=f"{label} (0 to {last})", elem_id=name, scale=2)


def index(label: str, count: int, name: str) -> Any:
    return gr.Number(
        label=label, minimum=0, maximum=count - 1, step=1, precision=0, elem_id=name, min_width=90
    )


def data_button(name: str) -> tuple[Any, Any]:
    button = gr.Button("Data of this view (JSON)", size="sm", elem_id=f"{name}-data")
    return button, gr.DownloadButton("Download", visible="hidden", elem_id=f"{name}-file")
