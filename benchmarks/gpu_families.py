"""Hybrids and mixtures of experts on a GPU: packed against padded pairs, side by side, and what is held in 4 bits.

    python benchmarks/gpu_families.py [--shapes Qwen3.5-4B gpt-oss-20b] [--layers 8] [--steps 4] [--tiny]

A model of the shape with random weights and fewer layers is saved and loaded by qalign's own loader. A step is a
forward of the reference, and forward and backward of the policy, on 8 pairs, with no layer checkpointed.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_sides import pairs_like
from benchmarks.random_models import FIXTURES, fixture_tokenizer
from qalign.config.recipe import Lora, Model
from qalign.model.base import Base, Role, load
from qalign.model.generation import Sampling, TransformersEngine
from qalign.model.loading import device
from qalign.model.logps import pair_logps
from qalign.model.packing.packing import Packing

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "vocab_size": 2048}  # fmt: skip


def saved(shape: str, layers: int, *, tiny: bool) -> str:
    """A folder with a random model of a published shape and this many of its layers."""
    config = AutoConfig.from_pretrained(FIXTURES / "configs" / shape, trust_remote_code=False).get_text_config()
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    for key, value in (SMALL if tiny else {}).items():
        if hasattr(config, key):
            setattr(config, key, value)
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    torch.manual_seed(0)
    with device():
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    lm.save_pretrained(folder)
    fixture_tokenizer().save_pretrained(folder)
    return folder


def step(base: Base, pairs: list) -> None:
    """Reference, policy and backward of one micro-batch."""
    batch = base.batch(pairs)
    with base.packed_attention():
        with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
            reference = pair_logps(lm, batch)
        with base.acting_as(Role.POLICY) as lm:
            (pair_logps(lm, batch) - reference).mul(0.1).sigmoid().sum().backward()


def timed(work) -> tuple[float, float]:
    """(seconds, peak GiB) of some work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    peak = 0.0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    return time.perf_counter() - start, peak


def measure(shape: str, args: argparse.Namespace) -> None:
    folder = saved(shape, args.layers, tiny=args.tiny)
    spec = Model(base=folder, compute_dtype="bfloat16" if torch.cuda.is_available() else "float32", max_length=2048)
    seconds, peak = timed(lambda: load(spec))
    base, at_load = load(spec), (seconds, peak)
    print(
        f"{shape}, {args.layers} layers: held {base.held_bytes / 2**30:.2f} GiB ({base.precision}); quantised and "
        f"loaded in {at_load[0]:.0f} s, peak {at_load[1]:.1f} GiB; {base.layout_in_words}",
        flush=True,
    )
    base.add_adapter(Role.POLICY, Lora())
    pairs = pairs_like("ultrafeedback", 8, 2000, args)
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    ways = {"packed": base.packing, "padded": Packing(reason="for comparison")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(args.steps + 1):
        for name, packing in ways.items():
            base.__dict__["packing"] = packing
            result = timed(lambda: step(base, pairs))
            if number:  # the first one compiles
                found[name].append(result)
    for name, results in found.items():
        each = median(seconds for seconds, _ in results)
        print(
            f"  {name}: {each:.3f} s a step, {tokens / each:,.0f} tokens/s, peak {max(p for _, p in results):.1f} GiB"
        )
    with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
        values = {}
        for name, packing in ways.items():
            base.__dict__["packing"] = packing
            with base.packed_attention():
                values[name] = pair_logps(lm, base.batch(pairs))
    apart = (values["packed"] - values["padded"]).abs().max().item() / tokens * len(pairs) * 2
    print(f"  packed and padded differ by {apart:.4f} nats a token at most", flush=True)
    how = Sampling(args.sampled, 1.0, ())
    prompts = [pair.prompt_ids[:100] for pair in pairs] * 2
    for role in (Role.POLICY, Role.BASE):
        work = lambda role=role: TransformersEngine().generate(base, role, prompts, how, num_samples=1, seed=0)  # noqa: E731
        timed(work)
        seconds, _ = timed(work)
        each = seconds / args.sampled * 1000
        print(f"  {role} samples {len(prompts)} answers of {args.sampled} tokens: {each:.0f} ms a step", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["Qwen3.5-4B", "gpt-oss-20b"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each way, in turn")
    parser.add_argument("--sampled", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="small layers, to try it out on a CPU")
    args = parser.parse_args()
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "· torch", torch.__version__)
    for shape in args.shapes:
        measure(shape, args)


if __name__ == "__main__":
    main()
