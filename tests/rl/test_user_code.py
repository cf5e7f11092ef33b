"""Functions of the user: whatever they raise or give is one line, and they leave the process as it was."""

import gc
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from qalign import ppo
from qalign.data.formats import Prompt
from qalign.data.store.sequences import TokenAnswers
from qalign.errors import Stopped, UserError
from qalign.rl import user_code
from qalign.rl.rewards import FunctionScorer, RewardFailed, combined
from qalign.rl.rollout_batch import SampledAnswers
from tests.helpers import leaving, summary
from tests.reward_runs import run_stage


def row(number: int, *texts: str, **columns) -> SampledAnswers:
    prompt = Prompt(({"role": "user", "content": "Why?"},), f"rows.jsonl:{number}", columns)
    tokens = TokenAnswers([1, 2], tuple([3] * len(text) for text in texts))
    return SampledAnswers(prompt, tokens, texts, tuple(True for _ in texts))


IMPORTS = "import os, sys, gc, random, signal, warnings\nimport numpy, torch\n"
ROWS = [row(1, "Because.", "So.", level=1), row(2, "The Elbe.", "", level=2)]


@pytest.fixture
def function(tmp_path):
    """A scorer of the function `score` in a file with this body, or this whole text."""

    def make(
        body: str, head: str = "import os, sys, gc, random, signal, warnings\nimport numpy, torch\n"
    ) -> FunctionScorer:
        (tmp_path / "mine.py").write_text(f"{head}def score(completions, **row):\n    {body}\n")
        return FunctionScorer("ppo.reward", f"{tmp_path / 'mine.py'}:score", 1.0)

    return make


def said(call) -> str:
    with pytest.raises(UserError) as raised:
        call()
    (line,) = raised.value.lines
    assert line.startswith("ppo.reward: ")
    assert len(line) <= 300
    return line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit(0)", "raised SystemExit on an answer to rows.jsonl:1: 0"),
        ("sys.exit()", "raised SystemExit on an answer to rows.jsonl:1"),
        ("exit('done')", "raised SystemExit on an answer to rows.jsonl:1: done"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("raise BaseException('x' * 9999)", "raised BaseException"),
        ("raise ValueError('\\x1b[31mred\\nnext')", "on an answer to rows.jsonl:1: \\x1b[31mred next"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "raised Odd on an answer to rows.jsonl:1"),
        ("return completions[0]['content']", "completions are texts here"),
        ("return (score for score in [1.0, sys.exit(0)])", "raised SystemExit"),
        ("return None", "gave None; expected a list with one number per answer"),
        ("return 1.0", "gave 1.0; expected a list"),
        ("return 'good'", "gave 'good'; expected a list"),
        ("return {'score': 1.0}", "expected a list"),
        ("return {1.0, 2.0, 3.0, 4.0}", "expected a list"),
        ("return torch.tensor(1.0)", "gave tensor(1.); expected a list"),
        ("return [[1.0], [1.0], [1.0], [1.0]]", "gave [1.0] for an answer to rows.jsonl:1; expected a finite number"),
        ("return torch.zeros(4, 1)", "gave [0.0] for an answer to rows.jsonl:1"),
        ("return [1.0]", "gave 1 scores for 4 answers, the first to rows.jsonl:1"),
        ("return iter(int, 1)", "gave more than 4 scores for 4 answers"),
        ("return [1.0, 2.0, 'bad', 4.0]", "gave 'bad' for an answer to rows.jsonl:2"),
        ("return [1.0, 2.0, 1j, 4.0]", "gave 1j for an answer to rows.jsonl:2"),
        ("return [0.0, float('-inf'), 0.0, 0.0]", "gave -inf for an answer to rows.jsonl:1"),
        ("return [0.0, numpy.nan, 0.0, 0.0]", "gave nan for an answer to rows.jsonl:1"),
        ("return ['x' * 10**6] * 4", "for an answer to rows.jsonl:1; expected a finite number"),
        ("return [type('Odd', (), {'__repr__': lambda self: 1 / 0})()] * 4", "gave an object of Odd for"),
        ("return [len(completions)] * 4, 1", "gave 2 scores for 4 answers"),
    ],
)  # fmt: skip
def test_what_a_function_does_wrong_is_one_line(body, words, function):
    assert words in said(lambda: function(body).scores(ROWS))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return numpy.array([1.0, 2.0, 3.0, 4.0])", [1, 2, 3, 4]),
        ("return torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)", [1, 2, 3, 4]),
        ("return [torch.tensor(1.0, requires_grad=True), numpy.float64(2), numpy.bool_(True), False]", [1, 2, 1, 0]),
        ("return tuple(True for _ in completions)", [1, 1, 1, 1]),
        ("return (len(text) for text in completions)", [8, 3, 9, 0]),
        ("print('scoring', flush=True); return [0] * 4", [0, 0, 0, 0]),
        ("warnings.simplefilter('ignore'); warnings.warn('x'); return [0] * 4", [0, 0, 0, 0]),
    ],
)
def test_numbers_in_any_form_are_scores(body, expected, function):
    assert function(body).scores(ROWS).flatten().tolist() == expected


CHANGES = {
    "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.set_default_dtype(torch.float64)": torch.get_default_dtype,
    "torch.set_default_device('meta')": lambda: (torch.get_default_device(), torch.zeros(1).device),
    "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled,
    "torch.use_deterministic_algorithms(True, warn_only=True)": torch.is_deterministic_algorithms_warn_only_enabled,
    "torch.set_num_threads(torch.get_num_threads() + 1)": torch.get_num_threads,
    "torch.set_float32_matmul_precision('medium')": torch.get_float32_matmul_precision,
    "torch.backends.cudnn.benchmark = True": lambda: torch.backends.cudnn.benchmark,
    "torch.backends.cudnn.deterministic = True": lambda: torch.backends.cudnn.deterministic,
    "torch.set_autocast_enabled('cpu', True)": lambda: torch.is_autocast_enabled("cpu"),
    "torch.autograd.set_detect_anomaly(True)": torch.is_anomaly_enabled,
    "torch.manual_seed(0)": lambda: torch.get_rng_state().tolist(),
    "random.seed(0)": random.getstate,
    "numpy.random.seed(0)": lambda: numpy.random.get_state()[1].tolist(),
    "os.chdir('/')": os.getcwd,
    "sys.path.clear()": lambda: list(sys.path),
    "warnings.simplefilter('error')": lambda: list(warnings.filters),
    "sys.setrecursionlimit(5000)": sys.getrecursionlimit,
    "gc.disable()": gc.isenabled,
    "sys.stdout = None": lambda: sys.stdout,
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": lambda: signal.getsignal(signal.SIGTERM),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_function_leaves_the_process_as_it_was(change, fails, function):
    look, scorer = CHANGES[change], function(f"{change}; return [0] * {3 if fails else 4}")
    before = look()
    if fails:
        said(lambda: scorer.scores(ROWS))
    else:
        scorer.scores(ROWS)
    assert look() == before


@pytest.mark.parametrize(
    "change", ["torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)", "os.chdir('/')"]
)
def test_so_does_the_import_of_its_file(change, function):
    before = CHANGES[change]()
    function("return [0] * 4", head=f"import os, torch\n{change}\n")
    assert CHANGES[change]() == before


def test_an_import_may_extend_the_search_path_and_an_exit_there_is_one_line(function, tmp_path):
    path = list(sys.path)
    try:
        function("return [0] * 4", head=f"import sys\nsys.path.append({str(tmp_path)!r})\n")
        assert str(tmp_path) in sys.path
    finally:
        sys.path[:] = path
    line = said(lambda: function("return [0] * 4", head="import sys\nsys.exit(0)\n"))
    assert "can't be imported: SystemExit: 0" in line


def test_its_random_numbers_are_a_stream_of_their_own(function):
    """They go on from call to call, the process draws what it would have drawn, and a checkpoint goes on with them."""
    scorer = function("return [random.random(), float(numpy.random.rand()), torch.rand(()), 0.0]")
    ours = torch.get_rng_state()
    first = scorer.scores(ROWS)
    assert torch.equal(torch.get_rng_state(), ours)
    kept = user_code.stream_state().copy()
    second, third = scorer.scores(ROWS), scorer.scores(ROWS)
    assert len({*first.flatten()[:3].tolist(), *second.flatten()[:3].tolist()}) == 6
    user_code.set_stream_state(kept)
    assert torch.equal(scorer.scores(ROWS), second)
    assert not torch.equal(second, third)


def test_it_can_change_no_row(function):
    columns = {"level": [1, 2]}
    rows = [row(1, "So.", **columns), row(2, "No.", **columns)]
    scorer = function("row['level'][0].append(3); row['prompts'][0][0]['content'] = 'x'; return [0, 0]")
    scorer.scores(rows)
    assert columns == {"level": [1, 2]}
    assert rows[0].prompt.turns[0]["content"] == "Why?"


def test_ctrl_c_is_the_users_but_a_keyboard_interrupt_of_its_own_is_not(function, monkeypatch):
    scorer = function("raise KeyboardInterrupt")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            scorer.scores(ROWS)
        signal.signal(signal.SIGINT, lambda *_: None)  # a stage's own
        assert "raised KeyboardInterrupt" in said(lambda: scorer.scores(ROWS))
    finally:
        signal.signal(signal.SIGINT, before)
    stopping = function("from qalign.errors import Stopped; raise Stopped(15)")
    with pytest.raises(Stopped):
        stopping.scores(ROWS)


def test_a_function_that_exits_stops_ppo_with_one_line_and_a_checkpoint(recipe_of, tmp_path, capsys):
    """`sys.exit(0)` in the second iteration: it would end the run with exit code 0 and no adapter."""
    text = "import sys\ncalls = []\ndef f(**row):\n    calls.append(1)\n    " \
           "return sys.exit(0) if len(calls) > 1 else list(range(len(row['completions'])))\n"  # fmt: skip
    (tmp_path / "exits.py").write_text(text)
    path = recipe_of(reward=f"{tmp_path / 'exits.py'}:f", save_every=100, max_steps=2)
    assert leaving(ppo.main, path) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = (line for line in said if line.startswith("ppo.reward: "))
    assert "raised SystemExit on an answer to " in line
    assert (Path(path).parent / "ppo" / "checkpoints" / "checkpoint-1").is_dir()


def test_a_reward_that_never_varies_is_said_and_one_that_turns_gradients_off_trains(recipe_of, tmp_path, capsys):
    body = "torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64); return [1.0] * len(completions)"
    (tmp_path / "odd.py").write_text(f"import torch\ndef f(completions):\n    {body}\n")
    run = run_stage(recipe_of(reward=f"{tmp_path / 'odd.py'}:f", max_steps=2))
    out = capsys.readouterr().out
    line = "ppo.reward: f gave every answer the same score, 1: it tells no answers apart"
    assert f"warning: iteration 1: {line}" in out
    assert out.count(line) == 2, "at the first iteration, and in the report"
    (warning,) = summary(run)["warnings"]
    assert warning.startswith(line)


def test_scores_that_never_differ_are_known(function):
    same, other = function("return [2.5] * len(completions)"), None
    for rows in (ROWS, ROWS[:1]):
        combined([same], rows)
    assert (same.lowest, same.highest) == (2.5, 2.5)
    other = function("return [len(text) for text in completions]")
    combined([other], ROWS)
    assert (other.lowest, other.highest) == (0, 9)
    with pytest.raises(RewardFailed):
        combined([function("return [1e39] * len(completions)")], ROWS)  # beyond float32
