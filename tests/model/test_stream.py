"""Layers that are streamed: the same bits as with all of them in memory, with two of them on the device at a time."""

from functools import partial
from itertools import product
from threading import active_count

import pytest
import torch
import transformers as tf

from qalign.config.recipe import Lora, Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenDialogue, TokenPair
from qalign.fit import streamed
from qalign.judge.measures.held_out import answer_logps, of_dialogues
from qalign.model.base import Base, Role, load
from qalign.model.logps import pair_logps, state_logps
from qalign.model.memory import stream as streaming
from qalign.model.memory.forecast import SHORTEST, Forecast, usable_of_card
from qalign.model.memory.lockstep import Reading, in_this_role, learn_together, pair_logps_together
from qalign.model.memory.offload import Offload
from qalign.model.memory.stream import placed, scales_of, stream_of
from qalign.model.reference import ReferenceLogps
from qalign.rl.ppo_setup import read_answers
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rollout_batch import SampledAnswers
from qalign.train.callbacks import checkpoint_layers
from tests.conftest import FIXTURES
from tests.families import family, random_pairs
from tests.helpers import metrics, refusal, scramble, slow, summary
from tests.model.test_memory import GIB, HALF, forecast_of, shape
from tests.reward_runs import run_stage, write_recipe

LAYERS = 6
TWICE = 2 * (LAYERS - 2)  # copies of a step: forward and backward each begin with two layers that are there already


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory) -> str:
    """A random Llama of 6 layers, more than the device has slots for."""
    folder = str(tmp_path_factory.mktemp("deep") / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=LAYERS, initializer_range=0.1, **sizes)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder: str, stream: str, *, checkpointing: bool = True, **model) -> Base:
    """A base with a policy that does something, in training mode, with dropout."""
    torch.manual_seed(0)
    base = load(Model(base=folder, compute_dtype="float32", stream=stream, **model))
    base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.1))
    scramble(base)
    if checkpointing:
        base.lm.activation_checkpointing_enable({"use_reentrant": False})
    base.train()
    return base


def step(base: Base, passes: int = 1) -> list[torch.Tensor]:
    """The log-probs of pairs, and the gradients of their sum over some passes, all run before the backward."""
    torch.manual_seed(1)
    batch, weights = base.batch(random_pairs()), list(base.trained_weights(Role.POLICY).values())
    with base.packed_attention(), base.acting_as(Role.POLICY) as lm:
        logps = torch.stack([pair_logps(lm, batch) for _ in range(passes)])
        return [logps.detach(), *torch.autograd.grad(logps[..., 0].sum(), weights)]


@pytest.mark.parametrize(("quantization", "checkpointing"), [("nf4", True), ("none", False)])
def test_gradients_are_those_of_a_base_in_memory(quantization, checkpointing, deep_folder):
    options = {"quantization": quantization, "checkpointing": checkpointing}
    resident, streamed = (trained(deep_folder, when, **options) for when in ("never", "always"))
    assert stream_of(resident.lm) is None
    stream = stream_of(streamed.lm)
    for passes in (1, 2):
        assert all(map(torch.equal, step(streamed, passes), step(resident, passes)))
    before = stream.copies
    step(streamed)
    assert stream.copies - before == TWICE


def test_the_device_holds_two_layers(deep_folder):
    resident, streamed = (load(Model(base=deep_folder, stream=when)) for when in ("never", "always"))
    stream, layers = stream_of(streamed.lm), streamed.lm.base_model.layers
    tensors = [part for t in (*layers.parameters(), *layers.buffers()) for part in (t, *scales_of(t))]
    large = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.nbytes > 64}
    assert sum(large.values()) == stream.slot_bytes == pytest.approx(stream.layer_bytes * 2 / LAYERS)
    assert resident.held_bytes - streamed.held_bytes == pytest.approx(stream.saved_bytes, rel=0.02)
    copied, one = stream.copied_bytes, stream.copied_bytes // stream.copies
    ids = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(streamed.lm(input_ids=ids).logits, resident.lm(input_ids=ids).logits)
    assert (stream.copied_bytes - copied) % one == 0
    assert stream.copied_bytes - copied <= 2 * stream.layer_bytes


def test_pinned_layers_are_held_in_pieces(deep_folder, monkeypatch):
    """What a GPU's layers are copied from; here its memory isn't pinned."""
    expected, real = step(trained(deep_folder, "never")), streaming._hold
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    monkeypatch.setattr(streaming, "_hold", lambda *args, pinned: real(*args, pinned=True))
    base = trained(deep_folder, "always")
    assert len(stream_of(base.lm)._held[0]) > 5
    assert all(map(torch.equal, step(base), expected))


@pytest.mark.parametrize("offloaded", [False, slow(True)])
def test_all_roles_of_a_step_visit_a_layer_together(offloaded, deep_folder):
    """Policy and reference of a step on pairs: a layer is copied once in the forward and once in the backward."""
    found, pairs = [], random_pairs()
    for when in ("never", "always"):
        base = trained(deep_folder, when)
        stream, weights = stream_of(base.lm), list(base.trained_weights(Role.POLICY).values())
        held = Offload(base.lm, [], smallest=1) if offloaded else None
        for _ in range(2):
            torch.manual_seed(1)
            before = stream.copies if stream else 0
            with base.packed_attention():
                policy, reference = ReferenceLogps().beside_policy(base, pairs, base.batch(pairs))
                gradients = torch.autograd.grad(policy[:, 0].sum(), weights)
        assert stream is None or stream.copies - before == TWICE
        assert base.role == Role.POLICY
        found.append([policy.detach(), reference, *gradients, torch.tensor(held.bytes if held else 0)])
    assert all(map(torch.equal, *found))
    assert (found[0][0] - found[0][1]).abs().max() > 0.1


def dialogues_of(base: Base, rows: list[TokenPair]) -> list[object]:
    rows = [TokenDialogue(ids := row.prompt_ids + row.answers[0], ids, row.where) for row in rows]
    return [*of_dialogues(base, rows, Role.BASE).values()]


def sampled_answers_of(base: Base, rows: list[TokenPair]) -> list[torch.Tensor]:
    answers = [SampledAnswers(None, row, ("", ""), (True, True)) for row in rows]
    rollout = read_answers(base, answers, MicroBatchLimit(tokens=2048), 1.0)
    return [rollout.old_logps, rollout.reference_logps]


@pytest.mark.parametrize(
    "measured",
    [
        lambda base, rows: [*answer_logps(base, [Role.BASE, Role.POLICY], rows).values()],
        dialogues_of,
        sampled_answers_of,
    ],
)
def test_roles_that_are_measured_visit_a_layer_together(measured, deep_folder):
    """A batch is read under both; with two of the layers there from the batch before, the others are copied once."""
    found, rows = [], random_pairs()
    for when in ("never", "always"):
        base = trained(deep_folder, when, checkpointing=False)
        stream = stream_of(base.lm)
        for _ in range(2):
            before = stream.copies if stream else 0
            values = measured(base, rows)
        assert stream is None or stream.copies - before <= LAYERS
        found.append(values)
    assert all(
        torch.equal(*both) if torch.is_tensor(both[0]) else both[0] == both[1] for both in zip(*found, strict=True)
    )


@pytest.mark.parametrize("checkpointed", [LAYERS, 0])
def test_two_trained_roles_visit_a_layer_together(checkpointed, deep_folder):
    """Forward and backward of policy and value model, as in PPO's update: each layer is computed again in the role that
    it was computed in."""
    found, pairs = [], random_pairs()
    for when in ("never", "always"):
        base = trained(deep_folder, when, checkpointing=False)
        base.add_adapter(Role.VALUE, Lora(r=4))
        scramble(base, Role.VALUE)
        checkpoint_layers(base.lm, checkpointed, partial(in_this_role, base))
        base.train()
        stream, batch = stream_of(base.lm), base.batch(pairs)
        readings = [Reading(role, batch, gradients=True) for role in (Role.POLICY, Role.VALUE)]

        def loss_of(reading, lm, states, base=base, batch=batch):
            if reading.role == Role.VALUE:
                return base.head_scores(Role.VALUE, states).square().mean()
            return state_logps(lm, states, batch.targets).mean()

        torch.manual_seed(1)
        with base.packed_attention():
            for _ in range(2):
                before = stream.copies if stream else 0
                learn_together(base, readings, loss_of, torch.Tensor.backward)
        assert stream is None or stream.copies - before == TWICE
        assert base.role == Role.POLICY
        found.append([w.grad for role in (Role.POLICY, Role.VALUE) for w in base.trained_weights(role).values()])
    assert all(map(torch.equal, *found))
    assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_a_pass_that_fails_ends_the_others(deep_folder, monkeypatch):
    base, threads = trained(deep_folder, "always"), active_count()
    layers, batch = list(base.lm.base_model.layers), base.batch(random_pairs())
    readings = [Reading(role, batch) for role in (Role.REFERENCE, Role.POLICY)]
    with base.packed_attention():
        expected = pair_logps_together(base, readings)
        for broken in (layers[3], base.lm.base_model.norm):  # in this thread, and in that of a pass
            with monkeypatch.context() as patch:
                patch.setattr(broken, "forward", None)
                with pytest.raises(TypeError):
                    pair_logps_together(base, readings)
            assert active_count() == threads
            assert list(base.lm.base_model.layers) == layers
        assert all(map(torch.equal, pair_logps_together(base, readings), expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "gpt-oss", "qwen3_next"])
def test_families_with_keys_experts_and_states_of_their_own(name, tmp_path):
    """Layers that use the keys of others, experts in 4 bits, and layers without attention."""
    tokenizer = tf.AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    family(name, len(tokenizer) + 10, dtype=torch.float32, spread=0.1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    resident, streamed = (trained(str(tmp_path), when) for when in ("never", "always"))
    assert all(map(torch.equal, step(streamed), step(resident)))
    pairs, found = random_pairs(), []
    for base in (streamed, resident):
        torch.manual_seed(1)
        with base.packed_attention():
            found.append(ReferenceLogps().beside_policy(base, pairs, base.batch(pairs)))
    assert all(map(torch.equal, *found))


def test_auto_streams_where_the_base_does_not_fit(deep_folder, monkeypatch):
    """Without a forecast, as in commands that don't train."""
    tried = []

    def read(device: torch.device):
        tried.append(device)
        if len(tried) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tf.AutoModelForCausalLM.from_pretrained(deep_folder)

    assert stream_of(placed(read, torch.device("cpu"), "auto"))
    with pytest.raises(torch.OutOfMemoryError):
        placed(read, torch.device("cpu"), "never")
    with pytest.raises(ValueError, match="broken"):
        placed(lambda _: (_ for _ in ()).throw(ValueError("broken")), torch.device("cpu"), "auto")


# --- stages and the planner ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dpo", *(slow(name) for name in ("sft", "reward", "kto"))])
def test_a_run_has_the_same_numbers(stage, tmp_path, deep_folder, capsys):
    keys = {"limit": 6, "batch_size": 3, "micro_batch_size": 3, "lora": {"dropout": 0.1}}
    runs = {}
    for when in ("never", "always"):
        runs[when] = run_stage(write_recipe(tmp_path / when, deep_folder, stage, model={"stream": when}, **keys))
    assert "  streamed       6 layers from memory, of which the device holds 2 at a time" in capsys.readouterr().out
    found = [[{**line, "tokens_per_second": None} for line in metrics(run)] for run in runs.values()]
    assert summary(runs["always"])["streamed_bytes"] > 0
    assert len(found[0]) > 1
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["adapter", "trunk"])
def test_ppo_has_the_same_numbers(value, tmp_path, deep_folder, monkeypatch):
    """Sampling too, which copies all layers for each token. The update of a micro-batch visits each layer twice."""
    copies, real = [], PPOTrainer._gradients

    def counted(trainer, *args):
        stream = stream_of(trainer.base.lm)
        before = stream.copies if stream else 0
        gradients = real(trainer, *args)
        copies.append(stream.copies - before if stream else None)
        return gradients

    monkeypatch.setattr(PPOTrainer, "_gradients", counted)
    code = "def score(completion_ids):\n    return [sum(ids) % 7.0 for ids in completion_ids]"
    (tmp_path / "mine.py").write_text(code)
    keys = {"reward": f"{tmp_path}/mine.py:score", "value": value, "max_new_tokens": 8, "samples_per_prompt": 2}
    keys |= {"micro_batch_size": 2}
    found = []
    for when in ("never", "always"):
        run = run_stage(write_recipe(tmp_path / when, deep_folder, "ppo", model={"stream": when}, limit=4, **keys))
        found.append(
            [{k: v for k, v in line.items() if not k.startswith(("share/", "tokens_"))} for line in metrics(run)]
        )
    assert len(found[0]) > 1
    assert found[0] == found[1]
    streamed = [count for count in copies if count is not None]
    assert len(streamed) == len(copies) / 2
    assert {*streamed} <= {TWICE, TWICE + 2}  # two layers more where the slots have the last layers of a forward


@pytest.mark.parametrize(
    ("changes", "line", "fix"),
    [
        ({"model": {"quantization": "int8"}}, "model.stream:", "use nf4"),
        ({"lora": {"dora": True}}, "lora.dora:", "remove it"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes, line, fix, tmp_path, deep_folder, capsys):
    model = {"stream": "always", **changes.pop("model", {})}
    said = refusal(capsys, lambda: run_stage(write_recipe(tmp_path, deep_folder, "dpo", model=model, **changes)))
    assert line in said
    assert fix in said


def test_the_forecast_streams_what_does_not_fit():
    """Mistral-7B on a card of 4 GiB: it holds the embeddings, the head and two of 32 layers."""
    small, large = usable_of_card(4 * GIB), usable_of_card(12 * GIB)
    whole = forecast_of(shape("Mistral-7B-v0.3"), "dpo", "cuda", HALF)
    assert whole.decided(large) is whole
    assert whole.streamed == 0
    assert whole.total(SHORTEST, 32, offloaded=True) > small
    found = whole.decided(small)
    assert found.recipe.model.stream == "always"
    linear = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert found.streamed == pytest.approx(32 * (linear * 4.127 / 8 + 2 * 4096 * 2), rel=0.001)
    assert whole.fixed["base"] - found.fixed["base"] == pytest.approx(found.streamed * 30 / 32)
    assert found.total(SHORTEST, 32) < small
    (said,) = streamed(found)
    assert said[1].startswith(f"yes: 32 layers from {found.streamed / GIB:.2f} GiB of the computer's memory; ")
    assert streamed(whole) == []
    never = whole.with_recipe(whole.recipe.model_copy(update={"model": Model(base="unused", stream="never")}))
    assert never.decided(small) is never
    on_cpu = forecast_of(shape("Mistral-7B-v0.3"), "dpo", "cpu", HALF)
    assert on_cpu.decided(small) is on_cpu


def test_the_forecast_counts_what_policy_and_value_model_keep_together():
    config, kept = shape("Mistral-7B-v0.3"), {}
    for stream, value in product(("always", "never"), ("adapter", "trunk")):
        forecast = forecast_of(config, "ppo", "cuda", HALF, model={"stream": stream}, value=value)
        kept[stream, value] = forecast.parts(2048, 32)["activations"]
    assert kept["always", "adapter"] == 2 * kept["always", "trunk"]
    assert kept["never", "adapter"] == kept["never", "trunk"] == kept["always", "trunk"]


def test_a_streamed_micro_batch_is_a_whole_step():
    """Each micro-batch copies all layers."""
    recipe = {"model": {"stream": "always"}, "batch_size": 64}
    config, memory_bytes = shape("Mistral-7B-v0.3"), usable_of_card(24 * GIB)
    streamed = forecast_of(config, "dpo", "cuda", HALF, **recipe)
    assert isinstance(streamed, Forecast)
    streamed.most_steps = 20_000
    assert streamed.plan(memory_bytes, 1000).tokens == 20_000
    streamed.most_steps = 2**40
    assert streamed.plan(memory_bytes, 200).tokens == 64 * 200
    streamed.processes = 3
    assert streamed.plan(memory_bytes, 600).tokens == 22 * 600
