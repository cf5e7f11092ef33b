"""The page's widgets: their layout, and which action of `qalign.page.actions` each one calls. Uses Gradio only here."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Soft

from qalign.data.formats import Message
from qalign.page.actions import MAX_COMMENT, Inputs, Page, View
from qalign.page.chat import MAX_CHARACTERS, MAX_DIAL, Controls, error_text
from qalign.page.session import Session
from qalign.page.training import curves
from qalign.page.training.actions import Actions
from qalign.page.training.curves import AT_ONCE, RunList, stop_others
from qalign.page.training.html import paragraph
from qalign.page.training.process import Training
from qalign.page.training.tab import tab
from qalign.page.training.uploads import Uploads
from qalign.page.votes import Choice

EXAMPLES = 6
UPLOADS = "uploads"  # folder of uploaded data
MAX_AT_ONCE = 16  # actions that wait in `page.worker` for their turn, each in one of Gradio's 40 threads
# Widgets that `handler` reads, and widgets that `updates` fills, in the order of these functions.
ENTERED = (*("first", "second", "blind", "colours", "temperature", "top_p", "tokens", "dial", "seed", "system"),
           *("prompt", "comment"))  # fmt: skip
SHOWN = (*("left", "right", "left_figures", "right_figures", "status", "prompt", "comment", "tally", "differences"),
         *("ballot", "unfinished", "cut", "send", "stop"))  # fmt: skip
CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
THEME = Soft(  # uses the system's own fonts, so that nothing is downloaded
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
)
NO_RUN = Path(__file__).with_name("no_run.md").read_text(encoding="utf-8")


def build(page: Page, pair: tuple[str, str], runs: RunList, training: Training, *, logout: bool = False) -> gr.Blocks:
    """The page as Gradio blocks, with a pair of models to start with. Without a run, where the pair has no names, it
    says how to train one."""
    with gr.Blocks(title="qalign", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Compare", id="compare") as compare:
                with gr.Column(visible=not pair[0]) as no_run:
                    gr.Markdown(NO_RUN)
                with gr.Column(visible=bool(pair[0])) as main:
                    w = main_widgets(page, pair) | more_widgets(page.chat.max_new_tokens)
            w |= {"tabs": tabs, "no_run": no_run, "main": main}
            train, t = tab(Actions(training, Uploads(Path(UPLOADS)), page.chat.unload))
            stop_others([(compare, None), curves.tab(runs), (train, t["timer"])])
        wire(blocks, page, w, pair)
        wire_open(page, w, t)
        if logout:
            script = "() => fetch('logout?all_session=false').finally(() => location.reload())"
            gr.Button("Log out", size="sm", elem_id="logout").click(None, js=script, api_visibility="private")
    return blocks


def main_widgets(page: Page, pair: tuple[str, str]) -> dict[str, Any]:
    """The widgets for answers and questions, by name."""
    w, names = {}, page.names()
    gr.Markdown("# qalign: which answer is better?")
    with gr.Row():
        w["first"] = gr.Dropdown(names, value=pair[0] or None, label="First model", min_width=140, elem_id="first")
        w["second"] = gr.Dropdown(names, value=pair[1] or None, label="Second model", min_width=140, elem_id="second")
    w["blind"] = gr.Checkbox(label="Blind test: shuffle the sides and hide the names until you vote", elem_id="blind")
    with gr.Row():
        for side, title in zip(("left", "right"), pair, strict=True):
            with gr.Column(min_width=300):
                w[side] = gr.Chatbot(
                    label=title, elem_id=side, height=380, layout="bubble", buttons=[], feedback_options=None,
                    # An answer is shown as plain text: no image of it is loaded and no tag of it is used.
                    render_markdown=False, sanitize_html=True, allow_tags=False,
                )  # fmt: skip
                w[f"{side}_figures"] = gr.Markdown(
                    elem_classes="figures", elem_id=f"{side}-figures", sanitize_html=True
                )
    with gr.Row(visible=False, equal_height=True, elem_id="unfinished") as w["unfinished"]:
        w["cut"] = gr.HTML(elem_id="cut", min_width=200)
        w["more"] = gr.Button("Let it go on", size="sm", min_width=120, scale=0, elem_id="more")
    with gr.Group(visible=False) as w["ballot"]:
        with gr.Row():
            for choice, label in zip(Choice, ("A is better", "B is better", "Tie", "Both bad"), strict=True):
                w[choice] = gr.Button(label, elem_id=f"vote-{choice}", min_width=80)
        w["comment"] = gr.Textbox(label="Comment (optional)", max_lines=3, max_length=MAX_COMMENT, elem_id="comment")
    w["status"] = gr.HTML(elem_classes="status", elem_id="status")
    with gr.Row(equal_height=True):
        w["prompt"] = gr.Textbox(
            show_label=False, label="Prompt", placeholder="Ask both. Enter sends, Shift+Enter starts a new line.",
            lines=1, max_lines=8, max_length=MAX_CHARACTERS, autofocus=True, scale=8, min_width=220, elem_id="prompt",
        )  # fmt: skip
        w["send"] = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
        w["stop"] = gr.Button("Stop", variant="stop", min_width=80, visible=False, elem_id="stop")
    with gr.Row():
        for name, label in (("retry", "Retry"), ("edit", "Edit last"), ("clear", "Clear")):
            w[name] = gr.Button(label, size="sm", min_width=80, elem_id=name)
    if examples := page.examples(EXAMPLES):
        samples = [[text] for text in examples]  # gr.Examples would call a route that the guard refuses
        w["examples"] = gr.Dataset(
            components=[w["prompt"]], samples=samples, samples_per_page=EXAMPLES, label="Held-out prompts",
            elem_id="examples", type="values",
        )  # fmt: skip
    return w


def more_widgets(max_new_tokens: int) -> dict[str, Any]:
    """The widgets below: sampling, coloured tokens, votes."""
    w = {}
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        with gr.Row():
            tokens = min(200, max_new_tokens // 2)
            w["temperature"] = gr.Slider(
                0, 2, 0.7, step=0.05, label="Temperature", min_width=140, elem_id="temperature"
            )
            w["top_p"] = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p", min_width=140, elem_id="top-p")
            w["tokens"] = gr.Slider(
                1, max_new_tokens, tokens, step=1, label="Max tokens", min_width=140, elem_id="tokens"
            )
            w["seed"] = gr.Textbox(  # an empty gr.Number shows 0, and sends it
                label="Seed (empty: a new one each time)", max_lines=1, max_length=10, min_width=140, elem_id="seed"
            )
        w["dial"] = gr.Slider(
            0, MAX_DIAL, 1, step=0.05, elem_id="dial", label="Dial λ",
            info="Logits are λ · aligned + (1 − λ) · other: 0 is the other side, 1 the aligned one, more is too much.",
        )  # fmt: skip
        w["system"] = gr.Textbox(label="System prompt", max_lines=6, max_length=MAX_CHARACTERS, elem_id="system")
    with gr.Accordion("Why they differ", open=False, elem_id="why"):
        w["colours"] = gr.Checkbox(label="Colour the tokens of the aligned answer", elem_id="colours")
        w["differences"] = gr.HTML(elem_id="differences")
    with gr.Accordion("Votes", open=True, elem_id="votes"):
        w["tally"] = gr.HTML(elem_id="tally")
        w["download"] = gr.Button("Download votes.jsonl", size="sm", elem_id="download")
        w["file"] = gr.DownloadButton("votes.jsonl", elem_id="votes-file", elem_classes="off-screen")
    return w


def wire(blocks: gr.Blocks, page: Page, w: dict[str, Any], pair: tuple[str, str]) -> None:
    """Connects widgets and actions. Actions that need the model are queued; the others answer at once."""
    session = w["session"] = gr.State(Session(pair))
    entered, shown = [session, *(w[name] for name in ENTERED)], [session, *(w[name] for name in SHOWN)]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    queued = {**quiet, "concurrency_id": "model", "concurrency_limit": MAX_AT_ONCE, "trigger_mode": "once"}
    at_once = {**quiet, "concurrency_limit": None}

    def stop(request: gr.Request) -> None:
        page.chat.stop(request.session_hash or "")

    def snapshot() -> str:
        """A copy of the votes in the page's own folder, the only folder that it serves files from."""
        copy, votes = Path(os.environ["GRADIO_TEMP_DIR"]) / "votes.jsonl", page.votes.path
        copy.write_bytes(votes.read_bytes() if votes.is_file() else b"")
        return str(copy)

    gr.on([w["prompt"].submit, w["send"].click], handler(page.send), entered, shown, **queued)
    w["retry"].click(handler(page.retry), entered, shown, **queued)
    w["more"].click(handler(page.go_on), entered, shown, **queued)
    w["stop"].click(stop, **at_once)
    if "examples" in w:
        w["examples"].click(lambda sample: sample[0], w["examples"], w["prompt"], **at_once)
    w["edit"].click(handler(page.edit), session, shown, **at_once)
    gr.on([w["clear"].click, w["left"].clear, w["right"].clear], handler(page.clear), session, shown, **at_once)
    gr.on([w[n].input for n in ("first", "second", "blind")], handler(page.choose), entered, shown, **at_once)
    for choice in Choice:
        w[choice].click(handler(partial(page.vote, choice)), entered, shown, **queued)
    w["colours"].input(
        lambda session, wanted: page.differences(session, wanted=wanted),
        [session, w["colours"]], w["differences"], **queued,
    )  # fmt: skip
    w["download"].click(snapshot, None, w["file"], **at_once).then(
        None, js="() => document.querySelector('#votes-file a, #votes-file').click()", **quiet
    )
    opened = [session, w["no_run"], w["main"], w["first"], w["second"], w["tokens"], *shown[1:]]
    blocks.load(partial(greet, page), [session, w["first"], w["second"]], opened, **at_once)
    blocks.unload(stop)


def greet(page: Page, session: Session, first: str, second: str) -> list[Any]:
    """What is new when the page is opened: runs that finished since it was started, or other models altogether."""
    names = page.names()
    if not {first, second} <= {*names}:
        first, second = page.pair()
    session.choose(first, second, blind=session.blind)
    choices = [gr.Dropdown(names, value=name or None) for name in (first, second)]
    columns, most = [gr.Column(visible=not names), gr.Column(visible=bool(names))], page.chat.max_new_tokens
    return [session, *columns, *choices, gr.Slider(maximum=most), *updates(page.view(session))]


def wire_open(page: Page, w: dict[str, Any], t: dict[str, Any]) -> None:
    """Connects the button in the tab Train (`t`) that opens its run in the comparison (`w`)."""

    def open_run(run: Path | None, session: Session) -> list[Any]:
        try:
            if run:
                page.open(run)
        except Exception as error:
            return [gr.skip(), paragraph(error_text(error)), *[gr.skip()] * len(opened)]
        return [gr.Tabs(selected="compare"), "", *greet(page, session, *page.pair())]

    opened = [*(w[name] for name in ("session", "no_run", "main", "first", "second", "tokens")), *(w[n] for n in SHOWN)]
    t["open"].click(
        open_run, [t["run"], w["session"]], [w["tabs"], t["status"], *opened], **{**AT_ONCE, "show_progress": "full"}
    )


def handler(action: Callable[[Session, Inputs], View | Iterator[View]]) -> Callable[..., Iterator[list[Any]]]:
    """An action as a function for Gradio: values of `ENTERED` in, checked by `Chat.answer`; updates of `SHOWN` out.
    Edit and Clear are given no values, so that they work whatever stands in a number's box."""

    def handle(session: Session, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        inputs = Inputs(key=request.session_hash or "")
        if values:
            first, second, blind, colours, temperature, top_p, tokens, dial, seed, system, prompt, comment = values
            if isinstance(seed, str):
                seed = int(seed) if seed.strip().isdecimal() else seed.strip() or None
            controls = Controls(temperature, top_p, tokens, seed, system or "", dial)
            inputs = Inputs(first, second, blind, colours, controls, prompt or "", comment or "", inputs.key)
        views = action(session, inputs)
        for view in [views] if isinstance(views, View) else views:
            yield [session, *updates(view)]

    return handle


def updates(view: View) -> list[Any]:
    """A `View` as updates of the widgets in `SHOWN`."""
    chats = [gr.Chatbot(literal(turns), label=title) for turns, title in zip(view.dialogues, view.titles, strict=True)]
    boxes = [gr.skip() if text is None else text for text in (view.prompt, view.comment)]
    tally = gr.skip() if view.tally is None else paragraph(view.tally)
    differences = gr.skip() if view.busy else view.differences
    ballot = gr.Group(visible=view.can_vote and not view.busy)
    unfinished = [gr.Row(visible=bool(view.cut)), paragraph(view.cut)]
    buttons = [gr.Button(visible=not view.busy), gr.Button(visible=view.busy)]
    return [*chats, *view.figures, paragraph(view.status), *boxes, tally, differences, ballot, *unfinished, *buttons]


def literal(turns: list[Message]) -> list[Any]:
    """Turns for the chatbot, shown letter by letter. It reads every text as HTML, and would move the indentation of a
    plain string as if it were a docstring."""
    return [{**turn, "content": [{"type": "text", "text": escape(turn["content"], quote=False)}]} for turn in turns]
