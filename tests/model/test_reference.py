"""Log-probs of the reference: computed once per pair and cached; what is read from the cache is verified."""

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import qalign.model.reference
from qalign.config.recipe import Lora, Model
from qalign.config.stages import DPO
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenPair
from qalign.model.base import Role, load
from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
from qalign.train.trainers.policy import PreferenceTrainer
from tests.families import alone, random_pairs
from tests.helpers import dpo_config, house_style, metrics, scramble, train

LN_2 = torch.tensor(2.0).log().item()  # in float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache that begins empty."""
    monkeypatch.setattr(qalign.model.reference, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "reference"


@pytest.fixture
def base(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    return tiny_base


@pytest.fixture
def pairs(base) -> list[TokenPair]:
    return house_style(base.tokenizer, 6)


def ask(references: ReferenceLogps, base, pairs: list[TokenPair]) -> torch.Tensor:
    with base.packed_attention():
        return references.logps(base, pairs, base.batch(pairs))


def asked_and_saved(base, pairs: list[TokenPair]) -> tuple[torch.Tensor, CachedReferenceLogps]:
    references = CachedReferenceLogps(base, None)
    found = ask(references, base, pairs)
    references.save()
    return found, references


def policy_base(tiny_folder, dtype: str = "float32"):
    """A fresh base whose policy begins at zero."""
    torch.manual_seed(0)
    base = load(Model(base=tiny_folder, compute_dtype=dtype))
    base.add_adapter(Role.POLICY, Lora(r=4))
    return base


def test_they_are_the_references(base):
    pairs = random_pairs(vocabulary=2000)
    scramble(base)
    with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
        expected = alone(lm, pairs)
    for references in (ReferenceLogps(), CachedReferenceLogps(base, None)):
        found = ask(references, base, pairs)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_each_pair_is_computed_once(base, pairs):
    references = CachedReferenceLogps(base, None)
    first = ask(references, base, pairs[:4])
    assert references.computed == 4
    assert torch.equal(ask(references, base, pairs[:4]), first)
    assert torch.equal(ask(references, base, pairs[3::-1]), first.flip(0))
    assert references.computed == 4
    more = ask(references, base, pairs)
    assert torch.equal(more[:4], first)
    assert references.computed == 6
    torch.testing.assert_close(more, ask(ReferenceLogps(), base, pairs), rtol=1e-6, atol=0)


def test_runs_add_to_one_file_and_compute_their_first_batch_once_more(base, pairs, cache):
    assert not cache.exists()
    first, references = asked_and_saved(base, pairs[:3])
    more, _ = asked_and_saved(base, pairs[3:])
    assert [file.name for file in cache.glob("[!.]*")] == [references.file.name]
    third = CachedReferenceLogps(base, None)
    assert torch.equal(torch.cat([ask(third, base, pairs[:2]), ask(third, base, pairs[2:])]), torch.cat([first, more]))
    assert third.computed == 2, "all but the verification was read"
    written = third.file.stat().st_mtime_ns
    third.save()
    assert third.file.stat().st_mtime_ns == written, "there was nothing to save"


FIRST = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8, 10]}


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"where": "another.jsonl:9", "margin": 2.0}, 1),
        ({"prompt_ids": [5, 6, 4]}, 2),
        ({"chosen_ids": [8, 4]}, 2),
        ({"rejected_ids": [8, 4]}, 2),
        ({"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 10]}, 2),  # another border
    ],
)
def test_pairs_are_one_if_all_their_ids_are_equal(base, change, computed):
    references = CachedReferenceLogps(base, None)
    ask(references, base, [TokenPair(**FIRST, where="one")])
    ask(references, base, [TokenPair(**FIRST | {"where": "other"} | change)])
    assert references.computed == computed


MICRO = [MicroBatchLimit(pairs=6), MicroBatchLimit(tokens=400)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro", MICRO, ids=str)
def test_the_first_loss_is_ln_2_to_the_bit(tiny_folder, tmp_path, dtype, micro):
    """In a run that computes its references, and in one that reads them."""
    for number in range(2):
        base = policy_base(tiny_folder, dtype)
        pairs = house_style(base.tokenizer, 6)
        references = CachedReferenceLogps(base, None)
        args = dpo_config(tmp_path, per_device_train_batch_size=6, bf16=dtype == "bfloat16", max_steps=1)
        trainer = PreferenceTrainer(base, DPO.model_validate({"data": "unused"}), references, args, micro, pairs)
        trainer.train()
        references.save()
        assert trainer.state.log_history[0]["loss"] == LN_2
        first = len(base.micro_batches(pairs, micro)[0])
        assert references.computed == (first if number else 6)


def test_files_of_other_references_are_others(tiny_folder, tmp_path):
    """Another base, adapter, precision, template: what was kept for one is never read for the other."""
    base = policy_base(tiny_folder)
    for name, scale in (("one", 0.05), ("two", 0.06)):
        scramble(base, scale=scale)
        base.save_adapter(Role.POLICY, tmp_path / name)
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{% for turn in messages %}{{ turn.content }}{{ eos_token }}{% endfor %}")
    spec = {"base": tiny_folder, "compute_dtype": "float32"}
    kinds = [
        ({}, None), ({}, "one"), ({}, "two"), ({"compute_dtype": "bfloat16"}, None), ({"quantization": "none"}, None),
        ({"double_quant": False}, None), ({"chat_template": str(template)}, None),
    ]  # fmt: skip
    files = []
    for values, adapter in kinds:
        base = load(Model(**spec | values))
        files.append(CachedReferenceLogps(base, adapter and str(tmp_path / adapter)).file)
    assert len({file.name for file in files}) == len(kinds)
    assert CachedReferenceLogps(load(Model(**spec)), None).file == files[0]
    (tmp_path / "two" / "adapter_model.safetensors").replace(tmp_path / "one" / "adapter_model.safetensors")
    assert CachedReferenceLogps(load(Model(**spec)), str(tmp_path / "one")).file != files[1], "an adapter trained again"


def flipped(content: bytes, place: int) -> bytes:
    place += len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        *[lambda content, kept=kept: content[:kept] for kept in (0, 10, 200, -1)],
        # Bits of the log-probs and of the digests.
        *[lambda content, place=place: flipped(content, place) for place in (-1, -30, -200)],
        lambda content: save({"weights": torch.zeros(3)}),
    ],
)
def test_a_damaged_file_is_noticed_and_mended(base, pairs, capsys, damage):
    first, references = asked_and_saved(base, pairs)
    content = references.file.read_bytes()
    references.file.write_bytes(damage(content))
    again = CachedReferenceLogps(base, None)
    assert f"note: {references.file} is damaged" in capsys.readouterr().out
    assert torch.equal(ask(again, base, pairs), first)
    assert again.computed == len(pairs)
    again.save()
    assert references.file.read_bytes() == content


@pytest.mark.parametrize("others_first", [False, True])  # then the second batch is the first that holds cached pairs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_files_with_other_numbers_are_noticed(tiny_folder, capsys, dtype, others_first):
    """As a library would write them that computes otherwise: the checksum is right, the numbers aren't."""
    base = policy_base(tiny_folder, dtype)
    pairs = house_style(base.tokenizer, 6)
    first, references = asked_and_saved(base, pairs[:3])
    tensors = load_file(references.file)
    tensors["logps"] += 0.02 * tensors["logps"].abs()
    save_file(tensors, references.file, metadata={"checksum": qalign.model.reference._checksum(tensors)})
    again = CachedReferenceLogps(base, None)
    if others_first:
        ask(again, base, pairs[3:])
    assert not capsys.readouterr().out
    found = ask(again, base, pairs[:3])
    assert f"note: {references.file} differs" in capsys.readouterr().out
    torch.testing.assert_close(found, first, rtol=1e-6 if dtype == "float32" else 1e-2, atol=0)


def test_killed_while_saving_the_old_file_is_whole(base, pairs, monkeypatch):
    first, references = asked_and_saved(base, pairs[:3])
    content = references.file.read_bytes()

    def killed(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(qalign.model.reference, "save_file", killed)
    second = CachedReferenceLogps(base, None)
    ask(second, base, pairs)
    with pytest.raises(KeyboardInterrupt):
        second.save()
    assert references.file.read_bytes() == content
    third = CachedReferenceLogps(base, None)
    assert torch.equal(ask(third, base, pairs[:3]), first)
    assert third.computed == 3  # verified, and taken


def curve(run) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_the_command_keeps_them_with_its_checkpoints(recipe_file, cache, monkeypatch):
    made, real = [], CachedReferenceLogps.__init__

    def remembered(self, *args):
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(CachedReferenceLogps, "__init__", remembered)
    keys = {"limit": 8, "epochs": 2, "save_every": 2}
    one = train(recipe_file("one.yaml", output="one", **keys))
    two = train(recipe_file("two.yaml", output="two", **keys))
    in_step = train(recipe_file("three.yaml", output="three", reference="in_step", **keys))
    assert [references.computed for references in made] == [8, 2]
    assert len(list(cache.glob("[!.]*"))) == 1
    assert curve(one)[0] == curve(in_step)[0] == LN_2
    assert curve(two) == curve(one)
    assert curve(in_step) == pytest.approx(curve(one), rel=1e-5)


def test_losses_without_a_reference_keep_none(recipe_file, cache):
    train(recipe_file(loss="simpo", max_steps=1))
    assert not cache.exists()


def test_what_a_stopped_run_had_computed_is_there(recipe_file, cache, monkeypatch):
    """Killed after its first checkpoint, before its end."""
    real = CachedReferenceLogps.save
    calls = []

    def killed(self):
        real(self)
        calls.append(self.computed)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CachedReferenceLogps, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe_file(limit=12, save_every=1))
    (file,) = cache.glob("[!.]*")
    assert len(load_file(file)["logps"]) == calls[-1] == 8


@pytest.mark.parametrize("place", ["cache", "reference", "file"])
def test_a_cache_that_cannot_be_written_is_said_once_and_nothing_stops(base, pairs, cache, place, capsys):
    references = CachedReferenceLogps(base, None)
    blocked = {"cache": cache.parent, "reference": cache, "file": references.file}[place]
    if place == "file":
        blocked.mkdir(parents=True)
    else:
        blocked.parent.mkdir(parents=True, exist_ok=True)
        blocked.write_text("a file in its place")
    references = CachedReferenceLogps(base, None)
    for some in (pairs[:3], pairs[3:]):
        ask(references, base, some)
        references.save()
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"note: {references.file} can't be written (") == 1
    assert references.computed == len(pairs)
    assert blocked.is_dir() if place == "file" else blocked.read_text() == "a file in its place"


def test_what_a_killed_save_left_is_cleared_at_the_next_one(base, pairs, cache):
    cache.mkdir(parents=True)
    (cache / ".0123.4567.safetensors").write_bytes(b"half")
    _, references = asked_and_saved(base, pairs[:2])
    assert [file.name for file in cache.iterdir() if file.name != ".lock"] == [references.file.name]
