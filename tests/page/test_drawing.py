"""A run as HTML and SVG on the page, and which runs a visitor may name."""

import json
import re
from pathlib import Path

import pytest

from qalign.page.training.drawing import BLUE, MAX_POINTS, ORANGE, panel, run_html, thinned
from qalign.reports.curves import Curve, view
from qalign.train.lock import locked


def written(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_curve_is_drawn_from_its_first_step_to_its_last_between_round_values():
    html = panel("loss", [Curve("loss", [10, 20, 30], [0.0, 1.0, 0.5])])
    # The axes go from 52 to 370 and from 148 up to 8; 0 and 1 are round values.
    assert f'<polyline points="52.0,148.0 211.0,8.0 370.0,78.0" stroke="{BLUE}"/>' in html
    assert re.findall(r">([\d.]+)</text>", html) == ["0", "0.25", "0.5", "0.75", "1", "12", "16", "20", "24", "28"]
    assert '<i style="background: #0072B2"></i>0.5</span>' in html
    assert 'aria-label="loss over the steps: 0.5"' in html


def test_what_is_held_out_is_orange_and_one_point_is_a_dot():
    html = panel("loss", [Curve("loss", [1, 2], [2.0, 1.0]), Curve("eval_loss", [2], [1.5])])
    assert f'<i style="background: {BLUE}"></i>training 1</span>' in html
    assert f'<i style="background: {ORANGE}"></i>held out 1.5</span>' in html
    assert re.search(f'<circle [^>]*fill="{ORANGE}"/>', html)
    assert ORANGE in panel("judge", [Curve("eval_judge", [1, 2], [0.5, 0.5])])


def test_a_long_curve_keeps_its_ends_and_few_points():
    steps = [*range(1, 10 * MAX_POINTS + 8)]
    kept = thinned(Curve("loss", steps, [float(step) for step in steps]))
    assert (kept[0], kept[-1]) == ((1, 1.0), (steps[-1], float(steps[-1])))
    assert len(kept) <= MAX_POINTS + 1
    assert len({*kept}) == len(kept)


def test_state_step_and_alarms_are_said_and_no_text_of_a_run_becomes_html(tmp_path):
    run = written(tmp_path / "a" / "dpo", [{"step": 2, "loss": 0.5, "alarms": ["<b>answers loop"]}])
    html = run_html(view(run))
    assert f"{run}: <b>stopped</b>, step 2" in html
    assert "Alarm at step 2: &lt;b&gt;answers loop" in html
    with locked(tmp_path / "b" / "dpo"):
        assert ": <b>running</b> by process" in (html := run_html(view(tmp_path / "b" / "dpo")))
        assert "the base is being loaded" in html
    assert run_html(None, "no run <yet>") == '<p role="status">no run &lt;yet&gt;</p>'


@pytest.mark.parametrize("name", ["../other/dpo", "/etc", "", None, "a", "a/../a/dpo"])
def test_a_visitor_names_a_run_of_the_list_alone(tmp_path, name):
    from qalign.page.training.curves import RunList  # it imports Gradio

    written(tmp_path / "runs" / "a" / "dpo", [])
    written(tmp_path / "other" / "dpo", [])
    runs = RunList(tmp_path / "runs")
    assert runs.names() == ["a/dpo"]
    assert runs.view("a/dpo").path == tmp_path / "runs" / "a" / "dpo"
    assert runs.view(name) is None
