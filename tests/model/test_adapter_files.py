"""Adapters that are damaged, or whose settings roles on one base can't honour, are refused from their files alone."""

import dataclasses
import json
import os

import numpy as np
import peft
import pytest
from safetensors.numpy import save_file

from qalign.errors import UserError
from qalign.model.adapters.files import CONFIG, NOTES, PICKLE, SCORE_HEAD, WEIGHTS, LoraSettings, read_files

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
TENSORS = {A: np.zeros((2, 8), "f4"), B: np.zeros((8, 2), "f4")}


def adapter(folder, config=None, tensors=None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps({**LORA, **(config or {})}))
    save_file(TENSORS if tensors is None else tensors, folder / WEIGHTS)
    return str(folder)


def refused(folder: str) -> str:
    with pytest.raises(UserError) as raised:
        read_files(folder)
    (line,) = raised.value.lines
    assert line.startswith(f"{folder}: ")
    assert len(line.removeprefix(folder)) < 250
    assert line.isprintable()
    return line


def test_what_a_folder_holds(tmp_path):
    files = read_files(adapter(tmp_path / "a", {"lora_alpha": 16.5, "rank_pattern": {"q_proj": 2}}))
    assert files.shapes == {A: (2, 8), B: (8, 2)}
    assert files.settings.lora_alpha == 16.5
    assert files.settings.model_dump(exclude_none=True).keys() == {"r", "lora_alpha", "target_modules", "rank_pattern"}


def test_what_peft_itself_writes_is_read(tmp_path):
    peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    save_file(TENSORS, tmp_path / WEIGHTS)
    assert read_files(tmp_path).settings.target_modules == ["q_proj"]


# For each field of PEFT's config that is not honoured, a value that would change what the adapter computes.
REFUSED = {
    "bias": "all",
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"num_samples": 4},
    "ensure_weight_tying": True,
}


def test_each_field_of_pefts_config_is_honoured_or_refused():
    """A field that a new PEFT brings is refused once it is set; this test then asks for a decision."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}
    assert fields == set(LoraSettings.model_fields) | NOTES & fields | set(REFUSED)


@pytest.mark.parametrize("name", [*REFUSED, "from_a_newer_peft"])
def test_a_setting_that_is_not_honoured_is_refused_by_name(tmp_path, name):
    assert name in refused(adapter(tmp_path / "a", {name: REFUSED.get(name, 0.5)}))
    read_files(adapter(tmp_path / "b", {name: None}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "no_such", ["pissa"]])
def test_an_adapter_that_holds_part_of_its_base_is_refused(tmp_path, init):
    assert "needs a base of its own" in refused(adapter(tmp_path / "a", {"init_lora_weights": init}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "is damaged"),
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        ("{}", "no peft_type"),
        ("{" + " " * 2**22 + "}", "larger than 4 MiB"),
        ({"peft_type": "IA3"}, "is a 'IA3' adapter"),
        ({"peft_type": "PROMPT_TUNING"}, "is a 'PROMPT_TUNING' adapter"),
        ({"peft_type": ["LORA"] * 99}, "is a ['LORA'"),
        ({"peft_type": "\x1b[31m"}, r"'\x1b[31m'"),
        ({"r": "2"}, "sets r to '2'"),
        ({"r": 0}, "sets r to 0"),
        ({"r": 2.5}, "sets r to 2.5"),
        ({"r": True}, "sets r to True"),
        ({"lora_alpha": float("nan")}, "sets lora_alpha to nan"),
        ({"lora_alpha": [1]}, "sets lora_alpha to [1]"),
        ({"lora_alpha": 0}, "sets lora_alpha to 0"),
        ({"lora_alpha": 0.0}, "sets lora_alpha to 0.0"),
        ({"lora_dropout": 1.5}, "sets lora_dropout to 1.5"),
        ({"lora_dropout": 1.0}, "sets lora_dropout to 1.0"),
        ({"target_modules": None}, "sets target_modules to None"),
        ({"target_modules": 5}, "sets target_modules to 5"),
        ({"target_modules": [1]}, "sets target_modules to [1]"),
        ({"target_modules": "x" * 20_000}, "sets target_modules to 'xxx"),
        ({"target_modules": ["x"] * 6000}, "sets target_modules to ['x'"),
        ({"rank_pattern": ["q_proj"]}, "sets rank_pattern to ['q_proj']"),
        ({"rank_pattern": {"q_proj": "8"}}, "sets rank_pattern to {'q_proj': '8'}"),
        ({"alpha_pattern": {"q_proj": None}}, "sets alpha_pattern to {'q_proj': None}"),
        ({"modules_to_save": ["(a+)+"]}, "sets modules_to_save to ['(a+)+']"),
        ({"layers_pattern": "(a+)+", "layers_to_transform": [0]}, "sets layers_pattern to '(a+)+'"),
        ({"layers_to_transform": "0"}, "sets layers_to_transform to '0'"),
        ({"use_dora": "yes"}, "sets use_dora to 'yes'"),
        ({"trainable_token_indices": {"a|b": [1]}}, "sets trainable_token_indices to"),
    ],
)
def test_a_config_that_is_damaged_or_of_wrong_types_is_one_line(tmp_path, config, said):
    assert said in refused(adapter(tmp_path / "a", config))


def test_a_folder_without_a_config_is_no_adapter(tmp_path):
    assert "is no PEFT adapter: adapter_config.json can't be read" in refused(str(tmp_path))
    (tmp_path / CONFIG).mkdir()
    assert "can't be read" in refused(str(tmp_path))


@pytest.mark.parametrize("left", [0, 4, 9, 100, -4])
def test_tensors_that_were_not_written_completely_are_refused(tmp_path, left):
    folder = adapter(tmp_path / "a")
    size = (tmp_path / "a" / WEIGHTS).stat().st_size
    os.truncate(tmp_path / "a" / WEIGHTS, left % size)
    assert f"{WEIGHTS} is missing or damaged" in refused(folder)


def test_tensors_that_are_missing_none_or_of_another_kind_are_refused(tmp_path):
    assert "holds no tensors" in refused(adapter(tmp_path / "a", tensors={}))
    assert "isn't of a floating-point dtype" in refused(adapter(tmp_path / "b", tensors={A: np.zeros((2, 8), "i1")}))
    folder = adapter(tmp_path / "c")
    (tmp_path / "c" / WEIGHTS).unlink()
    assert "is missing or damaged" in refused(folder)


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path):
    folder = adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / PICKLE)
    line = refused(folder)
    assert "which may run code when it is read" in line
    assert "save_pretrained(" in line


@pytest.mark.parametrize(
    ("head", "said"), [(None, "lost its score head"), ((2, 8), "the shape (2, 8)"), ((8,), "the shape (8,)")]
)
def test_a_reward_adapter_needs_a_head_with_one_label(tmp_path, head, said):
    tensors = TENSORS | ({} if head is None else {SCORE_HEAD: np.zeros(head, "f4")})
    assert said in refused(adapter(tmp_path / "a", {"task_type": "SEQ_CLS"}, tensors))
    assert read_files(adapter(tmp_path / "b", {"task_type": "SEQ_CLS"}, TENSORS | {SCORE_HEAD: np.zeros((1, 8), "f4")}))
