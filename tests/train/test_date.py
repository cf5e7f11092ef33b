"""A chat template that asks for the date: a run keeps the date on which it began."""

from datetime import datetime

import pytest

from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.train.dataset import RENDERED_AT, rendered_at
from qalign.train.loop import load_base
from qalign.train.run_folder import RunFolder
from tests.reward_runs import run_stage, write_recipe

DATED = (
    "{{ bos_token + strftime_now('%Y') }}{% for m in messages %}{{ m.role + ':' + m.content }}<|eot_id|>{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


@pytest.fixture
def dated(tmp_path, tiny_folder):
    file = tmp_path / "dated.jinja"
    file.write_text(DATED)
    return write_recipe(tmp_path, tiny_folder, "dpo", model={"chat_template": str(file)}, max_steps=1, eval_data=None)


def test_a_run_records_the_date_and_is_resumed_with_it(dated):
    before = datetime.now()
    run = run_stage(dated)
    assert before <= rendered_at(run) <= datetime.now()

    (run.path / RENDERED_AT).write_text("2020-02-03\n")
    asked = [{"role": "user", "content": "Hi"}]
    for resume, year in ((True, 2020), (False, before.year)):
        run.resume = resume
        template = load_base(run).template
        assert template.now.year == year
        assert f"{year}user:Hi" in template.render(asked, add_generation_prompt=True)


def test_a_damaged_date_is_one_line(dated):
    run = RunFolder(load_recipe(str(dated), [], "dpo"), "dpo")
    assert rendered_at(run) is None
    run.path.mkdir(parents=True)
    (run.path / RENDERED_AT).write_text("yesterday")
    with pytest.raises(UserError, match="is damaged; write the date on which the run began"):
        rendered_at(run)
