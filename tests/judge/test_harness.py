"""lm-eval's tasks on the base in memory: against lm-eval's own model for transformers, and a task of our own."""

import json

import pytest
import torch
import yaml

from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.base import Role, load
from tests.helpers import scramble

lm_eval = pytest.importorskip("lm_eval", reason="optional: pip install 'qalign[tasks]'")

from lm_eval.api.instance import Instance  # noqa: E402

from qalign.judge.measures.harness import HarnessModel, measure_tasks  # noqa: E402

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris and not Lyon"),  # the space belongs to what follows
    ("", "An answer without a context."),
    ("Question: 2 + 2?\nAnswer:", " 4"),
]
COLOURS = [("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"), ("the sky", "blue")]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=number) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def base(tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype="float32", quantization="none", max_length=64))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    return base


@pytest.fixture(scope="module")
def own(tiny_folder):
    """lm-eval's own model of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(tiny_folder, device="cpu", dtype="float32", batch_size=1, max_length=63, add_bos_token=True)


@pytest.mark.filterwarnings("ignore")
def test_log_probs_are_those_of_lm_evals_own_model(base, own):
    found = HarnessModel(base, Role.BASE).loglikelihood(asked("loglikelihood", *PAIRS))
    expected = own.loglikelihood(asked("loglikelihood", *PAIRS))
    for (logp, greedy), (wanted, is_greedy) in zip(found, expected, strict=True):
        assert logp == pytest.approx(wanted, abs=1e-3)
        assert greedy == is_greedy


@pytest.mark.filterwarnings("ignore")
def test_a_long_text_is_read_in_windows_as_lm_eval_does(base, own):
    texts = [("word " * 200,), ("One short text.",)]
    found = HarnessModel(base, Role.BASE).loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    assert found == pytest.approx(own.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)), abs=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_greedy_answers_are_those_of_lm_evals_own_model_and_end_where_asked(base, own):
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    wanted = asked("generate_until", ("Name a river:", options), ("Why?", options))
    found = HarnessModel(base, Role.BASE).generate_until(wanted)
    assert found == own.generate_until(wanted)
    end = found[0][len(found[0]) // 2]
    (cut,) = HarnessModel(base, Role.BASE).generate_until(asked("x", ("Name a river:", options | {"until": end})))
    assert cut == found[0].split(end)[0]


def test_what_greedy_decoding_writes_is_greedy(base):
    model = HarnessModel(base, Role.POLICY)
    ids = model._prompt("Say it:", 40)
    with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
        token = lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    other = (token + 1) % 1000
    (_, is_greedy), (_, is_not) = model._scored([(ids, [token]), (ids, [other])])
    assert (is_greedy, is_not) == (True, False)


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_our_own_runs_on_base_and_adapter(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"thing": thing, "colour": colour, "wrong": "purple"} for thing, colour in COLOURS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "The colour of {{thing}} is",
        "doc_to_choice": "{{[colour, wrong]}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    found = measure_tasks(base, {"base": Role.BASE, "aligned": Role.POLICY}, [str(tmp_path / "colours.yaml")], None)
    for name, role in (("base", Role.BASE), ("aligned", Role.POLICY)):
        model = HarnessModel(base, role)
        right = 0
        for thing, colour in COLOURS:
            told = [(f"The colour of {thing} is", f" {word}") for word in (colour, "purple")]
            (one, _), (other, _) = model.loglikelihood(asked("loglikelihood", *told))
            right += one > other
        assert found["colours"][name]["metric"] == "acc"
        assert found["colours"][name]["value"] == pytest.approx(right / 5)
        assert found["colours"][name]["error"] is not None
    assert measure_tasks(base, {"base": Role.BASE}, [str(tmp_path / "colours.yaml")], 2)["colours"]["base"]


def test_a_task_that_is_not_there_is_a_line(base, tmp_path):
    with pytest.raises(UserError, match="--tasks: no_such_task"):
        measure_tasks(base, {"base": Role.BASE}, ["no_such_task"], None)
    (tmp_path / "broken.yaml").write_text("- a list")
    with pytest.raises(UserError, match="expected a task of lm-eval"):
        measure_tasks(base, {"base": Role.BASE}, [str(tmp_path / "broken.yaml")], None)
