"""The code in an adapter's model card loads what was trained, and ends answers where training did."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalign.config.recipe import Lora, Model
from qalign.data.tokenize import encode_prompt
from qalign.model.base import Role, load
from qalign.model.generation import Sampling, TransformersEngine
from qalign.model.loading import guard_4bit
from qalign.train.model_card import loading
from tests.conftest import ROOT
from tests.helpers import scramble
from tests.model.conftest import IDS, logits
from tests.reward_runs import run_stage, write_recipe

HELD = [
    {},
    {"double_quant": False},
    {"quantization": "fp4"},
    {"quantization": "int8"},
    {"quantization": "none"},
    {"compute_dtype": "bfloat16"},
]


def executed(code: str) -> dict:
    """The names that the code of a card defines. Before its first forward pass, bitsandbytes is kept from repacking
    weights, which it does on some CPUs, and which rounds otherwise."""
    names, (first, mark, rest) = {}, code.replace("max_new_tokens=256", "max_new_tokens=16").partition("\nturns =")
    exec(first, names)
    guard_4bit(names["model"])
    exec(mark + rest, names)
    return names


@pytest.mark.parametrize("held", HELD, ids=str)
def test_the_code_loads_the_policy_that_was_trained(tiny_folder, tmp_path, capsys, held):
    base = load(Model(**{"base": tiny_folder, "compute_dtype": "float32", **held}))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    base.save_adapter(Role.POLICY, tmp_path / "a")
    found = executed(loading(base, tmp_path / "a"))
    plain, expected, without = found["model"].eval(), logits(base).float(), logits(base, Role.BASE).float()
    with torch.no_grad():
        actual = plain(input_ids=IDS).logits.float()
    assert plain.dtype == base.dtype
    near = 1e-4 if base.dtype == torch.float32 else 0.05 * (expected - without).abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=near)
    assert ("quantization" in found) == (held.get("quantization") != "none")


@pytest.mark.parametrize("held", HELD, ids=str)
def test_the_code_scores_as_the_reward_model_that_was_trained(tiny_folder, tmp_path, capsys, held):
    torch.manual_seed(1)
    base = load(Model(**{"base": tiny_folder, "compute_dtype": "float32", **held}))
    base.add_adapter(Role.REWARD, Lora(r=4))
    scramble(base, Role.REWARD)
    base.save_adapter(Role.REWARD, tmp_path / "a")
    found = executed(loading(base, tmp_path / "a"))
    printed = float(capsys.readouterr().out.splitlines()[-1])
    with torch.no_grad(), base.acting_as(Role.REWARD) as lm:
        states = lm.base_model(input_ids=found["ids"]).last_hidden_state
        expected = lm.score(states[0, -1]).item()
    assert printed == pytest.approx(expected, abs=1e-4 if base.dtype == torch.float32 else 0.02 * abs(expected))
    assert found["tokenizer"].decode(found["ids"][0]).endswith("4<|eot_id|>")


MARKS = [2001, 2003, 2004]  # special tokens that end nothing for the tiny model
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture
def marking(tiny_folder, tmp_path) -> str:
    """A raw base that often says one of the marks."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "raw"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][MARKS] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_an_answer_ends_where_it_did_in_training_not_only_at_the_bases_own_end(marking, tmp_path):
    """A template whose end of turn is not the base's EOS, as with ChatML on a raw base. It is one that the model says
    anyhow, in the middle of what it would say if nothing ended it; the prompt has none, so it stays as it is."""

    def trained(end: str):
        (tmp_path / "own.jinja").write_text(TEMPLATE.replace("END", end))
        base = load(Model(base=marking, compute_dtype="float32", chat_template=str(tmp_path / "own.jinja")))
        base.add_adapter(Role.POLICY, Lora(r=4))
        scramble(base)
        return base

    base = trained("<|eot_id|>")
    ids = encode_prompt(base.template, [{"role": "user", "content": "What makes a good walk?"}])
    how = Sampling(16, 0.0, (-1,))
    ((said,),) = TransformersEngine().generate(base, Role.POLICY, [ids], how, num_samples=1, seed=0)
    end = next(token for place, token in enumerate(said) if place > 1 and token in MARKS and token not in said[:place])
    base = trained(base.tokenizer.convert_ids_to_tokens(end))
    base.save_adapter(Role.POLICY, tmp_path / "a")
    code = loading(base, tmp_path / "a")
    assert executed(code)["answer"].tolist() == said[: said.index(end) + 1]
    unended = executed(code.replace("model.generation_config =", "unused ="))["answer"].tolist()
    assert unended == said


def test_the_generation_config_keeps_how_the_base_samples(tiny_base, tmp_path):
    from transformers import GenerationConfig

    how = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [7, 9]}
    tiny_base.lm.generation_config = GenerationConfig(**how)
    tiny_base.add_adapter(Role.POLICY, Lora(r=2))
    tiny_base.save_adapter(Role.POLICY, tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path)
    tokenizer = tiny_base.tokenizer
    assert kept.eos_token_id == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), 7, 9]
    assert (kept.pad_token_id, kept.bos_token_id) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.repetition_penalty) == (True, 0.6, 0.9, 1.1)
    assert tiny_base.lm.generation_config.eos_token_id == [7, 9], "the base's own stays"


def test_the_card_of_a_run_holds_the_code(tiny_folder, tmp_path, capsys):
    run = run_stage(write_recipe(tmp_path, tiny_folder, "sft", limit=4, model={"double_quant": False}))
    (code,) = re.findall(r"```python\n(.*?)```", (run.adapter / "README.md").read_text(), flags=re.DOTALL)
    assert "bnb_4bit_use_double_quant=False" in code
    assert executed(code)["model"].active_adapter == "default"


def test_the_readme_loads_an_adapter_as_the_card_does(tiny_base):
    readme = (ROOT / "README.md").read_text()
    code = loading(tiny_base, Path("runs/mistral7b/dpo/adapter")).replace("float32", "bfloat16")
    (shown,) = re.findall(r"```python\n(    from peft.*?)    ```", readme, flags=re.DOTALL)
    assert re.sub(r"(?m)^    ", "", shown).strip() == code.strip()
