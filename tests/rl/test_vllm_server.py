"""Sampling on a vLLM server: the same curve as with the base in memory, its mismatch is corrected, and what goes wrong
there is one line that loses nothing."""

import re
from pathlib import Path

import pytest
import torch

from qalign.config.recipe import Lora
from qalign.config.stages import GRPO, PPO
from qalign.errors import UserError
from qalign.model.base import Role
from qalign.model.decoding import vllm_server
from qalign.model.decoding.vllm_server import EngineFailed, VllmServer
from qalign.model.generation import Sampling, uniform_draws
from qalign.rl import ppo_loop
from tests.reward_runs import run_stage
from tests.rl.conftest import assert_alike, logged
from tests.rl.vllm_stand_in import serving


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSES", (0.0, 0.0))


@pytest.fixture
def server(tiny_folder):
    with serving(tiny_folder) as found:
        yield found


def engine_of(trainer, server, folder) -> VllmServer:
    return VllmServer(trainer.base, "ppo.engine", server.url, folder)


def same_draws(monkeypatch, server) -> None:
    """Gives the server's answers the random numbers that the base in memory would have had."""
    original = VllmServer.generate_scored

    def spied(self, base, role, prompts, sampling, *, num_samples, seed):
        draws = uniform_draws(seed, len(prompts) * num_samples, sampling.max_new_tokens)
        seeds = torch.randint(2**62, (len(draws),), generator=torch.Generator().manual_seed(seed)).tolist()
        server.draws |= {each: draws[number : number + 1] for number, each in enumerate(seeds)}
        return original(self, base, role, prompts, sampling, num_samples=num_samples, seed=seed)

    monkeypatch.setattr(VllmServer, "generate_scored", spied)


def test_a_server_of_the_same_model_gives_the_curve_of_the_base_in_memory(trainer_of, server, tmp_path, monkeypatch):
    alone, asking = trainer_of(), trainer_of()
    same_draws(monkeypatch, server)
    asking.setup.engine = engine_of(asking, server, tmp_path / "served")
    for _ in range(3):
        expected, found = alone.iterate()[1], asking.iterate()[1]
        sampling = {name: found.pop(name) for name in [*found] if name.startswith("sampling/")}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert sampling["sampling/kl"] < 1e-9
        assert sampling["sampling/sampling_logp_difference/max"] < 1e-5
        assert sampling["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    names = [body["lora_name"] for body in server.asked("/v1/load_lora_adapter")]
    assert len({*names}) == 3, "each state of the adapter has a name of its own"
    assert [body["lora_name"] for body in server.asked("/v1/unload_lora_adapter")] == names[:2]
    assert [folder.name for folder in (tmp_path / "served").iterdir()] == names[2:]

    asking.setup.engine._withdraw()

    assert not server.paths, "nothing of ours stays on the server"
    assert not (tmp_path / "served").exists()


def test_the_mismatch_is_told_in_nats_and_weights_the_policy_up_to_the_cap(trainer_of, server, tmp_path):
    """A server that says e^-0.4 and e^-3 times the probabilities: the weights are e^0.4 and the cap."""
    gradients = {}
    for shift in (0.0, -0.4, -3.0):
        server.shift, trainer = shift, trainer_of(kl="none", advantage="rloo", value="none", reward_scaling="none")
        trainer.setup.engine = engine_of(trainer, server, tmp_path / "served")
        rollout = trainer.collect(trainer._next_prompts(), 2, 1)
        figures = rollout.correct(trainer.settings.importance_cap)
        trainer.score(rollout)
        trainer.advantages(rollout)
        trainer._gradients(rollout, [[*range(len(rollout.rows))]])
        gradients[shift] = torch.cat([weight.grad.flatten() for weight in trainer.weights.values()])
        assert figures["sampling/sampling_logp_difference/mean"] == pytest.approx(-shift, abs=1e-5)
        k3 = torch.tensor(-shift).expm1().item() + shift  # r - 1 - log r with r = e^-shift
        assert figures["sampling/kl"] == pytest.approx(k3, rel=1e-4, abs=1e-6)
        trainer.setup.engine._withdraw()
    assert gradients[0.0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[-0.4], gradients[0.0] * 1.4918247, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradients[-3.0], gradients[0.0] * 2.0, rtol=1e-3, atol=1e-6)


def test_without_a_cap_nothing_is_weighted_but_the_mismatch_is_told(trainer_of, server, tmp_path):
    server.shift, trainer = -0.4, trainer_of()
    trainer.setup.engine = engine_of(trainer, server, tmp_path / "served")
    rollout = trainer.collect(trainer._next_prompts(), 2, 1)
    assert rollout.correct(None)["sampling/sampling_logp_difference/mean"] == pytest.approx(0.4, abs=1e-5)
    assert torch.equal(rollout.correction, rollout.mask.float())


def test_what_a_request_leaves_to_no_default_of_the_server(trainer_of, server, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    trainer = trainer_of()
    trainer.setup.engine = engine_of(trainer, server, tmp_path / "served")
    trainer.collect(trainer._next_prompts(), 2, 1)
    asked = server.asked("/v1/completions")
    fixed = {
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "temperature": 1.0, "max_tokens": 8, "logprobs": 0,
        "return_tokens_as_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    assert all(body.items() >= fixed.items() for body in asked)
    assert all(body["stop_token_ids"] == list(trainer.setup.sampling.stop_ids) for body in asked)
    assert len({body["seed"] for body in asked}) == len(asked) == 8
    assert all(sent["Authorization"] == "Bearer a-secret" for sent in server.sent_headers)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def sampled(engine: VllmServer, base, **keys):
    sampling = Sampling(**{"max_new_tokens": 8, "temperature": 1.0, "stop_ids": tuple(range(200))} | keys)
    return engine.generate_scored(base, Role.POLICY, [[5, 6, 7]], sampling, num_samples=2, seed=1)


@pytest.fixture
def base(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    return tiny_base


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"runtime_lora": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
        ({"max_rank": 1}, "rank 4 is greater than max_lora_rank 1.*; start it with --enable-lora"),
        ({"failures": dict.fromkeys(range(1, 99), 503)}, "answers 503 .* after 3 tries"),
        ({"failures": {1: 500}}, "answers 500 told to fail"),
        ({"cut": 3}, "cut an answer after 3 tokens"),
        ({"foreign": 999_999}, "token 999999, of which model.base has none"),
        ({"nameless": True}, "no token ids with log-probs"),
    ],
)
def test_a_server_that_fails_is_one_line_with_the_fix(change, problem, base, server, tmp_path):
    vars(server).update(change)
    with pytest.raises(EngineFailed, match=problem) as failed:
        sampled(VllmServer(base, "ppo.engine", server.url, tmp_path / "served"), base, stop_ids=(0,))
    (line,) = failed.value.lines
    assert line.startswith(f"ppo.engine: {server.url} ")


def test_a_busy_server_is_asked_again_and_one_that_was_started_again_is_given_the_adapter(base, server, tmp_path):
    engine = VllmServer(base, "ppo.engine", server.url, tmp_path / "served")
    first = sampled(engine, base)
    server.paths.clear()
    server.failures = {len(server.asked("/v1/completions")) + 1: 503}
    assert sampled(engine, base) == first
    assert len(server.asked("/v1/load_lora_adapter")) == 2


def test_log_probs_without_the_temperature_are_refused(base, server, tmp_path):
    assert sampled(VllmServer(base, "ppo.engine", server.url, tmp_path / "served"), base, temperature=0.7)
    server.processed = False
    engine = VllmServer(base, "ppo.engine", server.url, tmp_path / "served")
    with pytest.raises(EngineFailed, match="--logprobs-mode processed_logprobs"):
        sampled(engine, base, temperature=0.7)


def test_a_server_that_gives_no_most_likely_tokens_is_one_line(base, server, tmp_path, monkeypatch):
    whole = server.completion

    def without(body):
        status, said = whole(body)
        said["choices"][0]["logprobs"]["top_logprobs"] = None
        return status, said

    monkeypatch.setattr(server, "completion", without)
    with pytest.raises(EngineFailed, match="no token ids with log-probs"):
        sampled(VllmServer(base, "ppo.engine", server.url, tmp_path / "served"), base, temperature=0.7)


def test_what_can_be_known_before_training_is(base, server, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 doesn't answer .*; start it with `vllm serve`"):
        VllmServer(base, "ppo.engine", "http://127.0.0.1:9", tmp_path)
    server.max_model_len = 100
    with pytest.raises(UserError, match=r"takes 100 tokens, model\.max_length is 256; .*--max-model-len 256"):
        VllmServer(base, "ppo.engine", f"{server.url}/v1/", tmp_path)
    server.listed = {"object": "list", "data": []}
    with pytest.raises(UserError, match="is no vLLM server"):
        VllmServer(base, "ppo.engine", server.url, tmp_path)


@pytest.mark.slow
def test_a_run_whose_server_goes_away_keeps_what_it_learned_and_goes_on_elsewhere(
    recipe_of, tiny_folder, held_out, capsys
):
    keys = {"eval_data": held_out, "max_steps": 3, "save_every": 3, "value": "trunk"}
    with serving(tiny_folder) as server:
        whole = run_stage(recipe_of("whole", engine=server.url, **keys))
        assert f"sampling       by {server.url}" in capsys.readouterr().out
        assert not (whole.path / "served").exists()
        before = len(server.asked("/v1/completions"))
        path = recipe_of("cut", engine=server.url, **keys)
        server.failures = dict.fromkeys(range(before + before // 2, 9999), 500)
        with pytest.raises(UserError, match=r"ppo\.engine: .* answers 500"):
            run_stage(path)
    with serving(tiny_folder) as server:
        Path(path).write_text(re.sub(r"http://\S+:\d+", server.url, Path(path).read_text()))
        resumed = run_stage(path, resume=True)
    ours, theirs = ([line for line in logged(run) if "loss" in line] for run in (whole, resumed))
    assert [line["step"] for line in theirs] == [1, 2, 3]
    assert_alike(ours, theirs, tolerance=1e-4)


def test_a_mismatch_is_told_by_the_section_of_the_run():
    reward = [{"source": "json:loads"}]
    for stage, section in (("ppo", PPO), ("grpo", GRPO)):
        settings = section.model_validate({"data": "x.jsonl", "reward": reward, "engine": "vllm"})
        (line,) = ppo_loop._mismatch({"sampling/kl": 1.0}, settings)
        assert line.startswith(f"{stage}.engine: vllm samples 1 nats a token")
