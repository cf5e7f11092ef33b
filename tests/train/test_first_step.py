"""Memory that runs out in the first step: the run goes on with smaller micro-batches and has the same numbers."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.model.memory.first_step import FirstStep
from tests.helpers import metrics
from tests.reward_runs import run_stage, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ["sft", "reward", "dpo", "kto"]


def small_card(monkeypatch, tokens: int, *, after: int = 0) -> list[int]:
    """A forward pass that trains runs out of memory over so many tokens, once `after` of them are done; the tokens of
    each."""
    forward, seen = LlamaModel.forward, []

    def limited(model, input_ids=None, **named):
        if torch.is_grad_enabled() and not input_ids.is_meta:  # not in the planner
            seen.append(input_ids.numel())
            if len(seen) > after and input_ids.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(model, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaModel, "forward", limited)
    return seen


def curve(run) -> list[dict]:
    per_micro_batch = ("entropy", "mean_token_accuracy")  # TRL's are means over micro-batches
    return [
        {name: value for name, value in line.items() if "per_second" not in name and name not in per_micro_batch}
        for line in metrics(run)
    ]


@pytest.mark.parametrize("micro", ["auto", 4])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_smaller_micro_batches_and_the_same_numbers(
    stage, micro, tmp_path, tiny_folder, monkeypatch, capsys
):
    keys = {"batch_size": 8, "micro_batch_size": micro, "max_steps": 2, "lora": {"dropout": 0.0}}
    keys |= (
        {"limit": 6} if stage == "kto" else {}
    )  # pairs with two answers: the second step is half as large, as others
    expected = curve(run_stage(write_recipe(tmp_path / "large", tiny_folder, stage, **keys)))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        seen = small_card(patch, 1)
        with pytest.raises(UserError, match=r"^out of GPU memory with .* Try "):
            run_stage(write_recipe(tmp_path / "none", tiny_folder, stage, **keys))
    assert len(seen) > 1, "it was not tried again"
    largest = max(seen)
    for after in (0, 1):  # in the first micro-batch, or in the second, when there are gradients already
        capsys.readouterr()
        with monkeypatch.context() as patch:
            seen = small_card(patch, largest // 2 + 60, after=after)
            found = curve(run_stage(write_recipe(tmp_path / f"small {after}", tiny_folder, stage, **keys)))
        said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
        assert len(said) >= 1 - after
        assert all("in the first step: it goes on with " in line for line in said)
        assert [line.keys() for line in found] == [line.keys() for line in expected]
        for one, other in zip(found, expected, strict=True):
            for name, value in other.items():
                assert one[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name


def test_later_steps_end(tmp_path, tiny_folder, monkeypatch):
    keys = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 3}
    seen = small_card(monkeypatch, 1, after=1)
    with pytest.raises(UserError, match=r"Try dpo.micro_batch_size=1, or else model.max_length="):
        run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **keys))
    assert len(seen) == 2


def halved(limit: MicroBatchLimit, sizes: list[int]) -> list[str]:
    found = []
    while limit.halve(sizes):
        found.append(str(limit))
    return found


def test_half_as_much_down_to_the_longest_row():
    assert halved(MicroBatchLimit(pairs=6), [10] * 8) == ["3 at a time", "1 at a time"]
    assert halved(MicroBatchLimit(pairs=100), [10] * 4) == ["2 at a time", "1 at a time"]
    tokens = lambda most: f"up to {most} tokens at a time"  # noqa: E731
    assert halved(MicroBatchLimit(tokens=800), [50] * 8) == [tokens(200), tokens(100), tokens(50)]
    assert halved(MicroBatchLimit(tokens=800, longest=150), [50] * 8) == [tokens(200), tokens(150)]
    assert halved(MicroBatchLimit(tokens=800, longest=600), [50] * 8) == []


def test_what_a_failed_step_did_is_undone():
    """Random numbers, counters, gradients; and no tensor of it is alive when it is repeated."""
    weight, owner, drawn, alive = torch.zeros(1, requires_grad=True), SimpleNamespace(seen=[]), [], []

    def step():
        assert not any(reference() is not None for reference in alive)
        drawn.append(torch.rand(1).item())
        owner.seen.append(1)
        assert len(owner.seen) == 1
        assert weight.grad is None
        activation = (weight + 1).exp()
        alive.append(weakref.ref(activation))
        activation.sum().backward(retain_graph=True)
        if len(drawn) < 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return "done"

    def undo():
        weight.grad = None

    first = FirstStep(MicroBatchLimit(pairs=8))
    assert first.run(step, [1] * 8, undo, owner, ("seen",)) == "done"
    assert len(set(drawn)) == 1 < len(drawn)
    assert first.limit.pairs == 2


def test_other_errors_are_not_repeated():
    calls = []

    def step():
        calls.append(1)
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes"):
        FirstStep(MicroBatchLimit(pairs=8)).run(step, [1] * 8, lambda: None, None, ())
    assert len(calls) == 1
