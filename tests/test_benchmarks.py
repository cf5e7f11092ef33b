"""The benchmarks at a tiny shape on the CPU: the code that a GPU will run, and how `gpu.py` takes a lack of memory."""

import json
import math
import os
import shlex
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import all_on_gpu, gpu, gpu_profile, scaling
from qalign.data.store.sequences import TokenPair
from tests.conftest import ROOT


def run(*options) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def tiny(folder, *sides, more=()) -> list[dict]:
    """What a process of each side found, over one timed step of two pairs."""
    done = run("--shape", "tiny", "--steps", 1, "--batch", 2, "--rounds", 1, "--data", "hh", "--longest-pair", 256,
               "--sides", *sides, "--out", folder, *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads((folder / "gpu_tiny.json").read_text())["runs"]
    assert [found["side"] for found in runs] == list(sides)
    for found in runs:
        assert found["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert found["longest"] == 256
        assert found["data"]["hh"]["steps"] == 1
    return runs


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path):
    all_layers, planned = tiny(tmp_path, "qalign-cached", "qalign-auto", more=["--profile"])
    assert all_layers["data"]["hh"]["at_once"] == "up to 4,096 tokens at a time, 2 layers checkpointed"
    assert planned["data"]["hh"]["at_once"] == "up to 4,096 tokens at a time", "memory is no matter there"
    text = (tmp_path / "gpu_tiny.md").read_text()
    assert "| qalign-cached | " in text
    for found in (all_layers, planned):
        profile = found["profiles"]["hh"]
        assert f"a step of {found['side']}, hh, CPU" in text
        assert min(profile["kinds"][kind] for kind in (gpu_profile.PRODUCTS, gpu_profile.UNPACKED)) > 0
        assert sum(profile["kinds"].values()) >= profile["seconds"] * 0.99


def test_kernels_of_each_kind_are_told_apart():
    kinds = {  # as they were called on an H200
        "nvjet_sm90_tst_128x16_64x11_2x1_v_bz_splitK_TNT": gpu_profile.PRODUCTS,
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*": gpu_profile.UNPACKED,
        "void gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 32, 64, 128>": gpu_profile.UNPACKED,
        "triton_tem_fused__flex_attention_backward_0": "attention",
        "_rms_norm_forward_kernel": "fused norms, rotary, MLPs",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "void kOptimizerStatic8bit2StateBlockwise<float, 2>": "optimiser",
        "something else": gpu_profile.REST,
    }
    assert {name: gpu_profile.kind_of(name) for name in kinds} == kinds


@pytest.mark.slow
def test_decoding_is_timed_on_a_cpu():
    words = "--shape tiny --answers 3 --prompt 9 --tokens 10 --families llama lfm2"
    command = [sys.executable, "benchmarks/decode.py", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout
    for name in ("llama", "lfm2"):
        assert f"{name}: of 5 answers 5 sampled and 5 greedy ones are the same" in done.stdout
    assert done.stdout.count("ms a step") == 4


@pytest.mark.slow
def test_the_start_of_a_stage_is_timed(tiny_folder, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{base: {tiny_folder}}}\noutput: runs\ndpo: {{data: pairs.jsonl, batch_size: 2}}\n")
    command = [sys.executable, "benchmarks/start.py", "dpo", str(recipe), f"output={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    parts = [line.split("|")[1].strip() for line in done.stdout.partition("| seconds |")[2].splitlines()[2:]]
    assert {"imports", "base loaded", "rows tokenised", "memory planned", "step 1", "step 2", "in all"} <= {*parts}


@pytest.mark.slow
def test_all_of_it_is_one_command_that_says_what_it_runs(tmp_path):
    command = [sys.executable, "benchmarks/all_on_gpu.py", "--shape", "tiny", "--out", str(tmp_path), "--only", "start"]
    dry = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert dry.stdout.count("benchmarks/start.py dpo ") == 2
    assert not list(tmp_path.iterdir())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "all_on_gpu.md").read_text()
    assert text.count("\ndone, ") == 3
    assert text.count("| step 2 |") == 2


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(5); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    ended, said = all_on_gpu.run(f"-c {shlex.quote(code)}", 3, dict(os.environ))
    assert (ended, said) == ("stopped after 3 s", "begun")
    time.sleep(3)
    assert not mark.exists()


@pytest.mark.true_model  # not SmolLM2, but as slow
def test_all_sides_run_the_same_pairs(tmp_path):
    runs = tiny(tmp_path, "qalign-in_step", "trl-defaults", "trl-best")
    assert len({found["data"]["hh"]["tokens"] for found in runs}) == 1


@pytest.mark.slow
def test_plans_are_measured_at_each_stage():
    """At a tiny shape; on a CPU its figures say nothing."""
    command = ["--cuda", "--shape", "tiny", "--cards", "0.02", "--max-length", "240", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["| sft", "| reward", "| dpo", "| kto", "| ppo"]
    for line in lines:
        assert " tokens, 2 layers checkpointed" in line[3]
        assert float(line[5]) > 0


@pytest.mark.slow
def test_the_longest_row_and_pair_are_run_offloaded():
    done = run("--longest", "--shape", "tiny")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == 2 * ["| SFT row"] + 2 * ["| pair"]
    tokens = [int(line[2]) for line in lines]
    assert 64 < tokens[0] < tokens[1]
    assert 64 < tokens[2] < tokens[3]


def test_a_real_shape_without_cuda_is_one_line():
    done = run("--shape", "mistral7b")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("no CUDA device: mistral7b needs one")
    assert "\n" not in done.stderr.strip()


class SmallCard:
    """A side that runs out of memory over so many tokens at once."""

    batch, longest = 8, 0

    def __init__(self, tokens: int):
        self.tokens = tokens

    def begin(self, micro, steps):
        self.micro = micro

    def arranged(self, steps):
        return steps

    def precompute(self, pairs):
        pass

    def step(self, pairs):
        if self.micro * sum(map(len, pairs)) > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return 0.5

    @property
    def at_once(self):
        return self.micro


def test_the_micro_batch_is_halved_until_it_fits():
    pairs = [TokenPair([1] * 60, [2] * 40, [3] * 40, "")] * 8
    steps, soon = [pairs] * (gpu.WARM_UP + 2), time.monotonic() + 60
    found = {}
    figures = gpu.measure(SmallCard(250), steps, soon, found)
    assert figures["at_once"] == 0.25
    assert (figures["steps"], figures["tokens"], found["first_loss"]) == (2, 2 * 8 * 200, 0.5)
    assert gpu.measure(SmallCard(99), steps, soon, {}) == {"out_of_memory": True}


@pytest.mark.parametrize(("tokens", "longest"), [(5000, 4992), (64, 0), (10**6, 8192)])
def test_the_longest_pair_is_found(tokens, longest):
    card = SmallCard(tokens / 8)  # `longest_pair` runs one pair of a batch of eight
    assert gpu.longest_pair(card, 8192, 2000, time.monotonic() + 60) == longest


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def work():
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes"):
        gpu.fitting(work)


def test_ratios_are_medians_over_the_rounds():
    def figures(round_, side, seconds):
        data = {"hh": {"steps": 2, "tokens": 1000, "seconds": seconds, "peak_bytes": 2**30, "at_once": "2 pairs"}}
        return {"round": round_, "memory": 8, "side": side, "data": data}

    runs = [figures(n, "trl-defaults", slow) for n, slow in enumerate((10, 20, 40))]
    runs += [figures(n, "qalign-cached", fast) for n, fast in enumerate((5, 4, 10))]
    runs.append({"round": 0, "memory": 8, "side": "trl-best", "data": {"hh": {"out_of_memory": True}}})
    lines = gpu.table(runs, 8, "hh")
    assert "| qalign-cached | 200 | 2.50 | 2 pairs | 1.00 | 4.00 (2.00 to 5.00) |  |" in lines
    assert "| trl-best | out of memory | | | | | |" in lines


def test_the_model_of_a_step_in_several_processes():
    """By hand: 600 tokens of 10 FLOP at 1,000 FLOP/s, 2 × 2/3 of 300 bytes at 100 bytes/s, a second alone."""
    cards = scaling.Cards("", 1000.0, 100.0, launch_seconds=2.0)
    assert scaling.step_seconds([400, 600, 500], 10.0, 300.0, cards, 1.0) == pytest.approx(6 + 4 + 1)
    assert scaling.step_seconds([1500], 10.0, 300.0, cards, 1.0) == pytest.approx(15 + 1), "one process sums nothing"
    assert scaling.step_seconds([100], 10.0, 300.0, cards, 0.0) == pytest.approx(2), "kernels must be launched"


@pytest.mark.slow
def test_sharding_is_measured_on_a_cpu_and_needs_cards_otherwise():
    command = [sys.executable, "benchmarks/shard.py"]
    done = subprocess.run([*command, "--shape", "tiny", "--tokens", "60"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| whole |") == done.stdout.count("| dealt |") == 2
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.startswith("this needs 2 GPUs, and there are 0")) == (2, True)
