"""The page's widgets: laid out, and wired to `qalign.page.actions`. Only Gradio here; what is done is elsewhere."""

import os
from html import escape
from pathlib import Path

import gradio as gr

from qalign.data.formats import Message
from qalign.page.actions import MAX_COMMENT, Page, View, Wish
from qalign.page.chat import MAX_CHARACTERS, Controls
from qalign.page.session import Session
from qalign.page.votes import Choice

EXAMPLES = 6
SETTINGS = ("first", "second", "blind", "colours", "temperature", "top_p", "tokens", "seed", "system")
SHOWN = (  # what a `View` fills, in the order of `updates`
    *("left", "right", "left_figures", "right_figures", "status", "prompt", "tally", "differences"),
    *("ballot", "send", "stop"),
)
NO_RUN = """\
# There is no run yet

Train one, then start `python app.py` again. The demo takes about five minutes on two CPU cores and needs no download:

    python -m qalign.sft recipes/smollm2_demo.yaml
    python -m qalign.dpo recipes/smollm2_demo.yaml

or `make demo`. With a recipe of your own: `python -m qalign RECIPE`. To try a base without an adapter:
`python app.py --recipe RECIPE`.
"""
CSS = """
.gradio-container { max-width: 1240px !important; }
.figures { min-height: 1.4em; opacity: .75; font-size: var(--text-sm); }
.status:not(:empty) p { padding: .5em .8em; border-left: 3px solid var(--color-accent); margin: 0; }
.shade { border-radius: 3px; padding: 1px 0; white-space: pre-wrap; }
.legend .shade { padding: 1px 6px; margin: 0 2px; }
.shaded { line-height: 1.9; overflow-wrap: anywhere; }
.message { overflow-wrap: anywhere; }
.message-content span { white-space: pre-wrap !important; }
@media (max-width: 640px) { #left, #right { height: 290px !important; } }
.off-screen { position: absolute; left: -9999px; }
footer { display: none !important; }
"""


def theme():
    """The system's own fonts: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    )


def build(page: Page | None, sides: tuple[str, str]) -> gr.Blocks:
    """The page as Gradio blocks.

    Args:
        page: a `qalign.page.actions.Page`; None where there is no run.
        sides: the contenders that it begins with.
    """
    with gr.Blocks(title="qalign", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        if page is None:
            gr.Markdown(NO_RUN)
            return blocks
        wire(blocks, page, lay_out(page, sides) | lay_out_more(page.chat.max_new_tokens), sides)
    return blocks


def lay_out(page: Page, sides: tuple[str, str]) -> dict:
    """The widgets for answers and questions, by name."""
    w, names = {}, page.names()
    gr.Markdown("# qalign: which answer is better?")
    with gr.Row():
        w["first"] = gr.Dropdown(names, value=sides[0], label="One side", min_width=140)
        w["second"] = gr.Dropdown(names, value=sides[1], label="Other side", min_width=140)
    w["blind"] = gr.Checkbox(label="Blind test: sides shuffled and unnamed until you vote", elem_id="blind")
    with gr.Row():
        for side, title in zip(("left", "right"), sides, strict=True):
            with gr.Column(min_width=300):
                w[side] = gr.Chatbot(
                    label=title, elem_id=side, height=380, layout="bubble", buttons=[], feedback_options=None,
                    # An answer is shown as the text that it is: no image of it is fetched, no tag is obeyed.
                    render_markdown=False, sanitize_html=True, allow_tags=False,
                )  # fmt: skip
                w[f"{side}_figures"] = gr.Markdown(
                    elem_classes="figures", elem_id=f"{side}-figures", sanitize_html=True
                )
    with gr.Group(visible=False) as w["ballot"]:
        with gr.Row():
            for choice, label in zip(Choice, ("A is better", "B is better", "Tie", "Both bad"), strict=True):
                w[choice] = gr.Button(label, elem_id=f"vote-{choice}", min_width=80)
        w["comment"] = gr.Textbox(label="Comment (optional)", max_lines=3, max_length=MAX_COMMENT, elem_id="comment")
    w["status"] = gr.HTML(elem_classes="status", elem_id="status")
    with gr.Row(equal_height=True):
        w["prompt"] = gr.Textbox(
            show_label=False, label="Prompt", placeholder="Ask both. Enter sends, Shift+Enter breaks the line.",
            lines=1, max_lines=8, max_length=MAX_CHARACTERS, autofocus=True, scale=8, min_width=220, elem_id="prompt",
        )  # fmt: skip
        w["send"] = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
        w["stop"] = gr.Button("Stop", variant="stop", min_width=80, visible=False, elem_id="stop")
    with gr.Row():
        for name, label in (("retry", "Retry"), ("edit", "Edit last"), ("clear", "Clear")):
            w[name] = gr.Button(label, size="sm", min_width=80, elem_id=name)
    if examples := page.examples(EXAMPLES):
        gr.Examples(examples, w["prompt"], label="Held-out prompts", cache_examples=False, examples_per_page=EXAMPLES)
    return w


def lay_out_more(most: int) -> dict:
    """The widgets below those: sampling with at most so many tokens, colours, votes."""
    w = {}
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        with gr.Row():
            w["temperature"] = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", min_width=140)
            w["top_p"] = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p", min_width=140)
            w["tokens"] = gr.Slider(1, most, min(200, most // 2), step=1, label="Max tokens", min_width=140)
            w["seed"] = gr.Textbox(  # a Number shows 0 where it is to be empty, and sends it
                label="Seed (empty: a new one each time)", max_lines=1, max_length=10, min_width=140, elem_id="seed"
            )
        w["system"] = gr.Textbox(label="System prompt", max_lines=6, max_length=MAX_CHARACTERS)
    with gr.Accordion("Why they differ", open=False, elem_id="why"):
        w["colours"] = gr.Checkbox(label="Colour the aligned answer's tokens", elem_id="colours")
        w["differences"] = gr.HTML(elem_id="differences")
    with gr.Accordion("Votes", open=True):
        w["tally"] = gr.HTML(elem_id="tally")
        w["download"] = gr.Button("Download votes.jsonl", size="sm", elem_id="download")
        w["file"] = gr.DownloadButton("votes.jsonl", elem_id="votes-file", elem_classes="off-screen")
    return w


class Handlers:
    """What Gradio calls: the page's actions, with `View`s as updates of the widgets in `SHOWN`."""

    def __init__(self, page: Page):
        self.page = page

    def send(self, duel, prompt, request: gr.Request, *values):
        for view in self.page.send(duel, wish(*values), prompt or "", request.session_hash):
            yield [duel, *updates(view)]

    def retry(self, duel, request: gr.Request, *values):
        for view in self.page.retry(duel, wish(*values), request.session_hash):
            yield [duel, *updates(view)]

    def edit(self, duel, request: gr.Request):
        return [duel, *updates(self.page.edit(duel, request.session_hash))]

    def clear(self, duel, request: gr.Request):
        return [duel, *updates(self.page.clear(duel, request.session_hash))]

    def choose(self, duel, request: gr.Request, *values):
        return [duel, *updates(self.page.choose(duel, wish(*values), request.session_hash))]

    def stop(self, request: gr.Request):
        self.page.chat.stop(request.session_hash)

    def vote(self, choice: Choice):
        def voted(duel, comment, *values):
            view = self.page.vote(duel, wish(*values), choice, comment or "")
            return [duel, "" if duel.voted else gr.skip(), *updates(view)]

        return voted

    def opened(self, duel, first, second):
        names = self.page.names()
        return [gr.Dropdown(names, value=first), gr.Dropdown(names, value=second), *updates(self.page.view(duel))]

    def colour(self, duel, wanted):
        return self.page.differences(duel, wanted=wanted)

    def snapshot(self):
        """A copy of the votes in the page's own folder, the only one that it serves files from."""
        copy, votes = Path(os.environ["GRADIO_TEMP_DIR"]) / "votes.jsonl", self.page.votes.path
        copy.write_bytes(votes.read_bytes() if votes.is_file() else b"")
        return str(copy)


def wish(first, second, blind, colours, temperature, top_p, tokens, seed, system) -> Wish:
    """The values of `SETTINGS` as the page takes them. (The chat says what is wrong with them.)"""
    if isinstance(seed, str):
        seed = int(seed) if seed.strip().isdecimal() else seed.strip() or None
    return Wish(first, second, blind, colours, Controls(temperature, top_p, tokens, seed, system or ""))


def updates(view: View) -> list:
    """A `View` as updates of the widgets in `SHOWN`."""
    chats = [gr.Chatbot(literal(turns), label=title) for turns, title in zip(view.dialogues, view.titles, strict=True)]
    prompt = gr.skip() if view.prompt is None else view.prompt
    texts = [paragraph(view.status), prompt, gr.skip() if view.tally is None else paragraph(view.tally)]
    differences = gr.skip() if view.busy else view.differences
    flags = [gr.Group(visible=view.can_vote and not view.busy), gr.Button(visible=not view.busy)]
    return [*chats, *view.figures, *texts, differences, *flags, gr.Button(visible=view.busy)]


def literal(turns: list[Message]) -> list[Message]:
    """Turns as the chat shows them to the letter: it takes text for HTML, Markdown or not, and a bare string for a
    docstring, whose indentation it would move."""
    return [turn | {"content": [{"type": "text", "text": escape(turn["content"], quote=False)}]} for turn in turns]


def paragraph(text: str) -> str:
    """A message as HTML that a screen reader reads out when it changes."""
    return f'<p role="status">{escape(text)}</p>' if text else ""


def wire(blocks: gr.Blocks, page: Page, w: dict, sides: tuple[str, str]) -> None:
    """What happens when something is pressed. What needs the model queues for it; the rest answers at once."""
    duel, do = gr.State(Session(sides)), Handlers(page)
    settings, shown = [w[n] for n in SETTINGS], [duel, *(w[n] for n in SHOWN)]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    model = {**quiet, "concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "once"}
    at_once = {**quiet, "concurrency_limit": None}
    gr.on([w["prompt"].submit, w["send"].click], do.send, [duel, w["prompt"], *settings], shown, **model)
    w["retry"].click(do.retry, [duel, *settings], shown, **model)
    w["stop"].click(do.stop, **at_once)
    w["edit"].click(do.edit, duel, shown, **at_once)
    gr.on([w["clear"].click, w["left"].clear, w["right"].clear], do.clear, duel, shown, **at_once)
    gr.on([w["first"].input, w["second"].input, w["blind"].input], do.choose, [duel, *settings], shown, **at_once)
    for choice in Choice:
        w[choice].click(do.vote(choice), [duel, w["comment"], *settings], [duel, w["comment"], *shown[1:]], **model)
    w["colours"].input(do.colour, [duel, w["colours"]], w["differences"], **model)
    w["download"].click(do.snapshot, None, w["file"], **at_once).then(
        None, js="() => document.querySelector('#votes-file a, #votes-file').click()", **quiet
    )
    blocks.load(do.opened, [duel, w["first"], w["second"]], [w["first"], w["second"], *shown[1:]], **at_once)
    blocks.unload(do.stop)
