"""The tab in which a person trains: its widgets, and which action each one calls."""

from functools import partial
from typing import Any, Literal

import gradio as gr

from qalign.config.paths import DATA_SUFFIXES
from qalign.page.training.actions import CHOICE, OWN_ROWS, RUN, Actions
from qalign.page.training.commands import Job
from qalign.page.training.curves import AT_ONCE, EVERY_SECONDS
from qalign.page.training.uploads import PIECE_BYTES

BUTTONS: tuple[tuple[str, str, Literal["primary", "secondary", "stop"]], ...] = (  # name, label, kind
    ("check", "Check the rows", "secondary"),
    ("fit", "Will it fit?", "secondary"),
    ("train", "Train", "primary"),
    ("resume", "Resume", "primary"),
    ("stop", "Stop", "stop"),
    ("open", "Open in Compare", "primary"),
)
AT_FIRST = ("check", "fit", "train")
FILE = (
    f'<label><span>Upload rows</span><input type="file" id="upload-file" accept="{",".join(DATA_SUFFIXES)}" '
    "onchange=\"document.querySelector('#upload-go').click()\"></label>"
)
# The next piece of the chosen file, as (name, its bytes, first byte of the piece, base64); without one, an empty name.
NEXT_PIECE = """async () => {
    const box = document.querySelector('#upload-file'), file = box.files[0];
    if (!file) return ['', 0, 0, ''];
    const start = file === window.uploading?.file ? window.uploading.next : 0;
    const piece = file.slice(start, start + PIECE_BYTES), next = start + piece.size;
    window.uploading = {file, next};
    const reader = new FileReader();
    await new Promise(done => { reader.onload = done; reader.readAsDataURL(piece); });
    if (next >= file.size) { box.value = ''; window.uploading = null; }
    return [file.name, file.size, start, reader.result.slice(reader.result.indexOf(',') + 1)];
}""".replace("PIECE_BYTES", str(PIECE_BYTES))


def tab(actions: Actions) -> tuple[gr.Tab, dict[str, Any]]:
    """The tab and its widgets by name. `open` is the button that opens the run in `run` in the comparison."""
    with gr.Tab("Train", id="train") as opened:
        w = choice_widgets() | run_widgets()
    wire(opened, w, actions)
    return opened, w


def choice_widgets() -> dict[str, Any]:
    """The widgets for what is trained, and how."""
    w: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        w["recipe"] = gr.Dropdown(
            [], label="Recipe", allow_custom_value=True, min_width=260, scale=2, elem_id="train-recipe"
        )
        w["stage"] = gr.Dropdown([], label="Stage", min_width=200, elem_id="train-stage")
    with gr.Row(equal_height=True):
        w["data"] = gr.Dropdown(
            [OWN_ROWS], value="", label="Rows to train on", allow_custom_value=True, min_width=260, scale=2,
            elem_id="train-data",
        )  # fmt: skip
        gr.HTML(FILE, min_width=200, elem_id="upload", container=True)
    with gr.Row(equal_height=True):
        w["settings"] = gr.Textbox(
            label="Settings, one a line", placeholder="dpo.max_steps=20", lines=2, max_lines=8, max_length=4000,
            min_width=260, scale=2, elem_id="train-settings",
        )  # fmt: skip
        w["card"] = gr.Textbox(
            label="Memory of the card", placeholder="12GB (empty: this computer's)", max_lines=1, max_length=20,
            min_width=200, elem_id="train-card",
        )  # fmt: skip
    w["overwrite"] = gr.Checkbox(label="Replace a run that is there (--overwrite)", elem_id="train-overwrite")
    w["commands"] = gr.Textbox(
        label="The same as commands", lines=3, max_lines=12, interactive=False, buttons=["copy"],
        elem_id="train-commands", elem_classes="terminal",
    )  # fmt: skip
    return w


def run_widgets() -> dict[str, Any]:
    """The buttons, the run, and what is not seen."""
    w: dict[str, Any] = {}
    with gr.Row():
        for name, label, kind in BUTTONS:
            w[name] = gr.Button(
                label, variant=kind, min_width=120, visible=name in AT_FIRST, elem_id=f"train-{name}"
            )  # fmt: skip
    w["status"] = gr.HTML(elem_classes="status", elem_id="train-status")
    w["curves"] = gr.HTML(elem_id="train-curves")
    w["log"] = gr.Textbox(
        label="Output", lines=3, max_lines=24, interactive=False, visible=False, elem_id="train-log",
        elem_classes="terminal",
    )  # fmt: skip
    w["upload"] = gr.Button("Upload", elem_id="upload-go", elem_classes="off-screen")
    w["piece"] = [kind(visible=False) for kind in (gr.Textbox, gr.Number, gr.Number, gr.Textbox)]
    w["wanted"], w["run"], w["timer"] = gr.State(0), gr.State(), gr.Timer(EVERY_SECONDS, active=False)
    return w


def wire(opened: gr.Tab, w: dict[str, Any], actions: Actions) -> None:
    """Connects widgets and actions."""
    choice, run = [w[name] for name in CHOICE], [w[name] for name in RUN]
    chosen, begun = [w["commands"], w["run"], *run], [w["run"], w["status"], *run]
    opened.select(actions.select, [w["run"], *choice], [*choice[:3], *chosen], **AT_ONCE)
    settle = {"trigger_mode": "always_last", **AT_ONCE}  # the last change counts
    w["recipe"].change(actions.choose_recipe, choice, [w["stage"], *chosen], **settle)
    gr.on([w[name].change for name in CHOICE[1:]], actions.choose, choice, chosen, **settle)
    for name, action in (("train", actions.train), ("resume", actions.resume)):
        w[name].click(action, [w["run"], *choice], begun, trigger_mode="once", **AT_ONCE)
    w["stop"].click(actions.stop, w["run"], w["status"], trigger_mode="once", **AT_ONCE)
    slow = {**AT_ONCE, "show_progress": "full", "concurrency_id": "look", "concurrency_limit": 1}
    for name, words in (("check", Job.check), ("fit", Job.fit)):
        w[name].click(partial(actions.look, words), choice, [w["log"], w["status"]], trigger_mode="once", **slow)
    gr.on(
        [w["upload"].click, w["wanted"].change], actions.receive, w["piece"], [w["wanted"], w["data"], w["status"]],
        js=NEXT_PIECE, trigger_mode="multiple", **AT_ONCE,
    )  # fmt: skip
    ticked = [w["commands"], w["status"], *run]
    w["timer"].tick(actions.tick, [w["run"], *choice], ticked, trigger_mode="once", **AT_ONCE)
