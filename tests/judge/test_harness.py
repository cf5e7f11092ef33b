"""lm-eval's tasks on the base in memory: against lm-eval's own model for transformers, and a task of our own."""

import json

import pytest
import torch
import yaml

from qalign import evaluate
from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.base import Role, load
from tests.helpers import leaving, scramble
from tests.reward_runs import run_stage, write_recipe

lm_eval = pytest.importorskip("lm_eval", reason="optional: pip install 'qalign[tasks]'")

from lm_eval.api.instance import Instance  # noqa: E402

from qalign.judge.measures.harness import HarnessModel, Tasks, measure_tasks  # noqa: E402

pytestmark = pytest.mark.slow  # `.ci/run` installs lm-eval before these

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
    found = measure_tasks(
        base, {"base": Role.BASE, "aligned": Role.POLICY}, Tasks([str(tmp_path / "colours.yaml")]), None
    )
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
    assert measure_tasks(base, {"base": Role.BASE}, Tasks([str(tmp_path / "colours.yaml")]), 2)["colours"]["base"]


def test_a_task_that_is_not_there_is_a_line():
    with pytest.raises(UserError, match="--tasks: lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        Tasks(["arc_eazy"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [(b"- a list", "expected a task of lm-eval"), (b"task: \xff", "can't be read"), (b"[" * 5000, "can't be read")],
)
def test_a_file_that_holds_no_task_is_a_line(text, problem, tmp_path):
    (tmp_path / "broken.yaml").write_bytes(text)
    with pytest.raises(UserError, match=problem):
        Tasks([str(tmp_path / "broken.yaml")])


def test_a_package_that_a_task_needs_and_is_not_there_is_a_line(base, tmp_path, monkeypatch):
    def evaluates(**_):
        raise ImportError("No module named 'antlr4'")

    monkeypatch.setattr("qalign.judge.measures.harness.simple_evaluate", evaluates)
    (tmp_path / "own.yaml").write_text("{task: own, dataset_path: json, dataset_kwargs: null}")
    with pytest.raises(UserError, match="lm-eval can't run them: \"No module named 'antlr4'"):
        measure_tasks(base, {"base": Role.BASE}, Tasks([str(tmp_path / "own.yaml")]), None)


def test_the_other_figures_are_kept_where_a_task_fails(tiny_folder, tmp_path, capsys):
    path = write_recipe(tmp_path / "run", tiny_folder, "kto", holdout=0.2, max_steps=1)
    run = run_stage(path)
    (tmp_path / "own.yaml").write_text("{task: own, test_split: test, dataset_path: json, dataset_kwargs: null}")
    assert leaving(evaluate.main, path, "--tasks", str(tmp_path / "own.yaml")) == 2
    assert "lm-eval can't run them" in capsys.readouterr().err
    assert json.loads((run.path / "evaluation.json").read_text())["stage"] == "kto"
