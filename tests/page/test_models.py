"""Who may play: finished runs under the folder, and what was named; nothing that leads elsewhere, nothing pickled."""

import json
import os
import shutil
import time

import pytest
import torch

from qalign.config.load import load
from qalign.errors import UserError
from qalign.page.models import BASE, found_under, held_within, lineup, named, opponents
from tests.chat_runs import finished_run


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("made") / "demo", tiny_folder)


@pytest.fixture
def runs(made, tmp_path):
    """A copy of the run that a test may spoil."""
    shutil.copytree(made.parent, tmp_path / "runs" / "demo")
    return tmp_path / "runs"


def names(runs) -> list[str]:
    return [contender.name for contender in found_under(runs)]


def test_finished_runs_are_found_newest_first(runs, made):
    shutil.copytree(made.parent, runs / "other")
    later = time.time() + 60
    os.utime(runs / "other" / "dpo" / "summary.json", (later, later))
    assert names(runs) == ["other/dpo", "demo/dpo"]
    (runs / "other" / "dpo" / "summary.json").unlink()
    assert names(runs) == ["demo/dpo"]
    assert names(runs / "nowhere") == []


def test_without_a_run_there_is_nobody(tmp_path):
    assert lineup([], tmp_path) is None
    assert lineup([BASE], tmp_path) is None


def test_named_ones_come_first_and_each_once(runs, made):
    contenders, model = lineup([str(made), str(runs / "demo" / "dpo")], runs)
    assert [c.name for c in contenders] == ["demo/dpo", "demo/dpo (2)", BASE]
    assert opponents(contenders, ["x", "y"]) == ("demo/dpo", "demo/dpo (2)")
    assert model == contenders[0].recipe.model
    contenders, _ = lineup([BASE, str(runs / "demo")], runs)
    assert [c.name for c in contenders] == [BASE, "demo/dpo"]
    assert opponents(contenders, ["x", "y"]) == (BASE, "demo/dpo")


def test_an_adapter_made_elsewhere_needs_a_recipe(runs, tmp_path):
    adapter = tmp_path / "plain"
    shutil.copytree(runs / "demo" / "dpo" / "adapter", adapter)
    with pytest.raises(UserError, match="--recipe"):
        lineup([str(adapter)], tmp_path / "none")
    recipe = load(str(runs / "demo" / "given.yaml"))
    contenders, _ = lineup([str(adapter)], tmp_path / "none", recipe)
    assert [c.name for c in contenders] == [str(adapter), BASE]


def test_a_run_on_another_base_is_left_out_or_refused_when_named(runs, made):
    file = runs / "demo" / "dpo" / "recipe.yaml"
    file.write_text(file.read_text().replace("nf4", "fp4"))
    contenders, _ = lineup([str(made)], runs)
    assert [c.name for c in contenders] == ["demo/dpo", BASE]
    with pytest.raises(UserError, match="fp4"):
        lineup([str(made), str(runs / "demo" / "dpo")], runs)


@pytest.mark.parametrize("word", ["../../../etc", "/etc/passwd", "nowhere", "recipes"])
def test_a_word_that_is_no_run_is_a_users_mistake(word):
    with pytest.raises(UserError, match="no finished"):
        named(word)


def test_a_pickle_is_never_loaded(runs, made):
    adapter = runs / "demo" / "dpo" / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    assert names(runs) == []
    with pytest.raises(UserError, match="can run code and are not loaded"):
        named(str(runs / "demo" / "dpo"))


def test_a_symlink_out_of_the_folder_is_not_followed(runs, made):
    adapter = runs / "demo" / "dpo" / "adapter"
    shutil.rmtree(adapter)
    adapter.symlink_to(made / "adapter")
    assert names(runs) == []
    with pytest.raises(UserError, match="leads out of"):
        named(str(runs / "demo" / "dpo"))

    adapter.unlink()
    shutil.copytree(made / "adapter", adapter)
    assert names(runs) == ["demo/dpo"]
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(made / "adapter" / "adapter_model.safetensors")
    assert names(runs) == []

    shutil.rmtree(runs / "demo")
    (runs / "demo").symlink_to(made.parent)
    assert names(runs) == []
    assert named(str(runs / "demo" / "dpo")).name == "demo/dpo"  # the user's own symlink, named by the user


def test_a_reward_run_that_leads_out_of_the_folder_is_not_used(runs, made, tiny_folder, tmp_path):
    elsewhere = finished_run(tmp_path / "elsewhere", tiny_folder).rename(tmp_path / "elsewhere" / "reward")
    (runs / "demo" / "reward").symlink_to(elsewhere)
    assert [contender.reward for contender in found_under(runs)] == [None]
    assert named(str(runs / "demo")).reward is None
    (runs / "demo" / "reward").unlink()
    shutil.copytree(elsewhere, runs / "demo" / "reward")
    assert named(str(runs / "demo")).reward == found_under(runs)[0].reward == runs / "demo" / "reward" / "adapter"


def test_a_run_that_is_a_symlink_can_be_named_itself(runs, tmp_path):
    (runs / "demo" / "dpo").rename(tmp_path / "dpo")
    (runs / "demo" / "dpo").symlink_to(tmp_path / "dpo")
    assert named(str(runs / "demo" / "dpo")).name == "demo/dpo"
    with pytest.raises(UserError, match="leads out of"):
        named(str(runs / "demo"))
    assert found_under(runs) == []


def test_a_symlink_that_came_since_is_not_followed_either(runs, made):
    (contender,) = found_under(runs)
    shutil.rmtree(contender.adapter)
    contender.adapter.symlink_to(made / "adapter")
    with pytest.raises(UserError, match="leads out of"):
        held_within(contender.adapter, contender.within)


def test_another_adapter_of_a_run_can_be_named(runs):
    shutil.copytree(runs / "demo" / "dpo" / "adapter", runs / "demo" / "dpo" / "adapter_best")
    contenders, model = lineup([str(runs / "demo" / "dpo" / "adapter_best")], runs)
    assert [c.name for c in contenders] == ["demo/dpo/adapter_best", BASE, "demo/dpo"]
    assert contenders[0].recipe.model == model
    assert named(str(runs / "demo" / "dpo" / "adapter")).name == "demo/dpo"


def test_one_model_named_twice_is_a_mistake(runs):
    with pytest.raises(UserError, match="name models that differ"):
        lineup([str(runs / "demo"), str(runs / "demo" / "dpo")], runs)
    with pytest.raises(UserError, match="name models that differ"):
        lineup([BASE, BASE], runs)


def test_a_symlink_within_the_folder_is_fine(runs):
    adapter = runs / "demo" / "dpo" / "adapter"
    adapter.rename(runs / "kept")
    adapter.symlink_to(runs / "kept")
    assert names(runs) == ["demo/dpo"]


def test_a_broken_run_does_not_hide_the_others(runs, made):
    shutil.copytree(made.parent, runs / "broken")
    (runs / "broken" / "dpo" / "recipe.yaml").write_text("model: [")
    (runs / "demo" / "dpo" / "adapter" / "lineage.json").write_text(json.dumps({}))
    assert names(runs) == ["demo/dpo"]
