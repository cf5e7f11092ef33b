"""What alarms and verdicts advise to set is what a recipe takes."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from qalign.config.load import load
from qalign.config.stages import STAGES
from qalign.reports import alarms, preference_report
from qalign.reports.answers import verdict
from tests.config.conftest import SECTIONS, with_stages
from tests.reports import test_alarms
from tests.reports.test_answers import LOOP, PLAIN, figures
from tests.reports.test_preference_report import START

OVERRIDE = re.compile(r"\b[a-z]+\.\w+=(?:'[^']*'|[\w.]+)")
KEY = re.compile(rf"\b({'|'.join(STAGES)})\.([a-z_]+)")
LONG = replace(PLAIN, ids=range(60))
LOSSES = ({"sigmoid": 1.0}, {"simpo": 1.0}, {"ipo": 0.5, "sft": 0.2})


def of_preferences() -> Iterator[str]:
    worst = replace(START, step=9, chosen_logps=-900.0, length=400.0, looping=0.9, ended=0.1)
    yield from preference_report.alarms([START, worst], "kto")
    for losses in LOSSES:
        yield from preference_report.alarms([START, worst], "dpo", losses)


def of_evaluations() -> Iterator[str]:
    """Verdicts where nothing was learned, answers came to loop, looped before, and grew long."""
    unsure = {"before": 0.5, "after": 0.5, "change": 0.0, "interval": [-1.0, 1.0]}
    policy = {"kl_nats": unsure, "reward": unsure}
    by_stage = {"sft": {"loss": unsure}, "kto": {"loss": "kto"}, "ppo": policy, "grpo": policy, "best_of": policy}
    for was, now in ((PLAIN, LOOP), (LOOP, replace(LOOP, text="else")), (PLAIN, LONG)):
        for losses in LOSSES:
            yield from verdict(figures(was=[was] * 4, now=[now] * 4) | {"stage": "dpo", "loss": losses})
        for stage, own in by_stage.items():
            yield from verdict(figures(was=[was] * 4, now=[now] * 4) | {"stage": stage} | own)
    for stage in ("dpo", "kto"):
        yield from verdict(figures(after=0.2, lost=10) | {"stage": stage})
        yield from verdict(figures(reward=0.52) | {"stage": stage})


@pytest.mark.parametrize("advice", [of_preferences, of_evaluations])
def test_every_key_and_override_of_an_advice_is_one_that_recipes_take(tmp_path, monkeypatch, advice):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(with_stages(), encoding="utf-8")
    said = list(advice())
    overrides = {found for sentence in said for found in OVERRIDE.findall(sentence)}
    assert len(overrides) > len(LOSSES)
    for override in overrides:
        load("recipe.yaml", [override.replace("'", "")])
    named = {found.groups() for sentence in said for found in KEY.finditer(sentence)}
    assert {stage for stage, _ in named} >= {"dpo", "kto"}
    assert all(key in SECTIONS[stage].model_fields for stage, key in named), named


def test_the_sft_loss_is_added_to_the_losses_that_are_there():
    assert alarms.with_sft("simpo") == "dpo.loss='{simpo: 1.0, sft: 0.1}'"
    assert alarms.with_sft({"ipo": 0.5, "sft": 0.2}) == "dpo.loss='{ipo: 0.5, sft: 0.4}'"


def test_the_alarms_of_a_reward_name_keys_of_both_stages_that_have_one():
    first = replace(test_alarms.START, spread=0.1)
    said = alarms.alarms([first, replace(first, step=10, repeated=0.9, ended=0.0, spread=9.0)], patience=3)
    keys = set(re.findall(r"\b(?:kl|reward)_\w+", " ".join(said)))
    assert keys == {"kl_coefficient", "reward_combine"}
    assert keys <= SECTIONS["ppo"].model_fields.keys() & SECTIONS["grpo"].model_fields.keys()
