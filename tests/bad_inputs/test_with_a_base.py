"""Bad adapters, chat templates, reward functions and values under `trainer:`: found with a tiny base, which is small
enough to be loaded for each; still one line, exit code 2, and the finished run stays."""

import json
import re

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.bad_inputs.conftest import RECIPE, SMOLLM2

SECONDS = 60  # a bound on hanging: PyTorch may have to be imported first


@pytest.fixture
def tiny(place, tiny_folder):
    (place / "recipe.yaml").write_text(
        RECIPE.replace(SMOLLM2, f"{tiny_folder}\n  compute_dtype: float32\n  max_length: 64")
        + "  max_new_tokens: 8\n  batch_size: 4\n  samples_per_prompt: 2\n  max_steps: 1\n"
    )
    return place


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("good") / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(folder)
    return folder


def changed(**keys) -> bytes:
    """A change of `adapter_config.json`, as bytes that say it."""
    return json.dumps(keys).encode()


ADAPTERS = {  # (file, its content; None: removed), or a change of the config
    "config: empty": ("adapter_config.json", b""),
    "config: no JSON": ("adapter_config.json", b"{"),
    "config: not UTF-8": ("adapter_config.json", b"\xff\xfe\xff"),
    "config: a list": ("adapter_config.json", b"[1]"),
    "config: a number": ("adapter_config.json", b"5"),
    "config: deep": ("adapter_config.json", b"[" * 100_000),
    "config: huge number": ("adapter_config.json", b'{"r": ' + b"9" * 5_000 + b"}"),
    "config: no type": ("adapter_config.json", b"{}"),
    "config: unknown type": ("adapter_config.json", b'{"peft_type": "NOSUCH"}'),
    "config: targets hang": ("change", changed(target_modules="(([a-z_0-9.])+)+!")),
    "config: targets fit nothing": ("change", changed(target_modules=["nosuch"])),
    "config: rank as text": ("change", changed(r="many")),
    "config: negative rank": ("change", changed(r=-1)),
    "config: huge rank": ("change", changed(r=10**9)),
    "weights: missing": ("adapter_model.safetensors", None),
    "weights: empty": ("adapter_model.safetensors", b""),
    "weights: no safetensors": ("adapter_model.safetensors", b"hello" * 100),
    "weights: a huge header": ("adapter_model.safetensors", b"\xff" * 64),
    "weights: a tensor lacks": ("lacks", b""),
    "lineage: broken": ("lineage.json", b"{"),
    "lineage: a list": ("lineage.json", b"[]"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_bad_adapter(refused, tiny, good_adapter, name):
    file, content = ADAPTERS[name]
    folder = tiny / "adapter"
    folder.mkdir()
    for kept in good_adapter.iterdir():
        (folder / kept.name).write_bytes(kept.read_bytes())
    if file == "change":
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | json.loads(content)))
    elif file == "lacks":
        weights = load_file(folder / "adapter_model.safetensors")
        weights.pop(sorted(weights)[0])
        save_file(weights, folder / "adapter_model.safetensors")
    elif content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)

    (line,) = refused("dpo", "recipe.yaml", "dpo.start_from=adapter", "--overwrite", seconds=SECONDS)

    assert "adapter" in line or "lineage" in line


# --- chat templates --------------------------------------------------------------------------------------------------

TEMPLATES = {
    "empty": "",
    "no Jinja": "{% if %}",
    "open": "{% for m in messages %}x",
    "unknown filter": "{{ messages | nosuch }}",
    "unknown function": "{{ nosuch() }}",
    "raises": "{{ raise_exception('no \x1b[31m') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "ignores the turns": "hello",
    "no answer": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "larger range": "{% for m in range(10 ** 9) %}x{% endfor %}",
    "escapes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bad_chat_template(refused, tiny, name):
    (tiny / "bad.jinja").write_text(TEMPLATES[name])

    lines = refused("dpo", "recipe.yaml", "model.chat_template=bad.jinja", "--overwrite", seconds=SECONDS)

    assert len(lines) <= 6  # one for the rows, and the first refused ones
    assert re.search("chat.template|dpo.data", " ".join(lines))


# --- reward functions ------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "exits": "import sys\ndef f(**row): sys.exit(0)\n",
    "exits at import": "import sys\nsys.exit(0)\ndef f(**row): ...\n",
    "raises": "def f(**row): raise RuntimeError('no \\x1b[31m' + 'x' * 9999)\n",
    "raises at import": "raise RuntimeError('no')\ndef f(**row): ...\n",
    "nothing": "def f(**row): ...\n",
    "too few": "def f(completions): return [1.0]\n",
    "nan": "def f(completions): return [float('nan') for _ in completions]\n",
    "wrong arguments": "def f(nosuch_column): return [1.0]\n",
    "no Python": "def f(:\n",
    "missing package": "import nosuch_package\ndef f(**row): ...\n",
    "no function": "f = 5\n",
    "interrupts": "def f(**row): raise KeyboardInterrupt\n",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_reward_function(refused, tiny, name):
    (tiny / "bad.py").write_text(FUNCTIONS[name])

    lines = refused("ppo", "recipe.yaml", "ppo.reward=bad.py:f", "--overwrite", seconds=SECONDS)

    assert len(lines) == 1
    assert "bad.py" in lines[0]


# --- values under `trainer:` -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.parametrize(
    "word",
    [
        "lr_scheduler_kwargs={nothing: 1}", "lr_scheduler_kwargs=5", "optim=nosuch", "optim=lomo", "optim_args=garbage",
        "weight_decay=much", "adam_beta1=5", "max_grad_norm=[1]",
    ],
)  # fmt: skip
def test_a_bad_value_of_the_trainer(refused, tiny, stage, word):
    (line,) = refused(stage, "recipe.yaml", f"{stage}.trainer.{word}", "--overwrite", seconds=SECONDS)

    assert line.startswith((f"{stage}.trainer: {word.partition('=')[0]}", f"command line: {stage}.trainer"))
