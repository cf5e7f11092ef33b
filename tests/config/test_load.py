"""A recipe from a file: every problem at once, each with its line and the likely fix; and the way back to YAML."""

import pytest
import yaml

from qalign.config.load import dump, load
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, STAGES, Source
from qalign.errors import UserError
from tests.config.conftest import GOOD, PPO_AT, SECTIONS, with_stages

DPO_MISTAKES = [  # a line 6 below `dpo:`, and words of the message; " … " stands for any text
    ("epohcs: 2", "unknown key 'epohcs' in dpo; did you mean 'epochs'?"),
    ("batch_size: '16'", "dpo.batch_size is '16'; expected a whole number"),
    ("batch_size: 0", "dpo.batch_size is 0; expected at least 1"),
    ("max_steps: 1e3", "dpo.max_steps is 1000.0; expected a whole number"),
    ("beta: a tenth", "dpo.beta is 'a tenth'; expected a number"),
    ("beta: yes", "dpo.beta is True; expected a number"),
    ("beta: 0", "dpo.beta is 0; expected greater than 0"),
    ("beta: .inf", "dpo.beta is inf; expected a finite number"),
    ("micro_batch_size: auot", "dpo.micro_batch_size is 'auot'; expected 'auto' or a whole number"),
    ("micro_batch_size: 3", "dpo.micro_batch_size: 3 does not divide batch_size 16; take a divisor, or 'auto'"),
    ("split: 1", "dpo.split is 1; expected a string"),
    ("loss: sigmod", "dpo.loss is 'sigmod'; expected one of sigmoid, ipo … did you mean 'sigmoid'?"),
    ("scheduler: 5", "dpo.scheduler is 5; expected one of linear, cosine, constant"),
    ("loss: robust", "dpo.loss: 'robust' needs label_smoothing"),
    ("gamma: 1.0", "dpo.gamma: has no effect with loss 'sigmoid'; use loss 'simpo'"),
    ("eval_data: []", "dpo.eval_data is empty"),
    ("eval_data: {path: pairs.jsonl, limit: 0}", "dpo.eval_data.limit is 0; expected at least 1"),
    ("trainer: {5: 5}", "unknown key '5' in dpo.trainer"),
    ("trainer: {optm: adafactor}", "unknown key 'optm' in dpo.trainer; did you mean 'optim'?"),
]
OTHER_MISTAKES = [  # a section in line 6
    ("outptu: x", "unknown key 'outptu'; did you mean 'output'?"),
    ("seed: '42'", "seed is '42'; expected a whole number"),
    ("lora: {r: 16.0}", "lora.r is 16.0; expected a whole number"),
    ("lora: {alpha: '32'}", "lora.alpha is '32'; expected a number"),
    ("lora: {rank: 8}", "unknown key 'rank' in lora; did you mean 'r'?"),
    ("lora: {init: lotfq}", "lora.init is 'lotfq' … did you mean 'loftq'?"),
    ("lora: {size: 8}", "unknown key 'size' in lora; known: r, alpha, dropout"),
    ("lora: {targets: 5}", "lora.targets is 5; expected 'all-linear' or a list of modules' names"),
    ("lora: {targets: []}", "lora.targets is []; expected 'all-linear' or a list"),
    (
        "lora: {targets: '(([a-z.])+)+!'}",
        "lora.targets is '(([a-z.])+)+!'; expected 'all-linear' or a list … no regular",
    ),
    ("lora: {targets: [q_proj, '.*_proj']}", "lora.targets.1 is '.*_proj'; expected a module's name such as q_proj"),
    ("lora: {targets: lm_head}", "lora.targets: 'lm_head' can't have an adapter"),
    ("lora: {targets: [q_proj, 5]}", "lora.targets.1 is 5; expected a string"),
    ("lora: {targets: [q_proj, lm_head]}", "lora.targets: 'lm_head' can't have an adapter"),
    ("seed:", "seed is empty"),
    ("sft: {data: pairs.jsonl, pakcing: true}", "unknown key 'pakcing' in sft; did you mean 'packing'?"),
    ("sft: {start_from: null}", "'sft.data' is missing"),
    ("sft: {data: pairs.jsonl, start_from: sft}", "sft.start_from: an SFT run can't start from itself"),
    ("sft: {data: pairs.jsonl, packing: 1}", "sft.packing is 1; expected a boolean"),
    ("sft: {data: pairs.jsonl, beta: 1}", "unknown key 'beta' in sft"),
    ("reward: {data: pairs.jsonl, packing: true}", "unknown key 'packing' in reward"),
    ("reward: []", "reward is []; expected keys below it"),
    ("reward: 5", "reward is 5; expected keys below it"),
    ("ppo: {data: pairs.jsonl}", "'ppo.reward' is missing"),
    ("ppo: {data: pairs.jsonl, reward: }", "ppo.reward is empty"),
    ("ppo: {data: pairs.jsonl, reward: []}", "ppo.reward is empty"),
    ("ppo: {data: pairs.jsonl, reward: 5}", "ppo.reward is 5; expected 'reward', a folder"),
    ("ppo: {data: pairs.jsonl, reward: reward, judge: true}", "ppo.judge is True; expected a folder"),
    ("ppo: {data: pairs.jsonl, reward: [reward, {source: 5}]}", "ppo.reward.1.source is 5; expected a string"),
    ("ppo: {data: pairs.jsonl, reward: {weight: 2}}", "'ppo.reward.source' is missing"),
    ("ppo: {data: pairs.jsonl, reward: {source: reward, wieght: 2}}", "'wieght' in ppo.reward; did you mean 'weight'?"),
    (
        "ppo: {data: pairs.jsonl, reward: reward, eval_data: {path: pairs.jsonl, source: 2}}",
        "'source' in ppo.eval_data",
    ),
    ("ppo: {data: pairs.jsonl, reward: [json:loads, {source: reward, weight: 0}]}", "ppo.reward.1.weight: … remove it"),
    ("ppo: {data: pairs.jsonl, reward: reward, on_alarm: halt}", "ppo.on_alarm is 'halt'; expected one of warn"),
]


@pytest.mark.parametrize(
    ("text", "words"),
    [(f"{GOOD}  {text}\n", words) for text, words in DPO_MISTAKES] + [(f"{GOOD}{t}\n", w) for t, w in OTHER_MISTAKES],
)
def test_a_mistake_is_one_line_with_its_place_and_the_likely_fix(only_problem, text, words):
    only_problem(6, words, text)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: org/model\noutput: x\ndpo: {data: pairs.jsonl}\n", 1, "model is 'org/model'; expected keys below"),
        ("output: x\nmodel: {base: m/b}\ndpo: [1]\n", 3, "dpo is [1]; expected"),
        ("output: ''\nmodel: {base: m/b}\n", 1, "output is empty"),
        ("output: x\nmodel: {base: m/b}\ndpo:\n  data:\n  - pairs.jsonl\n  - path: pairs.jsonl\n    weigth: 2\n", 7,
         "unknown key 'weigth' in dpo.data.1; did you mean 'weight'?"),
        (with_stages(ppo="eval_data: pairs.jsonl\n  judge: reward"), PPO_AT + 3, "ppo.judge: must not be what the"),
        (with_stages(ppo="samples_per_prompt: 3"), PPO_AT, "ppo.batch_size: 64 answers"),  # not in the file
        (GOOD + "  beta: 0.1\n  beta: 0.2\n", 7, "'beta' is set more than once, in lines 6, 7"),
        ("model: {base: org/model\noutput: x\n", 2, "not valid YAML"),
        (GOOD + "\tbeta: 0.1\n", 6, "not valid YAML"),
        (GOOD + "  beta: [0.1\n", 7, "not valid YAML"),
        (GOOD + "---\nmodel: x\n", 6, "not valid YAML"),
        (GOOD + "? [a, b]\n: 1\n", 6, "not valid YAML"),
        (GOOD + "seed: !!python/object/apply:os.mkdir [ran]\n", 6, "not valid YAML"),
        ("model: &m {base: *m}\n", 1, ""),
        ("- model\n", 1, "a recipe is a set of keys … not list"),
        ("just words\n", 1, "a recipe is a set of keys … not str"),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere_is_found_at_its_own_line(problems, folder, text, line, words):
    (found,) = problems(text)

    assert found.startswith((f"recipe.yaml:{line}: ", "recipe.yaml: an alias (*name) refers to itself"))
    assert all(word in found for word in words.split(" … "))
    assert not (folder / "ran").exists()  # YAML runs no code


def test_all_problems_come_at_once_in_the_order_of_lines(problems):
    text = """\
sead: 1
max_refused_share: 5
model:
  base: missing.gguf
  quantization: nf5
output: runs/x
seed: 1
seed: 2
dpo:
  beta: tiny
  data: [pairs.jsonl, missing.jsonl]
  trainer: {optm: adamw_torch}
sft: {data: pairs.jsonl, micro_batch_size: 3, eval_every: 5}
"""
    words = ["sead", "max_refused_share", "missing.gguf", "nf5", "seed", "tiny", "missing.jsonl", "optm"]
    words += ["eval_every", "micro_batch_size"]

    lines = problems(text)

    numbers = (1, 2, 4, 5, 8, 10, 11, 12, 13, 13)
    assert [line.split(" ")[0] for line in lines] == [f"recipe.yaml:{number}:" for number in numbers]
    assert all(word in line for line, word in zip(lines, words, strict=True))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", ["1: 'model'", "1: 'output'"]),
        ("# to be written\n", ["1: 'model'", "1: 'output'"]),
        ("dpo:\n  beta: 0.1\nmodel:\n  max_length: 99\n", ["1: 'dpo.data'", "1: 'output'", "3: 'model.base'"]),
    ],
)
def test_what_is_missing_is_named_at_the_section_it_belongs_to(problems, text, missing):
    assert problems(text) == [f"recipe.yaml:{place} is missing" for place in missing]


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_that_is_asked_for_must_be_there(only_problem, read, stage):
    without = "model: {base: org/model}\noutput: x\n"
    words = f"no '{stage}:' section … python -m qalign.{stage}"

    only_problem(1, words, without, stage=stage)
    only_problem("command line", words, with_stages(), f"{stage}=", stage=stage)
    assert getattr(read(without), stage) is None
    assert read(with_stages(), f"{stage}=").stages == tuple(name for name in STAGES if name != stage)


def test_a_recipe_that_is_not_there_gets_the_nearest_one(folder):
    (folder / "mistral7b.yaml").write_text(GOOD)

    with pytest.raises(UserError, match=r"mistral\.yaml: .*did you mean 'mistral7b\.yaml'\?"):
        load("mistral.yaml")
    with pytest.raises(UserError, match=r"^nowhere/recipe\.yaml: there is no such recipe$"):
        load("nowhere/recipe.yaml")


def test_a_recipe_that_is_not_utf8_is_one_line(folder):
    (folder / "recipe.yaml").write_bytes(b"output: caf\xe9\n")

    with pytest.raises(UserError, match=r"recipe\.yaml: not UTF-8 text"):
        load("recipe.yaml")


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["5e-6", "1E-4", "2.5e-5", "1.e-3", "5.0e-6"])
def test_a_number_with_an_exponent_is_a_number(read, number):
    assert read(GOOD + f"  learning_rate: {number}\n").dpo.learning_rate == float(number)


@pytest.mark.parametrize("text", ["e5", "5e", "5e-", "v5e-6", "5e-6x"])
def test_what_only_resembles_a_number_stays_text(read, text):
    assert read(GOOD + f"  split: {text}\n").dpo.split == text


def test_an_override_is_read_as_yaml(read):
    recipe = read(
        GOOD + "  eval_data: pairs.jsonl\n  beta: tiny\n", "dpo.max_steps=20", "dpo.learning_rate=1e-4", "seed=1",
        "seed=2", "dpo.eval_data=", "lora.r=8", "lora.targets=[q_proj, v_proj]", "dpo.trainer.optim=adafactor",
        "output=a=b", "dpo.beta=0.2",
    )  # fmt: skip

    assert (recipe.dpo.max_steps, recipe.dpo.learning_rate, recipe.dpo.eval_data) == (20, 1e-4, None)
    assert (recipe.lora.r, recipe.lora.targets) == (8, ["q_proj", "v_proj"])
    assert recipe.dpo.trainer == {"optim": "adafactor"}
    assert (recipe.output, recipe.seed) == ("a=b", 2)  # the last of two holds
    assert recipe.dpo.beta == 0.2  # mends the mistake in the file


@pytest.mark.parametrize("dpo", ["", "dpo:\n"])
def test_an_override_makes_the_section_that_it_needs(read, dpo):
    recipe = read(f"model: {{base: org/model}}\noutput: x\n{dpo}", "dpo.data=pairs.jsonl")

    assert recipe.dpo.data == (Source(path="pairs.jsonl"),)


@pytest.mark.parametrize("stage", STAGES)
def test_without_held_out_rows_on_the_command_line_nothing_is_measured_on_them(read, problems, stage):
    held_out = "eval_data: pairs.jsonl\n  eval_every: 5" + ("\n  judge: json:loads" if stage == "ppo" else "")
    text = with_stages(**{stage: held_out})

    for nothing in ("null", "", "~"):
        settings = getattr(read(text, f"{stage}.eval_data={nothing}"), stage)
        assert (settings.eval_data, settings.eval_every, getattr(settings, "judge", None)) == (None, None, None)
    assert "eval_every: has nothing to measure" in problems(text, f"{stage}.eval_data=", f"{stage}.eval_every=7")[0]
    assert "eval_every: has nothing to measure" in problems(text.replace("eval_data: pairs.jsonl", "eval_data:"))[0]
    assert getattr(read(text, f"{stage}.eval_data=org/other"), stage).eval_every == 5
    if stage == "dpo":
        sampled = text.replace("eval_every: 5", "sample_prompts: 8\n  sample_every: 5")
        assert (read(sampled, "dpo.eval_data=").dpo.sample_prompts, read(sampled).dpo.sample_prompts) == ("auto", 8)
    share = text.replace("eval_data: pairs.jsonl", "holdout: 0.2")
    assert getattr(read(share, f"{stage}.holdout=null"), stage).eval_every is None
    assert getattr(read(text, f"{stage}.eval_data=null", f"{stage}.holdout=0.2"), stage).eval_every == 5


def test_a_section_that_is_replaced_after_its_key_was_set_is_no_traceback(read, problems):
    text = with_stages(dpo="eval_data: pairs.jsonl")
    assert read(text, "dpo.eval_data=null", "dpo=null").dpo is None
    assert "dpo" in problems(text, "dpo.eval_data=null", "dpo=5")[0]


def test_an_override_of_a_shared_value_changes_one_stage_only(read):
    text = with_stages(sft="trainer: &shared {optim: adafactor}", dpo="trainer: *shared")

    recipe = read(text, "dpo.trainer.optim=adamw_torch")

    assert (recipe.sft.trainer, recipe.dpo.trainer) == ({"optim": "adafactor"}, {"optim": "adamw_torch"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.max_stpes=20", "unknown key 'max_stpes' in dpo; did you mean 'max_steps'?"),
        ("sead=20", "unknown key 'sead'; did you mean 'seed'?"),
        ("dpo.beta=tiny", "dpo.beta is 'tiny'; expected a number"),
        ("dpo.data=gone.jsonl", "data: there is no file 'gone.jsonl'"),
        ("dpo.data=[pairs.jsonl, gone.jsonl]", "data: there is no file 'gone.jsonl'"),
        ("dpo.trainer.optm=x", "unknown key 'optm' in dpo.trainer; did you mean 'optim'?"),
        ("dpo.max_steps", "'dpo.max_steps' is not KEY=VALUE"),
        ("=20", "'=20' is not KEY=VALUE"),
        ("dpo..beta=20", "'dpo..beta=20' is not KEY=VALUE"),
        ("model.base.name=x", "base is a value, not a section"),
        ("lora.targets=[q_proj", "the value is not valid YAML ( … ); quote it"),
        ("lora.init=pissa", "lora.init: 'pissa'"),
        ("lora.init=loftq", "set dpo.start_from: sft, or use 'default'"),
        ("ppo={data: pairs.jsonl, reward: 'gone.py:f'}", "reward: there is no file 'gone.py'"),
    ],
)
def test_a_mistake_in_an_override_is_reported_as_on_the_command_line(only_problem, override, words):
    only_problem("command line", words, GOOD, override)


def test_mistakes_in_the_file_keep_their_lines_next_to_an_override(problems):
    found = problems(with_stages(dpo="betta: 0.1"), "ppo.max_steps=0")

    assert [line.partition(": ")[0] for line in found] == ["command line", "recipe.yaml:10"]
    assert problems(with_stages(), "model.max_length=128")[0].startswith(
        f"recipe.yaml:{PPO_AT}: ppo.max_new_tokens: 256"
    )


# --- and back --------------------------------------------------------------------------------------------------------

FULL = """\
model: {base: org/model, revision: '12e3', quantization: fp4, max_length: 512, chat_template_kwargs: {name: Größe}}
lora: {r: 8, alpha: 12.5, dropout: 0.05, targets: [q_proj, v_proj], rslora: true, dora: true, init: gaussian}
output: "runs/a run: Größe №1"
seed: 7
sft: {data: [{path: pairs.jsonl, limit: 3}], packing: true, neftune_alpha: 5, trainer: {loss_type: dft}}
reward: {data: org/pairs, margin: true, centering: 1e-2, start_from: sft, trainer: {neftune_noise_alpha: 5}}
dpo:
  data: [pairs.jsonl, {path: org/pairs, split: train_prefs, limit: 9, weight: 0.5}]
  eval_data: pairs.jsonl
  batch_size: 8
  micro_batch_size: 2
  learning_rate: 5e-6
  trainer: {optim: adafactor, weight_decay: 1.0e-3}
  loss: simpo
  gamma: 0.25
ppo:
  data: [{path: pairs.jsonl, skip: 2, limit: 3}]
  eval_data: {path: org/pairs, split: test_prefs, limit: 64}
  reward: [reward, {source: "json:loads", weight: -0.5}]
  judge: org/model
  kl_target: 6
  kl_stop: null
  trainer: {optim: adafactor, adam_epsilon: 1.0e-6}
"""


@pytest.mark.parametrize("text", [GOOD, FULL, GOOD.replace("runs/x", "'1e5'")])
def test_what_is_dumped_reads_back_as_the_same_recipe(read, text):
    recipe = read(text)

    again = read(dump(recipe))

    assert again == recipe
    assert dump(again) == dump(recipe)


def test_the_dump_writes_every_default_out(read):
    written = yaml.safe_load(dump(read(GOOD)))

    assert written["dpo"]["data"] == [Source(path="pairs.jsonl").model_dump()]
    assert set(written) == set(Recipe.model_fields)
    assert set(written["dpo"]) == set(DPO.model_fields)
    assert (written["sft"], written["reward"], written["ppo"]) == (None, None, None)
    written = yaml.safe_load(dump(read(with_stages())))
    assert all(set(written[stage]) == set(section.model_fields) for stage, section in SECTIONS.items())
    assert (written["ppo"]["reward"], written["ppo"]["judge"]) == ([{"source": "reward", "weight": 1.0}], None)
