"""Bad recipes and overrides: one line for each problem, exit code 2, in no time, and the finished run stays."""

import pytest

from tests.bad_inputs.conftest import RECIPE


def dpo(line: str) -> str:
    return RECIPE.replace("dpo:\n", f"dpo:\n  {line}\n")


BOMB = "".join(f"k{n}: &k{n} [{','.join([f'*k{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))
MERGES = "".join(f"k{n}: &k{n} {{<<: [{','.join([f'*k{n - 1}' if n else '{a: 1}'] * 9)}]}}\n" for n in range(9))
DEEP_KEYS = "".join(f"{' ' * n}k:\n" for n in range(900))
TRAINER_KEYS = dpo(f"trainer: {{{','.join(f'k{n}: 1' for n in range(4_000))}}}")

TEXTS = {
    "empty": ("", "'model' is missing"),
    "words": ("hello", "a recipe is a set of keys"),
    "a list": ("- a\n- b\n", "a recipe is a set of keys"),
    "a number": ("5", "a recipe is a set of keys"),
    "two documents": (RECIPE + "---\na: 1\n", "not valid YAML"),
    "alias bomb": (BOMB + RECIPE, "aliases"),
    "merge bomb": (MERGES + RECIPE, "aliases"),
    "self": ("model: &m [*m]\n", "refers to itself"),
    "self in merge": ("model: &m {<<: *m}\n", "refers to itself"),
    "deep": (RECIPE + "x: " + "[" * 20_000, "nested more than"),
    "deep keys": (DEEP_KEYS, "larger than"),
    "less deep keys": (DEEP_KEYS[:9_000], "nested more than"),
    "many values": (RECIPE + f"x: [{'1,' * 60_000}]", "more than 10,000 values"),
    "many keys": (RECIPE + "".join(f"k{n}: 1\n" for n in range(4_000)), "unknown key 'k0'"),
    "many trainer keys": (TRAINER_KEYS, "unknown key"),
    "many paths": (RECIPE.replace("pairs.jsonl", f"[{'./gone,' * 3_000}]", 1), "./gone"),
    "large": (RECIPE + "#" * 3_000_000, "larger than"),
    "large value": (dpo(f"beta: {'x' * 200_000}"), "expected a number"),
    "large key": (RECIPE + f"{'k' * 900}: 1\n", "unknown key"),
    "huge number": (RECIPE + f"seed: {'9' * 5_000}\n", "is no whole number"),
    "large number": (RECIPE + f"seed: {'9' * 4_000}\n", "seed is 999"),
    "grpo in TRL's words": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, beta: 0.04}\n",
        "'kl_coefficient'?",
    ),
    "grpo of one answer": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, samples_per_prompt: 1}\n",
        "grpo.samples_per_prompt: adv",
    ),
    "an engine of no such address": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, engine: localhost:8000}\n",
        "the address of a vLLM server such as http://localhost:8000",
    ),
    "an address that can't be read": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, engine: 'http://[bad'}\n",
        "the address of a vLLM server such as http://localhost:8000",
    ),
    "an address with a word for its port": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, engine: 'http://host:port'}\n",
        "the address of a vLLM server such as http://localhost:8000",
    ),
    "an address with a password": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, engine: 'http://me:secret@host:8000'}\n",
        "the address of a vLLM server such as http://localhost:8000",
    ),
    "a correction of nothing": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, importance_cap: 3.0}\n",
        "grpo.importance_cap: has no effect with engine 'transformers'",
    ),
    "a critic for rloo": (
        RECIPE + "grpo: {data: pairs.jsonl, reward: json:loads, advantage: rloo, value: trunk}\n",
        "grpo.value: adv",
    ),
    "labels that nobody measured": (
        RECIPE + "constitution: {data: pairs.jsonl}\n",
        "constitution.agree_with: pairs are written once the labeller was measured",
    ),
    "an answer without another": (
        RECIPE + "constitution: {data: pairs.jsonl, agree_with: pairs.jsonl, candidates: 3}\n",
        "constitution.candidates: 3 answers",
    ),
    "data of no constitution": (
        RECIPE.replace("data: pairs.jsonl", "data: constitution", 1),
        "it has no 'constitution:' section; add one",
    ),
    "half of the labels wrong": (RECIPE + "goodhart: {flipped: 0.5}\n", "goodhart.flipped is 0.5"),
    "no seeds": (RECIPE + "goodhart: {seeds: []}\n", "goodhart.seeds"),
    "hex": (RECIPE + "seed: 0x_\n", "is no whole number"),
    "binary digits": (RECIPE + "seed: 0b_\n", "is no whole number"),
    "date": (RECIPE + "seed: 2020-99-99\n", "expected a whole number"),
    "time": (RECIPE + "seed: 2001-12-14t99:99:99Z\n", "expected a whole number"),
    "int tag": (RECIPE + "seed: !!int abc\n", "is no whole number"),
    "bool tag": (RECIPE + "seed: !!bool abc\n", "is no boolean"),
    "binary tag": (RECIPE + "seed: !!binary aGk=\n", "the tag '!!binary'"),
    "python tag": (RECIPE + "seed: !!python/object/apply:os.system [touch ran]\n", "the tag '!!python"),
    "own tag": (RECIPE + "seed: !mine 5\n", "the tag '!mine'"),
    "set": (RECIPE + "x: !!set {a}\n", "the tag '!!set'"),
    "omap": (RECIPE + "x: !!omap [a: 1]\n", "the tag '!!omap'"),
    "merge of a number": (RECIPE + "x: {<<: 5}\n", "`<<` takes"),
    "merge of a list": (RECIPE + "x: {<<: [[1]]}\n", "`<<` takes"),
    "no such alias": (RECIPE + "x: *gone\n", "undefined alias"),
    "tab": (RECIPE + "\tx: 1\n", "not valid YAML"),
    "open bracket": (RECIPE + "x: [1\n", "not valid YAML"),
    "open quote": (RECIPE + "x: 'abc\n", "not valid YAML"),
    "complex key": (RECIPE + "? [a]\n: 1\n", "a key is a word"),
    "directive": ("%YAML 9.9\n---\n" + RECIPE, "not valid YAML"),
    "wide escape": (RECIPE + 'x: "\\UFFFFFFFF"\n', "not valid YAML"),
    "NUL": (RECIPE + "x: a\0b\n", "U+0000"),
    "ESC": (RECIPE + "x: \x1b[31m\n", "U+001B"),
    "escaped ESC in a key": (RECIPE + '"\\e]0;pwned\\a": 1\n', r"unknown key '\x1b]0;pwned\x07'"),
    "escaped ESC in a value": (dpo('loss: "\\e[31m"'), r"'\x1b[31m'"),
    "turned text": (dpo('loss: "abc\u202edcba"'), r"\u202e"),
    "line in a key": (RECIPE + '"a\\nb": 1\n', r"unknown key 'a\nb'"),
    "surrogate": (RECIPE.replace("runs/x", '"\\ud800"'), "output"),
    "twice": (dpo("data: x.jsonl"), "set more than once"),
    "unknown section": (RECIPE + "dpoo: {}\n", "did you mean 'dpo'?"),
    "unknown key": (dpo("betta: 1"), "did you mean 'beta'?"),
    "alias of a key": (dpo("lr: 1"), "did you mean 'learning_rate'?"),
    "wrong section": (dpo("max_length: 64"), "did you mean 'model.max_length'?"),
    "number as text": (dpo("beta: '0.1'"), "expected a number"),
    "yes as number": (dpo("beta: yes"), "expected a number"),
    "nan": (dpo("beta: .nan"), "expected a finite number"),
    "inf": (dpo("beta: -.inf"), "expected"),
    "null key": (RECIPE + "~: 1\n", "unknown key '~'"),
    "model as text": (RECIPE.replace("model:\n  base:", "model:"), "expected keys below it"),
    "model as list": ("model: [a]\noutput: x\n", "expected keys below it"),
    "data of numbers": (RECIPE.replace("pairs.jsonl", "[1, 2]", 1), "dpo.data"),
    "data of lists": (RECIPE.replace("pairs.jsonl", "[[a]]", 1), "dpo.data"),
    "empty data": (RECIPE.replace("pairs.jsonl", "[]", 1), "dpo.data is empty"),
    "trainer as text": (dpo("trainer: x"), "dpo.trainer is 'x'"),
    "no dpo": ("model: {base: org/model}\noutput: runs/x\n", "no 'dpo:' section"),
}

OVERRIDES = [
    ("dpo.beta=1e300", "expected at most"), ("dpo.learning_rate=1e300", "expected at most 1"),
    ("dpo.epochs=1e300", "expected at most 10000"), ("dpo.batch_size=10000000000", "expected at most 65536"),
    ("dpo.micro_batch_size=10000000000", "from 1 to 65536"), ("dpo.max_steps=99999999999999999999", "expected at most"),
    ("dpo.save_every=1000000000000", "expected at most"), ("dpo.limit=1000000000000000", "expected at most"),
    ("dpo.checkpointed_layers=1000000000", "from 0 to 10000"), ("dpo.warmup_ratio=1e300", "expected less than 1"),
    ("dpo.data={path: pairs.jsonl, weight: 1e300}", "expected at most 1000"),
    ("dpo.data={path: pairs.jsonl, skip: 100000000000000}", "expected at most"),
    ("dpo.length_penalty=1e300", "expected at most"),
    ("dpo.loss={sigmod: 1}", "did you mean 'sigmoid'?"),
    ("dpo.loss={sigmoid: 0}", "dpo.loss.sigmoid is 0; expected greater than 0"),
    ("dpo.loss={}", "dpo.loss is {}; expected one of"),
    ("dpo.loss=[sigmoid, sft]", "expected one of sigmoid, ipo"), ("dpo.sft_weight=0.2", "did you mean 'loss.sft'?"),
    ("dpo.gamma=1e300", "expected at most"),
    ("model.max_length=1000000000000", "expected at most 1048576"), ("model.max_length=1", "expected at least 16"),
    ("lora.r=1000000000", "expected at most 4096"), ("lora.alpha=1e300", "expected at most 100000"),
    ("lora.targets='(([a-z_0-9.])+)+!'", "no regular expression"), ("lora.targets=['(a+)+$']", "no regular expression"),
    ("lora.targets='q_proj,v_proj'", "a list of modules' names"), ("lora.targets=[]", "a list of modules' names"),
    ("lora.targets=lm_head", "can't have an adapter"), ("lora.dropout=1e300", "expected less than 1"),
    ("reward.members=0", "expected at least 1"), ("reward.members=1000", "expected at most 64"),
    ("reward.member_layers=0.5", "reward.member_layers: is for ensembles"), ("reward.member_layers=1.5", "at most 1"),
    ("ppo.reward_combine=worst", "ppo.reward_combine is 'worst'"), ("ppo.uncertainty=-1", "expected at least 0"),
    ("ppo.uncertainty=1.0", "has no effect with reward_combine 'mean'"),
    ("seed=-1", "expected at least 0"), ("seed=4294967296", "expected less than"), ("max_refused_share=2", "at most 1"),
    ("dpo.trainer.weight_decay=1e300", "from 0 to"), ("dpo.trainer.dataloader_num_workers=1000000", "from 0 to 64"),
    ("dpo.trainer.max_grad_norm=.nan", "from 0 to"), ("dpo.trainer.nosuch=1", "unknown key 'nosuch'"),
    ("dpo.trainer.lr_scheduler_kwargs={num_cycles: .nan}", "expected finite numbers"),
    ("dpo.trainer.deepspeed=ds.json", "one GPU in one process"), ("dpo.trainer.fsdp=full_shard", "in one process"),
    ("dpo.trainer.push_to_hub=true", "--to hub"), ("dpo.trainer.hub_token=secret", "--to hub"),
    ("dpo.trainer.report_to=wandb", "set it as log_to"), ("log_to=mlflow", "expected one of tensorboard, trackio"),
    ("log_to=[wandb, {a: 1}]", "expected one of tensorboard, trackio"),
    ("dpo.trainer.output_dir=x", "set it as output"), ("dpo.trainer.bf16=true", "set it as model.compute_dtype"),
    ("dpo.trainer.lr=1", "did you mean 'learning_rate'?"), ("dpo.trainer={[a]: 1}", "not valid YAML"),
    ("lr=1", "did you mean 'sft.learning_rate'?"), ("dpo.bs=1", "did you mean 'batch_size'?"),
    ("lora_r=1", "did you mean 'lora.r'?"), ("model_name_or_path=x", "did you mean 'model.base'?"),
    ("nonsense", "not KEY=VALUE"), ("=1", "not KEY=VALUE"), ("a..b=1", "not KEY=VALUE"), ("model.base.x=1", "a value"),
    (f"{'a.' * 5000}b=1", "not a section"), (f"{'k' * 5000}=1", "unknown key"), (f"seed={'9' * 5000}", "is no whole"),
    (f"dpo.trainer={'[' * 2000}", "nested more than"), ("dpo.beta=[1", "quote it"), ("dpo.loss=\x1b[31m", "U+001B"),
    ("\x1b[31m=1", r"unknown key '\x1b[31m'"), ("dpo.beta=\udcff", "U+DCFF"),
    ("dpo.beta=!!int x", "is no whole number"),
    ("dpo.trainer=&a [*a]", "refers to itself"), ("dpo={data: pairs.jsonl, data: x}", "set more than once"),
    ("kto={data: pairs.jsonl, batch_size: 1}", "leaves no other answer for the KL estimate; take 8 or more"),
    ("kto={data: pairs.jsonl, desirable_weight: 0, undesirable_weight: 0}", "so nothing is learned"),
    ("kto={data: pairs.jsonl, chosen_weight: 2}", "did you mean 'desirable_weight'?"),
    ("kto={data: pairs.jsonl, loss: sigmoid}", "expected one of kto, apo_zero_unpaired"),
    ("kto={data: pairs.jsonl, trainer: {loss_type: kto}}", "set it as kto.loss"),
    ("kto={data: pairs.jsonl, trainer: {sync_ref_model: true}}", "has no effect"),
    ("dpo.sample_prompts=often", "'auto' or a whole number from 0"), ("dpo.sample_prompts=-1", "from 0 to 1000"),
    ("dpo.sample_every=0", "at least 1"), ("dpo.max_new_tokens=0", "at least 1"),
    ("dpo.generate_during_eval=true", "did you mean 'sample_prompts'?"),
    ("dpo=", "no 'dpo:' section"), ("model=", "model is empty"), ("dpo.eval_every=often", "expected a whole number"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_recipe(refused, place, name):
    text, words = TEXTS[name]
    (place / "recipe.yaml").write_text(text, encoding="utf-8")

    lines = refused("dpo", "recipe.yaml", "--overwrite")

    assert all(line.startswith("recipe.yaml:") for line in lines)
    assert words in lines[0]
    assert len(lines) <= 31
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"output: caf\xe9\n", "not UTF-8"), ("model: x\n".encode("utf-16"), "not UTF-8"), (b"\xff" * 99, "not UTF-8"),
        (b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8"), (b"\0" * 99, "U+0000"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_no_text(refused, place, content, words):
    (place / "recipe.yaml").write_bytes(content)

    (line,) = refused("dpo", "recipe.yaml", "--overwrite")

    assert words in line


@pytest.mark.parametrize(("word", "words"), OVERRIDES, ids=[ascii(word[:40]) for word, _ in OVERRIDES])
def test_a_bad_override(refused, word, words):
    (line,) = refused("dpo", "recipe.yaml", word, "--overwrite")

    assert line.startswith(("command line: ", "recipe.yaml:"))
    assert words in line
