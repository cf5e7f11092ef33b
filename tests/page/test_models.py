"""Which models can be compared: finished runs under the folder and named ones; nothing that leads elsewhere or is
pickled."""

import os
import shutil
import time

import pytest
import torch

from qalign.config.load import load
from qalign.errors import UserError
from qalign.model.lineage import WEIGHTS
from qalign.page.models import BASE, available_models, default_pair, named_entry, run_entries, safe_adapter
from tests.chat_runs import finished_run


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("made") / "demo", tiny_folder)


@pytest.fixture
def runs(made, tmp_path):
    """A copy of the run that a test may spoil."""
    shutil.copytree(made.parent, tmp_path / "runs" / "demo")
    return tmp_path / "runs"


@pytest.fixture
def adapter(runs):
    return runs / "demo" / "dpo" / "adapter"


def found(runs) -> list[str]:
    return [entry.name for entry in run_entries(runs)]


def available(words, runs, recipe=None) -> list[str]:
    return [entry.name for entry in available_models([str(word) for word in words], runs, recipe)[0]]


def assert_refused(path, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        named_entry(str(path))


def test_finished_runs_are_found_newest_first_and_a_broken_one_hides_no_other(runs, made, adapter):
    shutil.copytree(made.parent, runs / "other")
    later = time.time() + 60
    os.utime(runs / "other" / "dpo" / "summary.json", (later, later))
    assert found(runs) == ["other/dpo", "demo/dpo"]
    (runs / "other" / "dpo" / "summary.json").unlink()
    assert found(runs) == ["demo/dpo"]
    shutil.copytree(made.parent, runs / "broken")
    (runs / "broken" / "dpo" / "recipe.yaml").write_text("model: [")
    (adapter / "lineage.json").write_text("{}")
    assert found(runs) == ["demo/dpo"]


@pytest.mark.parametrize("words", [[], [BASE]])
def test_without_a_run_there_is_no_model(words, tmp_path):
    assert found(tmp_path / "nowhere") == []
    assert available_models(words, tmp_path) is None


def test_named_models_come_first_each_once_and_are_the_pair_that_the_page_starts_with(runs, made):
    entries, model = available_models([str(made), str(runs / "demo" / "dpo")], runs)
    assert [entry.name for entry in entries] == ["demo/dpo", "demo/dpo (2)", BASE]
    assert model == entries[0].recipe.model
    assert available([BASE, runs / "demo"], runs) == [BASE, "demo/dpo"]
    for words in ([runs / "demo", runs / "demo" / "dpo"], [BASE, BASE]):
        with pytest.raises(UserError, match="name models that differ"):
            available(words, runs)
    assert default_pair(entries, ["x", "y"]) == ("demo/dpo", "demo/dpo (2)")
    assert default_pair(entries, ["x"]) == default_pair(entries, []) == (BASE, "demo/dpo")
    entries, _ = available_models([BASE, str(runs / "demo")], runs)
    assert default_pair(entries, ["x", "y"]) == (BASE, "demo/dpo")


def test_an_adapter_made_elsewhere_needs_a_recipe(runs, adapter, tmp_path):
    plain = shutil.copytree(adapter, tmp_path / "plain")
    with pytest.raises(UserError, match="--recipe"):
        available([plain], tmp_path / "none")
    recipe = load(str(runs / "demo" / "dpo.yaml"))
    assert available([plain], tmp_path / "none", recipe) == [str(plain), BASE]


def test_a_run_on_another_base_is_left_out_or_refused_when_named(runs, made):
    file = runs / "demo" / "dpo" / "recipe.yaml"
    file.write_text(file.read_text().replace("nf4", "fp4"))
    assert available([made], runs) == ["demo/dpo", BASE]
    with pytest.raises(UserError, match="fp4"):
        available([made, runs / "demo" / "dpo"], runs)


def test_another_adapter_of_a_run_can_be_named(runs, adapter):
    best = shutil.copytree(adapter, adapter.with_name("adapter_best"))
    entries, model = available_models([str(best)], runs)
    assert [entry.name for entry in entries] == ["demo/dpo/adapter_best", BASE, "demo/dpo"]
    assert entries[0].recipe.model == model
    assert named_entry(str(adapter)).name == "demo/dpo"


@pytest.mark.parametrize("word", ["../../../etc", "/etc/passwd", "nowhere", "recipes"])
def test_a_word_that_is_no_run_is_a_users_mistake(word):
    assert_refused(word, "no finished")


def test_a_pickle_is_never_loaded(runs, adapter):
    (adapter / WEIGHTS).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    assert found(runs) == []
    assert_refused(adapter.parent, "can run code and are not loaded")


def test_a_symlink_out_of_the_folder_is_not_followed(runs, made, adapter):
    (entry,) = run_entries(runs)
    adapter.rename(runs / "kept")
    adapter.symlink_to(runs / "kept")
    assert found(runs) == ["demo/dpo"]  # within the folder, it is
    adapter.unlink()
    adapter.symlink_to(made / "adapter")
    assert found(runs) == []
    assert_refused(adapter.parent, "leads out of")
    with pytest.raises(UserError, match="leads out of"):  # checked again when it is loaded
        safe_adapter(entry.adapter, entry.within)

    adapter.unlink()
    shutil.copytree(made / "adapter", adapter)
    assert found(runs) == ["demo/dpo"]
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to(made / "adapter" / WEIGHTS)
    assert found(runs) == []

    shutil.rmtree(runs / "demo")
    (runs / "demo").symlink_to(made.parent)
    assert found(runs) == []
    assert named_entry(str(adapter.parent)).name == "demo/dpo"  # the user's own symlink, named by the user


def test_a_reward_run_that_leads_out_of_the_folder_is_not_used(runs, tiny_folder, tmp_path):
    elsewhere = finished_run(tmp_path / "elsewhere", tiny_folder).rename(tmp_path / "elsewhere" / "reward")
    reward = runs / "demo" / "reward"
    reward.symlink_to(elsewhere)
    assert [entry.reward for entry in run_entries(runs)] == [None]
    assert named_entry(str(runs / "demo")).reward is None
    reward.unlink()
    shutil.copytree(elsewhere, reward)
    assert named_entry(str(runs / "demo")).reward == run_entries(runs)[0].reward == reward / "adapter"


def test_a_run_that_is_a_symlink_can_be_named_itself(runs, tmp_path):
    dpo = runs / "demo" / "dpo"
    dpo.rename(tmp_path / "dpo")
    dpo.symlink_to(tmp_path / "dpo")
    assert named_entry(str(dpo)).name == "demo/dpo"
    assert_refused(runs / "demo", "leads out of")
    assert found(runs) == []
