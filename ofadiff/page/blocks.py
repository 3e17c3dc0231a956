"""The page itself, in Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.util import find_spec
from typing import Any

from ofadiff.page.captions import caption
from ofadiff.page.form import LARGEST_SEED, MOST_STEPS, Request
from ofadiff.page.playground import Picture, Playground
from ofadiff.profiling.timing import processor_name

# Drawings of all users and of all controls wait in one line.
ONE_LINE = {"concurrency_limit": 1, "concurrency_id": "drawing"}

# Pictures below so many pixels are shown as they are, pixel by pixel.
SMALL = 256

STYLE = """
.words .html-container { padding: 0 !important; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.picture.small img { image-rendering: pixelated; }
.caption table, .caption tr, .caption th, .caption td { width: auto; border: none !important; }
.caption th, .caption td { padding: 1px 16px 1px 0; text-align: left; font-weight: normal; }
.caption th { opacity: 0.65; }
.caption svg.steps { display: block; width: 100%; max-width: 420px; margin-top: 8px; }
"""


def check_gradio() -> None:
    """Raises ImportError if Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ImportError("the page is made with Gradio: pip install ofadiff[app]")


def make_page(playground: Playground, name: str) -> Any:
    """The page of a playground, as `gradio.Blocks`; nothing is sent to Gradio's makers.

    Args:
        playground: What it draws with.
        name: What the checkpoint is called.

    Raises:
        ImportError: If Gradio is not installed.
    """
    check_gradio()
    import gradio as gr

    form, choices = playground.form, list(playground.choices)
    with gr.Blocks(title=f"{name} at every size", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_heading(playground, name))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                prompt = gr.Textbox(label="Prompt", lines=2, visible=form.prompt, elem_id="prompt")
                labels = [(word, number) for number, word in form.classes.items()]
                label = gr.Dropdown(labels, value=min(form.classes, default=None), label="Class", visible=bool(labels))
                size = gr.Radio(choices, value=choices[0], label="Size", elem_id="size")
                seed = gr.Number(0, label="Seed", info=f"0 to {LARGEST_SEED}", precision=None)
                steps = gr.Number(
                    form.steps,
                    label="Steps",
                    info=f"1 to {MOST_STEPS}",
                    visible=form.steps is not None,
                    elem_id="steps",
                )
                guidance = gr.Number(form.guidance, label="Guidance scale", step=0.5, visible=form.guided)
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            original = _panel(gr, playground.original_title, "original")
            chosen = _panel(gr, "the chosen size", "chosen")
        # What the picture of the original was drawn for.
        drawn = gr.State(None)
        inputs = [prompt, label, seed, steps, guidance, size, drawn]
        outputs = [*original, *chosen, drawn]
        draw, redraw = _events(playground)
        shared = {"show_progress_on": [original[1], chosen[1]], **ONE_LINE}
        gr.on([button.click, prompt.submit], draw, inputs, outputs, api_name="draw", **shared)
        # The last choice counts, however fast they follow.
        size.input(redraw, inputs, outputs, api_name="redraw", trigger_mode="always_last", **shared)
    return page


def _heading(playground: Playground, name: str) -> str:
    pipeline = playground.pipeline
    subnets = pipeline.subnets
    model = type(pipeline.components[pipeline.denoiser_names[0]]).__name__
    dtype = str(pipeline.dtype).removeprefix("torch.")
    return (
        f"<h1>{escape(name)}</h1><p>{escape(model)} of {subnets.full_params / 1e6:,.2f} M parameters at "
        f"{len(subnets)} sizes, {escape(dtype)}, on {escape(processor_name(pipeline.device))}</p>"
    )


def _panel(gr: Any, title: str, name: str) -> tuple[Any, Any, Any]:
    """The place of a picture: what it is, the picture, what it took."""
    with gr.Column(scale=2, min_width=300):
        heading = gr.HTML(_title(title), elem_id=f"{name}-title", elem_classes=["words"])
        image = gr.Image(
            label=title,
            show_label=False,
            format="png",
            height=380,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=name,
            elem_classes=["picture"],
        )
        words = gr.HTML(elem_id=f"{name}-caption", elem_classes=["words"])
    return heading, image, words


def _title(words: str) -> str:
    return f'<b class="title">{escape(words)}</b>'


def _events(playground: Playground) -> tuple[Any, Any]:
    """What happens when everything is to be drawn, and when another size is chosen."""
    import gradio as gr

    sizes = playground.pipeline.sizes

    def shown(picture: Picture) -> tuple[str, Any, str]:
        small = max(picture.image.size) < SMALL
        image = gr.Image(picture.image, elem_classes=["picture", "small"] if small else ["picture"])
        return _title(picture.title), image, caption(picture, sizes)

    def asked(*fields: Any) -> Request:
        try:
            return playground.form.request(*fields)
        except ValueError as error:
            raise gr.Error(_sentence(error), print_exception=False) from None

    def both(request: Request, choice: str, drawn: Request | None) -> Iterator[tuple]:
        nothing = gr.skip(), gr.skip(), gr.skip()
        try:
            if request != drawn:
                yield *shown(playground.draw_original(request)), gr.skip(), None, "", request
            yield *nothing, *shown(playground.draw(request, choice)), request
        except Exception as error:  # whatever a pipeline raises: the page shows it and goes on
            raise gr.Error(_sentence(error)) from error

    def draw(
        prompt: Any, label: Any, seed: Any, steps: Any, guidance: Any, choice: str, drawn: Request | None
    ) -> Iterator[tuple]:
        yield from both(asked(prompt, label, seed, steps, guidance), choice, None)

    def redraw(
        prompt: Any, label: Any, seed: Any, steps: Any, guidance: Any, choice: str, drawn: Request | None
    ) -> Iterator[tuple]:
        if drawn is not None:  # before the first picture a choice is only a choice
            yield from both(asked(prompt, label, seed, steps, guidance), choice, drawn)

    return draw, redraw


def _sentence(error: Exception) -> str:
    """What an error says, escaped: a page shows messages as HTML."""
    words = " ".join(str(error).split())
    known = isinstance(error, ValueError)
    return escape(f"{words[:1].upper()}{words[1:]}" if known else f"{type(error).__name__}: {words}", quote=False)
