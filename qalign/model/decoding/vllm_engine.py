"""vLLM as another engine for sampling, on the same GPU."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qalign.model.adapters.serving import MAX_RANKS
from qalign.model.base import Base
from qalign.model.decoding.vllm_server import ScoredAnswers

if TYPE_CHECKING:
    from qalign.model.generation import Sampling

VLLM_SHARE = 0.4  # share of the GPU's memory for vLLM's copy of the base and its KV cache


class VllmEngine:
    """vLLM on the same GPU: faster sampling, but vLLM loads a second copy of the base in 4 bits. Each call saves the
    role's adapter to a temporary folder, from which vLLM loads it.

    Args:
        max_tokens: the most tokens of a prompt and its answer together.
        memory_share: share of the GPU's memory for vLLM's copy and its KV cache.
    """

    def __init__(self, base: Base, max_tokens: int, memory_share: float = VLLM_SHARE):
        import vllm  # pyright: ignore[reportMissingImports]: optional, needs a GPU

        self._calls = 0
        ranks = [config.r for config in getattr(base.model, "peft_config", {}).values()]
        self._llm = vllm.LLM(
            model=base.origin.source,
            revision=base.origin.hub_revision,
            dtype=str(base.dtype).removeprefix("torch."),
            quantization="bitsandbytes",
            enable_lora=True,
            max_lora_rank=next(most for most in MAX_RANKS[1:] if most >= max(ranks, default=1)),
            max_model_len=max_tokens,
            gpu_memory_utilization=memory_share,
            enforce_eager=True,  # CUDA graphs would take memory that the updates need
            logprobs_mode="processed_logprobs",  # those that it samples with, at any temperature
            generation_config="vllm",  # not the model's own, which may end answers at other ids
        )

    def generate_scored(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: "Sampling", *, num_samples: int, seed: int
    ) -> ScoredAnswers:
        """As `TransformersEngine.generate`, with the log-probs of the tokens by vLLM; the tokens differ from its."""
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self._calls += 1
        # Every answer has its own request: vLLM gives the answers of one request consecutive seeds.
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(prompts) * num_samples,), generator=generator).tolist()
        params = [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1,
                stop_token_ids=list(sampling.stop_ids),
                seed=answer_seed,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for answer_seed in seeds
        ]
        with tempfile.TemporaryDirectory() as folder:
            adapter = None
            if role in base.adapters:
                base.save_adapter(role, Path(folder) / role)
                adapter = LoRARequest(f"{role}-{self._calls}", self._calls, str(Path(folder) / role))
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(num_samples)]
            outputs = self._llm.generate(asked, params, lora_request=adapter, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        parts = [found[start : start + num_samples] for start in range(0, len(found), num_samples)]
        logps = [[[at[id].logprob for id, at in zip(a.token_ids, a.logprobs, strict=True)] for a in p] for p in parts]
        return [[list(answer.token_ids) for answer in part] for part in parts], logps
