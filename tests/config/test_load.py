"""A recipe from a file: every problem at once, each with its line and the likely fix; paths; the way back to YAML."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qalign.config.load import dump, load
from qalign.config.paths import absolute, looks_local, package_file
from qalign.config.recipe import Lora, Model, Recipe
from qalign.config.stages import DPO, PPO, SFT, STAGES, Reward, Source
from qalign.config.trainer_keys import (
    _NOT_HERE,
    _NOT_HERE_BY_STAGE,
    _OWNED,
    _OWNED_BY_STAGE,
    _WITHOUT_EFFECT,
    _WITHOUT_EFFECT_BY_STAGE,
    trainer_keys,
)
from qalign.errors import UserError
from tests.conftest import ROOT

GOOD = """\
model:
  base: org/model
output: runs/x
dpo:
  data: pairs.jsonl
"""
SECTIONS = {"sft": SFT, "reward": Reward, "dpo": DPO, "ppo": PPO}
LOOPS_OF_TRL = ("sft", "reward", "dpo")  # PPO's is qalign's own


def with_stages(**settings: str) -> str:
    """A good recipe with all stages: `sft:` is line 4, each stage's own setting (if given) two below its name."""
    lines = ["model: {base: org/model}", "output: runs/x", "lora: {r: 8}"]
    for stage in STAGES:
        lines += [f"{stage}:", "  data: pairs.jsonl", f"  {settings.get(stage, 'seen: never')}"]
    lines += [] if settings.get("ppo", "").startswith("reward:") else ["  reward: reward"]
    return "".join(line + "\n" for line in lines if "seen: never" not in line)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with an empty `pairs.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    return tmp_path


@pytest.fixture
def read(folder):
    """Loads a recipe's text as `recipe.yaml`."""

    def read(text: str, *overrides: str, stage: str | None = "dpo") -> Recipe:
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        return load("recipe.yaml", list(overrides), stage)

    return read


@pytest.fixture
def problems(read):
    """The lines that a recipe's text is refused with."""

    def problems(text: str, *overrides: str, stage: str | None = "dpo") -> list[str]:
        with pytest.raises(UserError) as caught:
            read(text, *overrides, stage=stage)
        assert all("\n" not in line for line in caught.value.lines)
        return list(caught.value.lines)

    return problems


# --- what is wrong, and where ----------------------------------------------------------------------------------------


def test_a_good_recipe_is_read(read):
    recipe = read(GOOD)

    assert recipe.model.base == "org/model"
    assert recipe.output == "runs/x"
    assert recipe.dpo.data == (Source(path="pairs.jsonl"),)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GOOD + "  epohcs: 2\n", "recipe.yaml:6: unknown key 'epohcs' in dpo; did you mean 'epochs'?"),
        (GOOD + "outptu: x\n", "recipe.yaml:6: unknown key 'outptu'; did you mean 'output'?"),
        (GOOD + "lora:\n  r: 8\n  alhpa: 8\n", "recipe.yaml:8: unknown key 'alhpa' in lora; did you mean 'alpha'?"),
        (GOOD + "lora: {rank: 8}\n", "recipe.yaml:6: unknown key 'rank' in lora; known: r, alpha, dropout, targets, "
         "rslora, dora, init"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_the_nearest_known_one_or_all_of_them(problems, text, line):
    assert problems(text) == [line]


def test_an_unknown_key_in_a_list_of_sources_is_found_at_its_own_line(problems):
    text = "model: {base: org/model}\noutput: x\ndpo:\n  data:\n  - pairs.jsonl\n  - path: pairs.jsonl\n    weigth: 2\n"

    assert problems(text) == ["recipe.yaml:7: unknown key 'weigth' in dpo.data.1; did you mean 'weight'?"]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("batch_size: '16'", "dpo.batch_size is '16'; expected a whole number"),
        ("batch_size: 16.0", "dpo.batch_size is 16.0; expected a whole number"),
        ("max_steps: 1e3", "dpo.max_steps is 1000.0; expected a whole number"),
        ("beta: a tenth", "dpo.beta is 'a tenth'; expected a number"),
        ("beta: yes", "dpo.beta is True; expected a number"),
        ("beta: 0", "dpo.beta is 0; expected greater than 0"),
        ("batch_size: 0", "dpo.batch_size is 0; expected greater than or equal to 1"),
        ("micro_batch_size: auot", "dpo.micro_batch_size is 'auot'; expected 'auto' or a whole number of at least 1"),
        ("micro_batch_size: 0", "dpo.micro_batch_size is 0; expected 'auto' or a whole number of at least 1"),
        ("split: 1", "dpo.split is 1; expected a string"),
        (
            "loss: sigmod",
            "dpo.loss is 'sigmod'; expected one of sigmoid, ipo, hinge, robust, sigmoid_norm, apo_zero, simpo, orpo; "
            "did you mean 'sigmoid'?",
        ),
        ("scheduler: 5", "dpo.scheduler is 5; expected one of linear, cosine, constant, constant_with_warmup"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(problems, setting, complaint):
    assert problems(GOOD + f"  {setting}\n") == [f"recipe.yaml:6: {complaint}"]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("sft: {data: pairs.jsonl, packing: 1}", "sft.packing is 1; expected a boolean"),
        ("sft: {data: pairs.jsonl, neftune_alpha: 0}", "sft.neftune_alpha is 0; expected greater than 0"),
        ("sft: {data: pairs.jsonl, pakcing: true}", "unknown key 'pakcing' in sft; did you mean 'packing'?"),
        ("reward: {data: pairs.jsonl, margin: 1.0}", "reward.margin is 1.0; expected a boolean"),
        ("reward: {data: pairs.jsonl, centering: -1}", "reward.centering is -1; expected greater than or equal to 0"),
        ("reward: {data: pairs.jsonl, centring: 1}", "unknown key 'centring' in reward; did you mean 'centering'?"),
        ("lora: {init: lotfq}", "lora.init is 'lotfq'; expected one of default, gaussian, loftq, pissa; did you mean "
         "'loftq'?"),
        ("lora: {dora: 1}", "lora.dora is 1; expected a boolean"),
        ("sft: {start_from: null}", "'sft.data' is missing"),
        ("reward: []", "reward is []; expected keys below it"),
        ("reward: 5", "reward is 5; expected keys below it"),
        ("ppo: {data: pairs.jsonl}", "'ppo.reward' is missing"),
        ("ppo: {data: pairs.jsonl, reward: }", "ppo.reward is empty"),
        ("ppo: {data: pairs.jsonl, reward: []}", "ppo.reward is empty"),
        ("ppo: {data: pairs.jsonl, reward: 5}", "ppo.reward is 5; expected 'reward', a folder, a model, "
         "module:function, or a list of them"),
        ("ppo: {data: pairs.jsonl, reward: reward, judge: true}", "ppo.judge is True; expected a folder, a model, "
         "module:function, or a list of them"),
        ("ppo: {data: pairs.jsonl, reward: [reward, {source: 5}]}", "ppo.reward.1.source is 5; expected a string"),
        ("ppo: {data: pairs.jsonl, reward: {weight: 2}}", "'ppo.reward.source' is missing"),
        ("ppo: {data: pairs.jsonl, reward: {source: reward, wieght: 2}}", "unknown key 'wieght' in ppo.reward; did you "
         "mean 'weight'?"),
        ("ppo: {data: pairs.jsonl, reward: {source: reward, limit: 2}}", "unknown key 'limit' in ppo.reward; known: "
         "source, weight"),
        ("ppo: {data: pairs.jsonl, reward: reward, judge: [{source: json:loads, limit: 2}]}", "unknown key 'limit' in "
         "ppo.judge.0; known: source, weight"),
        ("ppo: {data: pairs.jsonl, reward: reward, eval_data: {path: pairs.jsonl, source: 2}}", "unknown key 'source' "
         "in ppo.eval_data; known: path, split, skip, limit, weight"),
        ("ppo: {data: pairs.jsonl, reward: {source: reward, weight: 0}}", "ppo.reward.weight: a reward with weight 0 "
         "does nothing; remove it"),
        ("ppo: {data: pairs.jsonl, reward: [json:loads, {source: reward, weight: 0}]}", "ppo.reward.1.weight: a reward "
         "with weight 0 does nothing; remove it"),
        ("ppo: {data: pairs.jsonl, reward: reward, kl_coeficient: 1}", "unknown key 'kl_coeficient' in ppo; did you "
         "mean 'kl_coefficient'?"),
        ("ppo: {data: pairs.jsonl, reward: reward, value: 1}", "ppo.value is 1; expected one of adapter, trunk"),
        ("ppo: {data: pairs.jsonl, reward: reward, on_alarm: halt}", "ppo.on_alarm is 'halt'; expected one of warn, "
         "slow, stop"),
        ("ppo: {data: pairs.jsonl, reward: reward, gae_lambda: 2}", "ppo.gae_lambda is 2; expected less than or equal "
         "to 1"),
    ],
)  # fmt: skip
def test_mistakes_in_the_other_sections_are_told_alike(problems, setting, complaint):
    assert problems(GOOD + setting + "\n") == [f"recipe.yaml:6: {complaint}"]


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("model: org/model\noutput: x\ndpo: {data: pairs.jsonl}\n", "recipe.yaml:1: model is 'org/model'; expected "),
        ("output: x\nmodel: {base: m/b}\ndpo: [1]\n", "recipe.yaml:3: dpo is [1]; expected "),
        ("output: x\nmodel: {base: m/b}\ndpo: {data: []}\n", "recipe.yaml:3: dpo.data is "),
    ],
)
def test_a_section_of_another_kind_is_one_problem_at_its_line(problems, text, beginning):
    (line,) = problems(text)

    assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("number", "value"), [("5e-6", 5e-6), ("1E-4", 1e-4), ("2.5e-5", 2.5e-5), ("1.e-3", 1e-3), ("5.0e-6", 5e-6)]
)
def test_a_number_with_an_exponent_is_a_number(read, number, value):
    assert read(GOOD + f"  learning_rate: {number}\n").dpo.learning_rate == value


@pytest.mark.parametrize("text", ["e5", "5e", "5e-", "v5e-6", "5e-6x"])
def test_what_only_resembles_a_number_stays_text(read, text):
    assert read(GOOD + f"  split: {text}\n").dpo.split == text


def test_what_is_missing_is_named_at_the_section_it_belongs_to(problems):
    assert problems("dpo:\n  beta: 0.1\nmodel:\n  max_length: 99\n") == [
        "recipe.yaml:1: 'output' is missing",
        "recipe.yaml:1: 'dpo.data' is missing",
        "recipe.yaml:3: 'model.base' is missing",
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_that_is_asked_for_must_be_there(problems, read, stage):
    without = "model: {base: org/model}\noutput: x\n"
    message = f"the recipe has no '{stage}:' section, which `python -m qalign.{stage}` needs"

    assert problems(without, stage=stage) == [f"recipe.yaml:1: {message}"]
    assert problems(with_stages(), f"{stage}=", stage=stage) == [f"command line: {message}"]
    assert getattr(read(without, stage=None), stage) is None
    assert read(with_stages(), f"{stage}=", stage=None).stages == tuple(name for name in STAGES if name != stage)


@pytest.mark.parametrize(
    ("settings", "rest"),
    [
        (
            "batch_size: 16\n  micro_batch_size: 3",
            "dpo.micro_batch_size: 3 does not divide batch_size 16; take a divisor, or 'auto'",
        ),
        (
            "loss: ipo\n  label_smoothing: 0.1",
            "dpo.label_smoothing: has no effect with loss 'ipo'; use loss 'robust' or remove it",
        ),
        ("loss: robust", "dpo.loss: 'robust' needs label_smoothing above 0, or it is 'sigmoid'"),
        ("gamma: 1.0", "dpo.gamma: has no effect with loss 'sigmoid'; use loss 'simpo' or remove it"),
    ],
)
def test_keys_that_do_not_go_together_are_told_by_name(problems, settings, rest):
    (line,) = problems(GOOD + f"  {settings}\n")

    place, _, message = line.partition(": ")
    assert message == rest
    assert place in [f"recipe.yaml:{number}" for number in range(4, 8)]  # the section's line or the key's own


@pytest.mark.parametrize(("stage", "number"), [("sft", 6), ("reward", 8), ("dpo", 10)])
def test_a_micro_batch_that_does_not_fit_is_told_in_every_stage(problems, stage, number):
    assert problems(with_stages(**{stage: "micro_batch_size: 3"})) == [
        f"recipe.yaml:{number}: {stage}.micro_batch_size: 3 does not divide batch_size 16; take a divisor, or 'auto'"
    ]


def test_clashes_in_several_stages_come_at_once(problems):
    text = with_stages(sft="micro_batch_size: 3", reward="eval_every: 5", dpo="gamma: 1.0", ppo="batch_size: 12")

    assert problems(text) == [
        "recipe.yaml:6: sft.micro_batch_size: 3 does not divide batch_size 16; take a divisor, or 'auto'",
        "recipe.yaml:9: reward.eval_every: has nothing to measure without eval_data; add it or remove this",
        "recipe.yaml:12: dpo.gamma: has no effect with loss 'sigmoid'; use loss 'simpo' or remove it",
        "recipe.yaml:15: ppo.batch_size: 12 answers don't divide into 2 mini-batches of whole prompts with 4 answers "
        "each",
    ]


@pytest.mark.parametrize(
    ("setting", "number", "complaint"),
    [
        (
            "batch_size: 10",
            12,
            "ppo.batch_size: 10 answers don't divide into 2 mini-batches of whole prompts with 4 answers each",
        ),
        (  # the key that is told about isn't there: the section's line
            "samples_per_prompt: 3",
            10,
            "ppo.batch_size: 64 answers don't divide into 2 mini-batches of whole prompts with 3 answers each",
        ),
        (
            "micro_batch_size: 6",
            12,
            "ppo.micro_batch_size: 6 is no multiple of samples_per_prompt 4 that divides a mini-batch of 32; take one, "
            "or 'auto'",
        ),
        ("eval_every: 5", 12, "ppo.eval_every: has nothing to measure without eval_data; add it or remove this"),
        (
            "judge: json:loads",
            12,
            "ppo.judge: has nothing to judge without eval_data; add held-out prompts or remove this",
        ),
        (
            "eval_data: pairs.jsonl\n  judge: reward",
            13,
            "ppo.judge: must not be what the policy trains on; name another reward run, or a function",
        ),
        (
            "max_new_tokens: 2048",
            12,
            "ppo.max_new_tokens: 2048 leaves no room for a prompt in model.max_length 2048; lower it, or raise "
            "model.max_length",
        ),
        (
            "kl_coefficient: 0\n  kl_target: 6",
            13,
            "ppo.kl_target: has no effect with kl_coefficient 0, which can't adapt; raise that, or remove this",
        ),
    ],
)
def test_what_does_not_go_together_in_ppo_is_told_at_its_line(problems, setting, number, complaint):
    assert problems(with_stages(ppo=setting), stage="ppo") == [f"recipe.yaml:{number}: {complaint}"]


def test_room_that_the_command_line_takes_is_told(problems):
    complaint = "ppo.max_new_tokens: {} leaves no room for a prompt in model.max_length {}; lower it, or raise "
    complaint += "model.max_length"

    assert problems(with_stages(), "model.max_length=128") == [f"recipe.yaml:10: {complaint.format(256, 128)}"]
    assert problems(with_stages(), "ppo.max_new_tokens=4096") == [f"command line: {complaint.format(4096, 2048)}"]


PISSA = (
    "lora.init: 'pissa' takes its start out of the base's own weights, which are 4-bit and shared by all roles here, "
    "and PEFT can't; 'loftq' is the start made for quantised bases"
)
NO_4_BITS = "lora.init: 'loftq' mends 4-bit weights, and model.quantization is 'int8'"
NO_DORA = "lora.init: 'loftq' and dora can't be combined, PEFT sets DoRA's sizes before LoftQ moves the weights"
MOVED = (
    "lora.init: 'loftq' would move the policy away from its reference before the first step of {}; set {}, or use "
    "'default'"
)
MOVED_IN_BOTH = MOVED.format("dpo and ppo", "dpo.start_from: sft and ppo.start_from: sft")


@pytest.mark.parametrize(
    ("model", "lora", "dpo", "complaint"),
    [
        ("", "init: pissa", "start_from: sft", PISSA),
        (", quantization: int8", "init: loftq", "start_from: sft", NO_4_BITS),  # one mistake about a key at a time
        ("", "dora: true, init: loftq", "start_from: sft", NO_DORA),
        ("", "init: loftq", "beta: 0.1", MOVED_IN_BOTH),
        ("", "init: loftq", "start_from: sft", MOVED.format("ppo", "ppo.start_from: sft")),
    ],
)
def test_a_start_that_does_not_go_together_with_the_rest_is_told_at_its_line(problems, model, lora, dpo, complaint):
    text = with_stages(dpo=dpo).replace("r: 8", lora).replace("org/model", f"org/model{model}")

    assert problems(text) == [f"recipe.yaml:3: {complaint}"]


def test_a_start_from_the_command_line_that_does_not_go_together_is_told_as_such(problems):
    assert problems(with_stages(), "lora.init=pissa") == [f"command line: {PISSA}"]
    assert problems(with_stages(), "lora.init=loftq") == [f"command line: {MOVED_IN_BOTH}"]
    assert problems(with_stages(ppo="start_from: sft"), "lora.init=loftq") == [
        f"command line: {MOVED.format('dpo', 'dpo.start_from: sft')}"
    ]


def test_an_sft_run_that_starts_from_itself_is_told_at_its_line(problems, read):
    message = "sft.start_from: an SFT run can't start from itself; name an adapter folder, or remove it"

    assert problems(with_stages(sft="start_from: sft")) == [f"recipe.yaml:6: {message}"]
    assert problems(with_stages(), "sft.start_from=sft") == [f"command line: {message}"]
    assert read(with_stages(reward="start_from: sft", dpo="start_from: sft")).dpo.start_from == "sft"


def test_an_adapter_on_the_head_is_refused(problems):
    (line,) = problems(GOOD + "lora: {targets: [q_proj, lm_head]}\n")

    assert line.startswith("recipe.yaml:6: lora.targets: 'lm_head' can't have an adapter")


def test_all_problems_come_at_once_in_the_order_of_lines(problems):
    text = """\
sead: 1
max_refused_share: 5
model:
  base: missing.gguf
  quantization: nf5
output: runs/x


dpo:
  beta: tiny
  data: [pairs.jsonl, missing.jsonl]
  trainer: {optm: adamw_torch}
"""

    lines = problems(text)

    assert [line.split(" ")[0] for line in lines] == [f"recipe.yaml:{number}:" for number in (1, 2, 4, 5, 10, 11, 12)]
    for line, word in zip(
        lines, ("sead", "max_refused_share", "missing.gguf", "nf5", "tiny", "missing.jsonl", "optm"), strict=True
    ):
        assert word in line


# --- YAML and the file itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {base: org/model\noutput: x\n", 2),
        (GOOD + "\tbeta: 0.1\n", 6),
        (GOOD + "  beta: [0.1\n", 7),
        (GOOD + "---\nmodel: x\n", 6),
        (GOOD + "? [a, b]\n: 1\n", 6),
    ],
)
def test_invalid_yaml_is_one_problem_with_its_line(problems, text, line):
    (only,) = problems(text)

    assert only.startswith(f"recipe.yaml:{line}: not valid YAML: ")


def test_yaml_runs_no_code(problems, folder):
    (line,) = problems(GOOD + "seed: !!python/object/apply:os.mkdir [ran]\n")

    assert line.startswith("recipe.yaml:6: not valid YAML: ")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(("text", "kind"), [("- model\n", "list"), ("just words\n", "str"), ("5\n", "int")])
def test_a_file_without_keys_is_no_recipe(problems, text, kind):
    (line,) = problems(text)

    assert line.startswith("recipe.yaml:1: a recipe is a set of keys")
    assert line.endswith(f", not {kind}")


@pytest.mark.parametrize("text", ["", "# to be written\n"])
def test_an_empty_recipe_lacks_everything(problems, text):
    assert problems(text) == [
        "recipe.yaml:1: 'model' is missing",
        "recipe.yaml:1: 'output' is missing",
        "recipe.yaml:1: the recipe has no 'dpo:' section, which `python -m qalign.dpo` needs",
    ]


def test_a_recipe_that_is_not_there_gets_the_nearest_one(folder):
    (folder / "mistral7b.yaml").write_text(GOOD)

    with pytest.raises(UserError) as caught:
        load("mistral.yaml")
    assert caught.value.lines == ("mistral.yaml: there is no such recipe; did you mean 'mistral7b.yaml'?",)
    with pytest.raises(UserError) as caught:
        load("nowhere/recipe.yaml")
    assert caught.value.lines == ("nowhere/recipe.yaml: there is no such recipe",)


def test_an_anchor_is_read_where_it_stands(problems):
    text = "model: {base: org/model}\noutput: x\ndpo:\n  data: &d [pairs.jsonl, gone.jsonl]\n  eval_data: *d\n"

    assert problems(text) == [
        "recipe.yaml:4: data: there is no file 'gone.jsonl'",
        "recipe.yaml:4: eval_data: there is no file 'gone.jsonl'",
    ]


# --- overrides -------------------------------------------------------------------------------------------------------


def test_an_override_is_read_as_yaml(read):
    recipe = read(
        GOOD + "  eval_data: pairs.jsonl\n",
        "dpo.max_steps=20",
        "dpo.learning_rate=1e-4",
        "dpo.eval_data=",
        "lora.r=8",
        "lora.targets=[q_proj, v_proj]",
        "dpo.trainer.optim=adafactor",
        "output=a=b",
    )

    assert (recipe.dpo.max_steps, recipe.dpo.learning_rate, recipe.dpo.eval_data) == (20, 1e-4, None)
    assert (recipe.lora.r, recipe.lora.targets) == (8, ["q_proj", "v_proj"])
    assert recipe.dpo.trainer == {"optim": "adafactor"}
    assert recipe.output == "a=b"


def test_an_override_makes_the_section_that_it_needs(read):
    recipe = read("model: {base: org/model}\noutput: x\n", "dpo.data=pairs.jsonl")

    assert recipe.dpo.data == (Source(path="pairs.jsonl"),)


def test_the_last_of_two_overrides_holds(read):
    assert read(GOOD, "seed=1", "seed=2").seed == 2


def test_an_override_mends_a_mistake_in_the_file(read):
    assert read(GOOD + "  beta: tiny\n", "dpo.beta=0.2").dpo.beta == 0.2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("dpo.max_stpes=20", "command line: unknown key 'max_stpes' in dpo; did you mean 'max_steps'?"),
        ("sead=20", "command line: unknown key 'sead'; did you mean 'seed'?"),
        ("dpo.beta=tiny", "command line: dpo.beta is 'tiny'; expected a number"),
        ("dpo.beta=0", "command line: dpo.beta is 0; expected greater than 0"),
        ("dpo.data=gone.jsonl", "command line: data: there is no file 'gone.jsonl'"),
        ("dpo.data=[pairs.jsonl, gone.jsonl]", "command line: data: there is no file 'gone.jsonl'"),
        ("dpo.trainer.optm=x", "command line: unknown key 'optm' in dpo.trainer; did you mean 'optim'?"),
        ("dpo.max_steps", "command line: 'dpo.max_steps' is not KEY=VALUE; write for example dpo.max_steps=20"),
        ("=20", "command line: '=20' is not KEY=VALUE; write for example dpo.max_steps=20"),
        ("dpo..beta=20", "command line: 'dpo..beta=20' is not KEY=VALUE; write for example dpo.max_steps=20"),
        ("model.base.name=x", "command line: 'model.base.name=x': base is a value, not a section"),
        ("lora.targets=[q_proj", "command line: 'lora.targets=[q_proj': the value is not valid YAML; quote it"),
    ],
)
def test_a_bad_override_is_told_as_such(problems, override, line):
    assert problems(GOOD, override) == [line]


def test_mistakes_in_the_file_keep_their_lines_beside_an_override(problems):
    lines = problems(GOOD + "  betta: 0.1\n", "dpo.max_steps=0")

    assert sorted(lines) == [
        "command line: dpo.max_steps is 0; expected greater than or equal to 1",
        "recipe.yaml:6: unknown key 'betta' in dpo; did you mean 'beta'?",
    ]


# --- what the recipe points at ---------------------------------------------------------------------------------------


def test_a_missing_data_file_gets_its_nearest_neighbour(problems):
    assert problems(GOOD.replace("pairs.jsonl", "piars.jsonl")) == [
        "recipe.yaml:5: data: there is no file 'piars.jsonl'; did you mean 'pairs.jsonl'?"
    ]


def test_each_missing_source_of_a_list_is_found_at_its_own_line(problems):
    text = """\
model: {base: org/model}
output: x
dpo:
  data:
  - pairs.jsonl
  - ./gone
  - {path: gone.csv, limit: 5}
  - org/on-the-hub
  eval_data:
    path: gone.parquet
"""

    assert problems(text) == [
        "recipe.yaml:6: data: there is no file './gone'",
        "recipe.yaml:7: data: there is no file 'gone.csv'",
        "recipe.yaml:9: eval_data: there is no file 'gone.parquet'",
    ]


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        ("gone.gguf", "base: there is no 'gone.gguf'"),
        ("./gone", "base: there is no './gone'"),
        (
            "package:no_such_package/model.gguf",
            "base: the package 'no_such_package' is not installed; `make setup` installs the demo's, or pip install it",
        ),
        (
            "package:qalign/recipe.pz",
            "base: the package 'qalign' holds no file 'recipe.pz'; did you mean 'recipe.py'?",
        ),
        ("package:qalign/gone/model.gguf", "base: the package 'qalign' holds no file 'gone/model.gguf'"),
    ],
)
def test_a_missing_base_is_found_before_anything_is_loaded(problems, base, complaint):
    assert problems(GOOD.replace("org/model", base)) == [f"recipe.yaml:2: {complaint}"]


@pytest.mark.parametrize(("stage", "number"), [("sft", 6), ("reward", 8), ("dpo", 10), ("ppo", 12)])
@pytest.mark.parametrize("makes", [None, "folder", "empty file"])
def test_start_from_must_be_an_adapter_folder(problems, folder, makes, stage, number):
    if makes == "folder":
        (folder / "adapter").mkdir()
    if makes == "empty file":
        (folder / "adapter").touch()

    assert problems(with_stages(**{stage: "start_from: adapter"})) == [
        f"recipe.yaml:{number}: start_from: 'adapter' is neither 'sft' nor a PEFT adapter folder "
        "(no adapter_config.json in it)"
    ]


def test_start_from_sft_is_the_run_and_not_a_folder_of_that_name(read, folder):
    (folder / "sft").mkdir()
    (folder / "sft" / "adapter_config.json").touch()

    recipe = read(with_stages(reward="start_from: sft", dpo="start_from: sft", ppo="start_from: sft"))
    assert (recipe.reward.start_from, recipe.dpo.start_from, recipe.ppo.start_from) == ("sft", "sft", "sft")

    folder_meant = read(with_stages(sft="start_from: ./sft"))
    assert folder_meant.sft.start_from == "./sft"
    assert read(dump(folder_meant)) == folder_meant


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_data_file_is_found_in_every_stage(problems, stage):
    number = 5 + 2 * STAGES.index(stage)

    assert problems(with_stages(), f"{stage}.data=gone.jsonl") == ["command line: data: there is no file 'gone.jsonl'"]
    text = with_stages().splitlines()
    text[number - 1] = "  data: gone.jsonl"
    assert problems("\n".join(text)) == [f"recipe.yaml:{number}: data: there is no file 'gone.jsonl'"]


def test_the_file_of_a_package_is_found_without_importing_it(folder, monkeypatch):
    (folder / "heavy" / "weights").mkdir(parents=True)
    (folder / "heavy" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "heavy" / "weights" / "model.gguf").touch()
    monkeypatch.syspath_prepend(folder)

    assert package_file("package:heavy/weights/model.gguf") == folder / "heavy" / "weights" / "model.gguf"


def test_a_path_is_looked_up_from_here_and_then_beside_the_recipe(folder):
    beside = folder / "project"
    (beside / "adapter").mkdir(parents=True)
    (beside / "adapter" / "adapter_config.json").touch()
    (beside / "rows").mkdir()
    for name in ("model.gguf", "train.jsonl", "test.jsonl", "pairs.jsonl"):
        (beside / name).touch()
    (beside / "recipe.yaml").write_text("""\
model: {base: model.gguf}
output: runs/x
dpo:
  data: [train.jsonl, {path: pairs.jsonl, weight: 2.0}, rows, org/on-the-hub]
  eval_data: test.jsonl
  start_from: adapter
""")

    recipe = load("project/recipe.yaml", stage="dpo")

    assert recipe.model.base == "project/model.gguf"
    assert recipe.dpo.data == (
        Source(path="project/train.jsonl"),
        Source(path="pairs.jsonl", weight=2.0),  # there is one here too
        Source(path="project/rows"),
        Source(path="org/on-the-hub"),
    )
    assert recipe.dpo.eval_data == (Source(path="project/test.jsonl"),)
    assert recipe.dpo.start_from == "project/adapter"
    assert recipe.output == "runs/x"


def test_a_tilde_is_the_home_folder(folder, monkeypatch, read):
    monkeypatch.setenv("HOME", str(folder))

    assert read(GOOD.replace("pairs.jsonl", "~/pairs.jsonl")).dpo.data == (Source(path=f"{folder}/pairs.jsonl"),)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("pairs.jsonl", True),
        ("gone.jsonl", True),
        ("gone.jsonl.gz", True),
        ("org/gone.parquet", True),
        ("gone.gguf", True),
        ("./gone", True),
        ("../gone", True),
        ("/gone", True),
        ("~/gone", True),
        ("runs/gone/reward", True),  # a hub id has one slash at most
        ("org/name", False),
        ("imdb", False),
    ],
)
def test_what_names_something_on_disk_and_what_a_hub_id(folder, path, local):
    assert looks_local(path) is local


# --- what scores answers ---------------------------------------------------------------------------------------------

REWARDS = """\
import math as maths
from statistics import mean

WORDS: int = 5
length = lambda completions: [len(text) for text in completions]

try:
    def fast(completions): ...
except ImportError:
    fast = None


def short(completions):
    inside = 1
    return [1.0 / len(text) for text in completions]


class Judge:
    def within(self): ...
"""


def make_adapter(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "adapter_config.json").touch()


@pytest.fixture
def scorers(folder) -> Path:
    """The current directory with functions, a reward run, a model, and a folder that is neither."""
    (folder / "rewards.py").write_text(REWARDS)
    make_adapter(folder / "runs" / "a" / "reward" / "adapter")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()
    (folder / "empty").mkdir()
    (folder / "notes.txt").touch()
    return folder


NEITHER = "holds no finished reward run (adapter_config.json) and no model (config.json)"


@pytest.mark.parametrize("key", ["reward", "judge"])
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("rewards.py:shrot", "rewards.py has no function 'shrot'; did you mean 'short'?"),
        ("rewards.py:lenght", "rewards.py has no function 'lenght'; did you mean 'length'?"),
        ("rewards:shrot", "rewards has no function 'shrot'; did you mean 'short'?"),
        ("rewards.py:inside", "rewards.py has no function 'inside'"),
        ("rewards.py:within", "rewards.py has no function 'within'"),
        ("json:laods", "json has no function 'laods'; did you mean 'loads'?"),
        ("json.decoder:JSONDecodr", "json.decoder has no function 'JSONDecodr'; did you mean 'JSONDecoder'?"),
        ("gone.py:short", "there is no file 'gone.py' to take the function 'short' from"),
        ("no_such_module:short", "there is no module 'no_such_module' to take the function 'short' from"),
        ("no_such.module:short", "there is no module 'no_such.module' to take the function 'short' from"),
        ("json.gone:short", "there is no module 'json.gone' to take the function 'short' from"),
        (".rewards:short", "there is no module '.rewards' to take the function 'short' from"),
        ("rewards.py", "'rewards.py' names no function; write rewards.py:FUNCTION"),
        ("./gone", "there is no './gone'"),
        ("~/gone", "there is no '~/gone'"),
        ("runs/gone/reward", "there is no 'runs/gone/reward'"),
        ("empty", f"'empty' {NEITHER}"),
        ("./empty", f"'./empty' {NEITHER}"),
        ("runs", f"'runs' {NEITHER}"),
        ("notes.txt", f"'notes.txt' {NEITHER}"),
    ],
)
def test_a_reward_that_is_not_there_is_found_before_anything_is_loaded(problems, scorers, key, source, complaint):
    setting = f"reward: {source}" if key == "reward" else f"judge: {source}\n  eval_data: pairs.jsonl"

    assert problems(with_stages(ppo=setting), stage="ppo") == [f"recipe.yaml:12: {key}: {complaint}"]


def test_each_reward_of_a_list_is_found_at_its_own_line(problems, scorers):
    text = """\
model: {base: org/model}
output: x
ppo:
  data: pairs.jsonl
  eval_data: pairs.jsonl
  reward:
  - reward
  - runs/a/gone
  - {source: rewards.py:shrot, weight: 0.5}
  - rewards.py:short
  - weight: 2.0
    source: ./gone
  judge:
    source: empty
"""

    assert problems(text, stage="ppo") == [
        "recipe.yaml:8: reward: there is no 'runs/a/gone'",
        "recipe.yaml:9: reward: rewards.py has no function 'shrot'; did you mean 'short'?",
        "recipe.yaml:11: reward: there is no './gone'",
        f"recipe.yaml:13: judge: 'empty' {NEITHER}",
    ]
    assert problems(with_stages(), "ppo.reward=gone.py:f", stage="ppo") == [
        "command line: reward: there is no file 'gone.py' to take the function 'f' from"
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("reward", "reward"),
        ("runs/a", "runs/a/reward/adapter"),
        ("runs/a/reward", "runs/a/reward/adapter"),
        ("./runs/a/reward/adapter", "runs/a/reward/adapter"),
        ("model", "model"),
        ("org/on-the-hub", "org/on-the-hub"),
        ("gpt2", "gpt2"),
        ("rewards.py:short", "rewards.py:short"),
        ("./rewards.py:short", "rewards.py:short"),
        ("json:loads", "json:loads"),
        ("json.decoder:JSONDecoder", "json.decoder:JSONDecoder"),
        ("rewards.py:length", "rewards.py:length"),
        ("rewards.py:fast", "rewards.py:fast"),
        ("rewards.py:mean", "rewards.py:mean"),
        ("rewards.py:Judge", "rewards.py:Judge"),
    ],
)
def test_a_reward_that_is_there_is_taken(read, scorers, source, found):
    recipe = read(with_stages(ppo=f"reward: {source}"), stage="ppo")

    assert [reward.source for reward in recipe.ppo.reward] == [found]
    assert read(dump(recipe), stage="ppo") == recipe


def test_a_reward_is_looked_up_from_here_and_then_beside_the_recipe(folder):
    beside = folder / "project"
    make_adapter(beside / "other" / "reward" / "adapter")
    make_adapter(beside / "plain")
    (beside / "rewards.py").write_text(REWARDS)
    (beside / "tools").mkdir()
    (beside / "tools" / "style.py").write_text(REWARDS)
    (beside / "recipe.yaml").write_text(
        with_stages(ppo="reward: [other, plain, rewards.py:short, rewards:short, tools.style:short]")
    )

    sources = [reward.source for reward in load("project/recipe.yaml").ppo.reward]

    assert sources == [
        "project/other/reward/adapter",
        "project/plain",
        "project/rewards.py:short",
        "project/rewards.py:short",  # as no module: what stands beside a recipe, Python doesn't find by name
        "project/tools/style.py:short",
    ]


def test_a_folder_beside_the_recipe_that_holds_no_reward_is_told(folder):
    (folder / "project" / "empty").mkdir(parents=True)
    (folder / "project" / "recipe.yaml").write_text(with_stages(ppo="reward: empty"))

    with pytest.raises(UserError) as caught:
        load("project/recipe.yaml")
    assert caught.value.lines == (f"project/recipe.yaml:12: reward: 'empty' {NEITHER}",)


def test_the_reward_run_is_meant_and_not_a_folder_of_that_name(read, folder):
    make_adapter(folder / "reward")

    assert read(with_stages()).ppo.reward[0].source == "reward"

    folder_meant = read(with_stages(ppo="reward: ./reward"))
    assert folder_meant.ppo.reward[0].source == "./reward"
    assert read(dump(folder_meant)) == folder_meant


def test_the_functions_of_a_module_are_found_without_importing_it_or_its_package(read, problems, folder, monkeypatch):
    (folder / "heavy" / "deep").mkdir(parents=True)
    for package in ("heavy", "heavy/deep"):
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')\ndef here(): ...\n")
    (folder / "heavy" / "rewards.py").write_text("raise RuntimeError('imported')\n" + REWARDS)
    monkeypatch.syspath_prepend(folder)

    for source in ("heavy:here", "heavy.deep:here", "heavy.rewards:short"):
        assert read(with_stages(ppo=f"reward: {source}")).ppo.reward[0].source == source
    assert problems(with_stages(ppo="reward: heavy.rewards:shrot")) == [
        "recipe.yaml:12: reward: heavy.rewards has no function 'shrot'; did you mean 'short'?"
    ]


@pytest.mark.parametrize(
    "text",
    ["from json import *\n", "def __getattr__(name): ...\n", "def broken(:\n", "x = '\0'\n"],
    ids=["star import", "made when asked for", "not Python", "a null"],
)
def test_where_only_importing_would_tell_whether_there_is_a_function_it_is_taken(read, folder, text):
    (folder / "rewards.py").write_text(text)

    assert read(with_stages(ppo="reward: rewards.py:score")).ppo.reward[0].source == "rewards.py:score"


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        ("runs/a", "runs/a/reward"),
        ("runs/a/reward/adapter", "./runs/a"),
        ("reward", "runs/x/reward"),  # the recipe's output is runs/x
        ("reward", "./runs/x/reward/adapter"),
        ("runs/x", "reward"),
        ("rewards.py:short", "rewards:short"),
        ("./rewards.py:short", "rewards.py:short"),
        ("model", "./model"),
    ],
)
def test_a_judge_that_is_the_reward_under_another_name_is_told(problems, scorers, reward, judge):
    make_adapter(scorers / "runs" / "x" / "reward" / "adapter")
    text = with_stages(ppo=f"reward: {reward}\n  judge: ['json:loads', '{judge}']\n  eval_data: pairs.jsonl")

    assert problems(text, stage="ppo") == [
        f"recipe.yaml:13: judge: '{judge}' is what the policy trains on, as '{reward}'; name another"
    ]


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        ("rewards.py:short", "rewards.py:length"),
        ("reward", "runs/a/reward"),
        ("org/model", "org/other"),
        ("json:loads", "runs/a"),
    ],
)
def test_a_judge_of_its_own_is_taken(read, scorers, reward, judge):
    recipe = read(with_stages(ppo=f"reward: {reward}\n  judge: {judge}\n  eval_data: pairs.jsonl"), stage="ppo")

    assert len(recipe.ppo.judge) == 1


# --- trainer: --------------------------------------------------------------------------------------------------------


def test_a_key_of_trl_is_passed_on(read):
    recipe = read(GOOD + "  trainer: {optim: paged_adamw_8bit, weight_decay: 0.01}\n")

    assert recipe.dpo.trainer == {"optim": "paged_adamw_8bit", "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("weight_deacy", "unknown key 'weight_deacy' in dpo.trainer; did you mean 'weight_decay'?"),
        ("zzz", "unknown key 'zzz' in dpo.trainer"),
        ("output_dir", "trainer.output_dir: set it as output"),
        ("seed", "trainer.seed: set it as seed"),
        ("max_length", "trainer.max_length: set it as model.max_length"),
        ("bf16", "trainer.bf16: set it as model.compute_dtype"),
        ("beta", "trainer.beta: set it as dpo.beta"),
        ("loss_type", "trainer.loss_type: set it as dpo.loss"),
        ("num_train_epochs", "trainer.num_train_epochs: set it as dpo.epochs"),
        ("gradient_accumulation_steps", "trainer.gradient_accumulation_steps: set it as dpo.batch_size"),
        ("warmup_ratio", "trainer.warmup_ratio: set it as dpo.warmup_ratio"),
        ("gradient_checkpointing", "trainer.gradient_checkpointing: set it as dpo.checkpointed_layers"),
        ("activation_checkpointing", "trainer.activation_checkpointing: set it as dpo.checkpointed_layers"),
        (
            "sync_ref_model",
            "trainer.sync_ref_model: has no effect, qalign does this part of TRL's trainer itself; remove it",
        ),
        (
            "precompute_ref_log_probs",
            "trainer.precompute_ref_log_probs: has no effect, qalign does this part of TRL's trainer itself; remove it",
        ),
    ],
)
def test_a_trainer_key_that_would_do_nothing_is_refused(problems, key, complaint):
    assert problems(GOOD + f"  trainer:\n    weight_decay: 0.1\n    {key}: 1\n") == [f"recipe.yaml:8: {complaint}"]


NOT_OURS = "has no effect, qalign does this part of TRL's trainer itself; remove it"


@pytest.mark.parametrize(
    ("stage", "key", "complaint"),
    [
        ("sft", "packing", "trainer.packing: set it as sft.packing"),
        ("sft", "neftune_noise_alpha", "trainer.neftune_noise_alpha: set it as sft.neftune_alpha"),
        ("sft", "learning_rate", "trainer.learning_rate: set it as sft.learning_rate"),
        ("sft", "seed", "trainer.seed: set it as seed"),
        ("sft", "chat_template_path", "trainer.chat_template_path: set it as model.chat_template"),
        ("sft", "assistant_only_loss", f"trainer.assistant_only_loss: {NOT_OURS}"),
        ("sft", "eos_token", f"trainer.eos_token: {NOT_OURS}"),
        (
            "sft",
            "packing_strategy",
            "trainer.packing_strategy: can't be used here; only 'bfd' keeps packed dialogues whole and apart",
        ),
        ("sft", "sync_ref_model", "unknown key 'sync_ref_model' in sft.trainer"),
        ("reward", "center_rewards_coefficient", "trainer.center_rewards_coefficient: set it as reward.centering"),
        ("reward", "disable_dropout", "trainer.disable_dropout: set it as lora.dropout"),
        ("reward", "num_train_epochs", "trainer.num_train_epochs: set it as reward.epochs"),
        ("reward", "pad_token", f"trainer.pad_token: {NOT_OURS}"),
        ("reward", "packing_strategy", "unknown key 'packing_strategy' in reward.trainer"),
        ("dpo", "chat_template_path", "unknown key 'chat_template_path' in dpo.trainer"),
        ("dpo", "packing", "unknown key 'packing' in dpo.trainer"),
        ("ppo", "output_dir", "trainer.output_dir: set it as output"),
        ("ppo", "learning_rate", "trainer.learning_rate: set it as ppo.learning_rate"),
        ("ppo", "gamma", "trainer.gamma: set it as ppo.gamma"),
        ("ppo", "gradient_accumulation_steps", "trainer.gradient_accumulation_steps: set it as ppo.batch_size"),
        (
            "ppo",
            "gradient_checkpointing_kwargs",
            "trainer.gradient_checkpointing_kwargs: set it as ppo.checkpointed_layers",
        ),
        (
            "ppo",
            "activation_checkpointing_kwargs",
            "trainer.activation_checkpointing_kwargs: set it as ppo.checkpointed_layers",
        ),
        ("ppo", "pad_token", f"trainer.pad_token: {NOT_OURS}"),
        ("ppo", "weight_deacy", "unknown key 'weight_deacy' in ppo.trainer; did you mean 'weight_decay'?"),
        (
            "ppo",
            "logging_steps",
            "unknown key 'logging_steps' in ppo.trainer; it takes the optimiser's settings: adam_beta1, adam_beta2, "
            "adam_epsilon, lr_scheduler_kwargs, max_grad_norm, optim, optim_args, weight_decay",
        ),
        (
            "ppo",
            "report_to",
            "unknown key 'report_to' in ppo.trainer; it takes the optimiser's settings: adam_beta1, "
            "adam_beta2, adam_epsilon, lr_scheduler_kwargs, max_grad_norm, optim, optim_args, weight_decay",
        ),
    ],
)
def test_each_stage_has_trainer_keys_of_its_own(problems, stage, key, complaint):
    number = 6 + 2 * STAGES.index(stage)
    (line,) = problems(with_stages(**{stage: f"trainer: {{weight_decay: 0.1, {key}: 1}}"}))

    assert line == f"recipe.yaml:{number}: {complaint}" or line.startswith(f"recipe.yaml:{number}: {complaint}; did ")


@pytest.mark.parametrize(
    ("stage", "trainer"),
    [
        ("sft", {"loss_type": "dft", "neftune_noise_alpha": 5}),
        ("reward", {"neftune_noise_alpha": 5}),
        ("dpo", {"loss_type": "ipo", "packing": True}),
        ("ppo", {"loss_type": "ipo", "weight_decay": 0.1}),
    ],
)
def test_mistakes_under_trainer_come_with_those_of_other_stages(problems, stage, trainer):
    """What one stage refuses, another may take: each is checked against its own config."""
    text = yaml.safe_load(with_stages())
    text[stage]["trainer"] = trainer
    text["sft" if stage != "sft" else "dpo"]["trainer"] = {"optm": "adafactor"}

    lines = problems(yaml.safe_dump(text, sort_keys=False))

    refused = {"sft": ["neftune_noise_alpha"], "reward": [], "dpo": ["loss_type", "packing"], "ppo": ["loss_type"]}[
        stage
    ]
    assert len(lines) == len(refused) + 1
    for key in (*refused, "optm"):
        assert any(key in line for line in lines)


def fields_of_trl(stage: str) -> set[str]:
    import trl

    config = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("stage", LOOPS_OF_TRL)
def test_trainer_keys_reads_the_fields_of_trls_config_from_source(stage):
    fields = fields_of_trl(stage)

    assert trainer_keys(stage) == fields, (
        f"HOOK BROKEN: trainer_keys('{stage}') parses transformers/training_args.py, trl/trainer/base_config.py and "
        f"trl/trainer/{stage}_config.py for the fields of TRL's config, which an upgrade has moved. "
        f"Only in the config: {sorted(fields - trainer_keys(stage))}; "
        f"only parsed: {sorted(trainer_keys(stage) - fields)}"
    )


def test_what_ppo_takes_are_settings_of_transformers_trainer():
    import transformers

    gone = trainer_keys("ppo") - {field.name for field in dataclasses.fields(transformers.TrainingArguments)}

    assert "optim" in trainer_keys("ppo")
    assert not gone, f"HOOK BROKEN: transformers' TrainingArguments has these keys no more: {gone}"


@pytest.mark.parametrize("stage", LOOPS_OF_TRL)
def test_every_trainer_key_that_is_refused_by_name_is_still_trls(stage):
    owned, without_effect = {**_OWNED, **_OWNED_BY_STAGE[stage]}, _WITHOUT_EFFECT | _WITHOUT_EFFECT_BY_STAGE[stage]
    not_here = {**_NOT_HERE, **_NOT_HERE_BY_STAGE[stage]}
    gone = (owned.keys() | without_effect | not_here.keys()) - fields_of_trl(stage)

    assert not gone, (
        f"HOOK BROKEN: TRL's config of {stage} has these keys no more, drop them from trainer_keys.py: {gone}"
    )
    assert len(owned.keys() | without_effect | not_here.keys()) == len(owned) + len(without_effect) + len(not_here)
    assert not _OWNED.keys() & _OWNED_BY_STAGE[stage].keys()
    assert not _WITHOUT_EFFECT & _WITHOUT_EFFECT_BY_STAGE[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_every_owner_of_a_trainer_key_is_a_key_that_can_be_set(stage):
    owned = {**_OWNED, **_OWNED_BY_STAGE[stage]}
    known = {*Recipe.model_fields, *SECTIONS[stage].model_fields}
    known |= {f"{name}.{key}" for name, section in (("model", Model), ("lora", Lora)) for key in section.model_fields}
    taken = fields_of_trl(stage) if stage in LOOPS_OF_TRL else trainer_keys(stage)
    free = taken - owned.keys() - _WITHOUT_EFFECT - _WITHOUT_EFFECT_BY_STAGE[stage]

    assert set(owned.values()) <= known | {f"trainer.{key}" for key in free}


# --- and back --------------------------------------------------------------------------------------------------------

FULL = """\
model:
  base: org/model
  revision: 0123abc
  quantization: fp4
  double_quant: false
  compute_dtype: float32
  max_length: 512
  chat_template_kwargs: {enable_thinking: false, name: Größe}
lora: {r: 8, alpha: 12.5, dropout: 0.05, targets: [q_proj, v_proj], rslora: true, dora: true, init: gaussian}
output: "runs/a run: Größe №1"
seed: 7
max_refused_share: 0.5
sft:
  data: [{path: pairs.jsonl, limit: 3}]
  packing: true
  neftune_alpha: 5
  start_from: null
reward:
  data: org/pairs
  margin: true
  centering: 1e-2
  start_from: sft
dpo:
  data: [pairs.jsonl, {path: org/pairs, split: train_prefs, limit: 9, weight: 0.5}]
  split: test
  limit: 100
  eval_data: pairs.jsonl
  epochs: 2
  max_steps: 30
  batch_size: 8
  micro_batch_size: 2
  learning_rate: 5e-6
  scheduler: linear
  warmup_ratio: 0.0
  eval_every: 10
  save_every: 5
  trainer: {optim: adafactor, weight_decay: 1.0e-3, report_to: [none]}
  loss: simpo
  beta: 2
  gamma: 0.25
  sft_weight: 1.0e-5
ppo:
  data: [{path: pairs.jsonl, skip: 2, limit: 3}]
  eval_data: {path: org/pairs, split: test_prefs, limit: 64}
  reward: [reward, {source: "json:loads", weight: -0.5}]
  judge: org/model
  kl_target: 6
  kl_stop: null
  gae_lambda: 1
  value: trunk
  on_alarm: stop
  trainer: {optim: adafactor, adam_epsilon: 1.0e-6}
"""


@pytest.mark.parametrize("text", [GOOD, FULL])
def test_what_is_dumped_reads_back_as_the_same_recipe(read, text):
    recipe = read(text)

    again = read(dump(recipe))

    assert again == recipe
    assert dump(again) == dump(recipe)


def test_the_dump_writes_every_default_out(read):
    written = yaml.safe_load(dump(read(GOOD)))

    assert written["dpo"]["beta"] == 0.1
    assert written["dpo"]["data"] == [{"path": "pairs.jsonl", "split": None, "skip": 0, "limit": None, "weight": 1.0}]
    assert written["model"]["quantization"] == "nf4"
    assert set(written) == set(Recipe.model_fields)
    assert set(written["dpo"]) == set(DPO.model_fields)
    assert (written["sft"], written["reward"], written["ppo"]) == (None, None, None)
    for stage, section in SECTIONS.items():
        every = yaml.safe_load(dump(read(with_stages())))[stage]
        assert set(every) == set(section.model_fields)
    assert (every["reward"], every["judge"]) == ([{"source": "reward", "weight": 1.0}], None)


def test_what_a_run_keeps_means_the_same_in_any_directory(read, folder):
    """Files and folders from the root; a module by its name, even where a folder has it too."""
    (folder / "rewards.py").write_text("def short(): ...\n")
    (folder / "json").mkdir()
    make_adapter(folder / "other" / "adapter")
    text = with_stages(ppo="reward: [reward, 'rewards.py:short', 'json:loads', other, org/model]")

    kept = absolute(read(text)).ppo

    assert [reward.source for reward in kept.reward] == [
        "reward",
        f"{folder}/rewards.py:short",
        "json:loads",
        f"{folder}/other/adapter",
        "org/model",
    ]


# --- the command -----------------------------------------------------------------------------------------------------

BROKEN = """\
model:
  base: org/model
output: runs/broken
dpo:
  lerning_rate: 5e-6
  beta: a tenth
  data: missing.jsonl
"""


def run_python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_command_tells_three_mistakes_in_three_lines(folder):
    (folder / "broken.yaml").write_text(BROKEN)

    run = run_python("-m", "qalign.dpo", "broken.yaml", cwd=folder)

    lines = run.stderr.splitlines()
    assert run.returncode == 2
    assert [line.split(" ")[0] for line in lines] == ["broken.yaml:5:", "broken.yaml:6:", "broken.yaml:7:"]
    assert "unknown key 'lerning_rate'" in lines[0]
    assert "did you mean 'learning_rate'?" in lines[0]
    assert "dpo.beta is 'a tenth'; expected a number" in lines[1]
    assert "there is no file 'missing.jsonl'" in lines[2]
    assert "Traceback" not in run.stderr + run.stdout
    assert not (folder / "runs").exists()


def test_the_command_tells_mistakes_before_torch_is_imported(folder):
    (folder / "broken.yaml").write_text(BROKEN)
    script = (
        "import runpy, sys\n"
        "sys.argv = ['qalign.dpo', 'broken.yaml']\n"
        "try:\n    runpy.run_module('qalign.dpo', run_name='__main__')\n"
        "except SystemExit as leaving:\n    code = leaving.code\n"
        "slow = {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "print(code, sorted(slow))\n"
    )

    run = run_python("-c", script, cwd=folder)

    assert run.stdout == "2 []\n"
    assert len(run.stderr.splitlines()) == 3


def test_ppos_command_tells_a_reward_that_is_not_there_before_torch_is_imported(folder):
    (folder / "rewards.py").write_text("def length(completions): ...\n")
    (folder / "broken.yaml").write_text(
        "model: {base: org/model}\noutput: runs/x\nppo:\n  data: pairs.jsonl\n  eval_data: pairs.jsonl\n"
        "  reward:\n  - runs/gone/reward\n  - rewards.py:lenght\n  judge: torch.nn.no_such:f\n"
    )
    script = (
        "import runpy, sys\n"
        "sys.argv = ['qalign.ppo', 'broken.yaml']\n"
        "try:\n    runpy.run_module('qalign.ppo', run_name='__main__')\n"
        "except SystemExit as leaving:\n    code = leaving.code\n"
        "slow = {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "print(code, sorted(slow))\n"
    )

    run = run_python("-c", script, cwd=folder)

    assert run.stdout == "2 []\n"
    assert run.stderr.splitlines() == [
        "broken.yaml:7: reward: there is no 'runs/gone/reward'",
        "broken.yaml:8: reward: rewards.py has no function 'lenght'; did you mean 'length'?",
        "broken.yaml:9: judge: there is no module 'torch.nn.no_such' to take the function 'f' from",
    ]


# --- what once went wrong --------------------------------------------------------------------------------------------


def test_a_key_that_is_set_twice_is_not_silently_overruled(problems):
    assert problems(GOOD + "  beta: 0.1\n  beta: 0.2\n") == [
        "recipe.yaml:6: 'beta' is set more than once, in lines 6, 7"
    ] or problems(GOOD + "  beta: 0.1\n  beta: 0.2\n") == ["recipe.yaml:7: 'beta' is set more than once, in lines 6, 7"]


@pytest.mark.parametrize(
    "text", [GOOD.replace("\n  data: pairs.jsonl", ""), GOOD.replace("pairs.jsonl", "pairs.jsonl")]
)
def test_an_empty_section_is_no_section(problems, text):
    found = problems(text, "dpo=")
    assert found == ["command line: the recipe has no 'dpo:' section, which `python -m qalign.dpo` needs"]


def test_an_empty_section_can_be_filled_from_the_command_line(read):
    assert read(GOOD.replace("\n  data: pairs.jsonl", ""), "dpo.data=pairs.jsonl").dpo.data[0].path == "pairs.jsonl"


def test_all_contradictions_are_told_at_once(problems):
    assert problems(GOOD + "  micro_batch_size: 3\n  gamma: 1.0\n  eval_every: 5\n") == [
        "recipe.yaml:6: dpo.micro_batch_size: 3 does not divide batch_size 16; take a divisor, or 'auto'",
        "recipe.yaml:7: dpo.gamma: has no effect with loss 'sigmoid'; use loss 'simpo' or remove it",
        "recipe.yaml:8: dpo.eval_every: has nothing to measure without eval_data; add it or remove this",
    ]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("lora: {targets: lm_head}", "lora.targets: 'lm_head' can't have an adapter, log-probs are computed from its"),
        ("lora: {targets: [q_proj, 5]}", "lora.targets.1 is 5; expected a string"),
        ("lora: {targets: 5}", "lora.targets is 5; expected 'all-linear' or a list of module names"),
        ("dpo: {data: pairs.jsonl, trainer: {5: 5}}", "dpo.trainer.5 is 5; expected a string"),
        ("dpo: {data: pairs.jsonl, beta: .inf}", "dpo.beta is inf; expected a finite number"),
        ("dpo: {data: []}", "dpo.data is empty"),
        ("dpo: {data: {path: pairs.jsonl, limit: 0}}", "dpo.data.limit is 0; expected greater than or equal to 1"),
        ("output: ''", "output is empty"),
        ("model: 5", "model is 5; expected keys below it"),
        ("model: {base: package:a.b/x.gguf}", "base: the package 'a.b' is not installed; `make setup` installs"),
        ("model: {base: org/model, chat_template: gone.jinja}", "chat_template: there is no file 'gone.jinja'"),
    ],
)
def test_one_mistake_is_one_line(problems, setting, complaint):
    keys = {
        line.partition(":")[0]: line for line in ("model: {base: org/model}", "output: x", "dpo: {data: pairs.jsonl}")
    }
    keys[setting.partition(":")[0]] = setting
    (line,) = problems("\n".join(keys.values()) + "\n")
    assert line.partition(": ")[2].startswith(complaint)


def test_texts_that_look_like_numbers_survive_the_way_back(read, folder):
    recipe = read(GOOD.replace("runs/x", "'1e5'"), "model.revision='12e3'")
    (folder / "again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load("again.yaml") == recipe


def test_a_recipe_that_is_not_utf8_is_one_line(folder):
    (folder / "recipe.yaml").write_bytes(b"output: caf\xe9\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: not UTF-8 text"):
        load("recipe.yaml")


def test_an_alias_to_itself_is_one_line(problems):
    (line,) = problems("model: &m {base: *m}\n")
    assert "refers to itself" in line or "not valid YAML" in line


def test_a_chat_template_beside_the_recipe_is_found(folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "chat.jinja").touch()
    (folder / "sub" / "recipe.yaml").write_text(GOOD.replace("org/model", "org/model\n  chat_template: chat.jinja"))
    assert load("sub/recipe.yaml").model.chat_template == str(Path("sub") / "chat.jinja")


@pytest.mark.parametrize("stage", STAGES)
def test_start_from_takes_the_folder_that_holds_an_adapter(folder, stage):
    for place in ("adapter", "sub/adapter"):
        (folder / place).mkdir(parents=True)
    (folder / "sub" / "adapter" / "adapter_config.json").touch()
    (folder / "sub" / "recipe.yaml").write_text(with_stages(**{stage: "start_from: adapter"}))
    assert getattr(load("sub/recipe.yaml"), stage).start_from == str(Path("sub") / "adapter")


@pytest.mark.parametrize("key", ["label_smoothing_factor", "save_only_model", "use_cpu", "train_sampling_strategy"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_would_break_the_loop_is_refused_with_the_reason(problems, key, stage):
    (line,) = problems(with_stages(**{stage: f"trainer: {{{key}: 1}}"}))
    assert line.startswith(f"recipe.yaml:{6 + 2 * STAGES.index(stage)}: trainer.{key}: can't be used here; ")


def test_a_path_that_is_too_long_is_no_path(problems, read):
    assert read(GOOD.replace("pairs.jsonl", "x" * 300)).dpo.data[0].path == "x" * 300
    (line,) = problems(GOOD.replace("pairs.jsonl", r"C:\data\gone"))
    assert "there is no file" in line
