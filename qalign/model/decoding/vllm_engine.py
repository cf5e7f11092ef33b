"""vLLM as another engine for sampling, on the same GPU."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qalign.model.adapters.serving import MAX_RANKS, highest_rank
from qalign.model.base import Base
from qalign.model.decoding.vllm_server import ScoredAnswers, by_prompt, seeds_of

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
        ranks = [highest_rank(config) for config in getattr(base.model, "peft_config", {}).values()]
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
            logprobs_mode="processed_logprobs",  # after the temperature, as it samples
            generation_config="vllm",  # not the model's own, which may end answers at other ids
        )

    def generate_scored(
        self, base: Base, role: str, prompts: Sequence[list[int]], sampling: "Sampling", *, num_samples: int, seed: int
    ) -> ScoredAnswers:
        """As `TransformersEngine.generate`, with the log-probs of the tokens by vLLM; the tokens differ from its."""
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self._calls += 1
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
            for answer_seed in seeds_of(len(prompts) * num_samples, seed)
        ]
        with tempfile.TemporaryDirectory() as folder:
            adapter = None
            if role in base.adapters:
                base.save_adapter(role, Path(folder) / role)
                adapter = LoRARequest(f"{role}-{self._calls}", self._calls, str(Path(folder) / role))
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(num_samples)]
            outputs = self._llm.generate(asked, params, lora_request=adapter, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        logps = [[at[id].logprob for id, at in zip(a.token_ids, a.logprobs, strict=True)] for a in found]
        return by_prompt([*zip([list(a.token_ids) for a in found], logps, strict=True)], num_samples)
