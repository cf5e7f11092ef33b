"""`gpu.py --check`: what only CUDA runs, against plain ways of computing the same, at small scale; a table of figures.

On a CPU the same checks run as far as they can; the rest says `needs CUDA`.
"""

import contextlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import yaml
from torch.nn.attention.flex_attention import flex_attention
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.random_models import TINY, as_base, fixture_tokenizer, random_lm, random_pair
from qalign import dpo
from qalign.config.load import load
from qalign.config.recipe import Lora
from qalign.data.collate import Layout, pack, pad
from qalign.model.base import Role
from qalign.model.experts import weights
from qalign.model.loading import device
from qalign.model.logps import pair_logps
from qalign.model.memory.stream import LayerStream
from qalign.model.packing import attention
from qalign.model.reference import ReferenceLogps
from qalign.train.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
LN2 = 0.6931472
# The largest error, over the largest value: rounding alone.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# (query heads per key head, sliding window, softcap, sinks)
ATTENTIONS = {
    "4 heads a key": (4, None, None, False),
    "7 heads a key": (7, None, None, False),
    "window": (2, 40, None, False),
    "softcap": (2, None, 3.0, False),
    "window, softcap, sinks": (2, 40, 3.0, True),
}
RESULTS: list[tuple[str, bool | None, str]] = []


def note(name: str, passed: bool | None, figures: str) -> None:
    RESULTS.append((name, passed, figures))
    print(f"{ {True: 'pass', False: 'FAIL', None: '-'}[passed]:<5}{name}: {figures}", flush=True)


def attempt(name: str, work, *args, needs_cuda: bool = False) -> None:
    """Notes `(passed, figures)`; a crash is a failed check, not the end of the table."""
    if needs_cuda and not CUDA:
        return note(name, None, "needs CUDA")
    torch.compiler.reset()  # each check with a compiler of its own: recompilations are counted
    try:
        note(name, *work(*args))
    except Exception as error:
        note(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def attend(case: tuple, tensors: list, layout: Layout, upstream: torch.Tensor | None, run) -> list[torch.Tensor]:
    """Output and gradients of one way of computing attention."""
    _, window, softcap, sinks = case
    leaves = [tensor.detach().requires_grad_(upstream is not None) for tensor in tensors]
    query, key, value, each_head = leaves
    output = run(query, key, value, each_head if sinks else None, layout, query.shape[-1] ** -0.5, window, softcap)
    if upstream is None:
        return [output]
    return [output, *torch.autograd.grad(output, leaves if sinks else leaves[:3], upstream)]


def flex(case: tuple, dtype: torch.dtype):
    """FlexAttention as qalign calls it, against the block attention in float32 on the CPU."""
    groups, *_ = case
    layout = Layout(((70, (1, 33)), (0, (5, 129)), (200, (150, 64))))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * groups, layout.tokens, 64), (2, layout.tokens, 64), (2, layout.tokens, 64), (2 * groups,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype).float()
    there = [tensor.to(device(), dtype) for tensor in tensors]
    if CUDA:
        assert attention._flex_runs_on(there[0]), "this card is too old: the block attention runs instead"
        found = attend(case, there, layout, upstream.to(device(), dtype), attention._flex)
        layout = Layout(layout.groups)  # its masks are on the GPU
        expected = attend(case, tensors, layout, upstream, attention._BlockAttention.apply)
    else:
        eager = lambda *args: attention._flex(*args, run=flex_attention)  # noqa: E731
        with torch.no_grad():
            found = attend(case, there, layout, None, eager)
            expected = attend(case, tensors, layout, None, attention._BlockAttention.apply)
    errors = [off(*both) for both in zip(found, expected, strict=True)]
    figures = ", ".join(f"{n} {e:.1e}" for n, e in zip(("output", "dq", "dk", "dv", "ds"), errors, strict=False))
    return max(errors) <= TOLERANCES[dtype], figures + ("" if CUDA else " (backward needs CUDA)")


def recompilations(windows: tuple, softcap: float | None):
    """Rows are never of one length: the kernel must be compiled for any length, not for each. Beyond a limit PyTorch
    would take a path that holds all scores, in silence; here it is an error."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for number in range(24):
        layout = Layout(((40 + 97 * number, (1 + 13 * number, 60 + 31 * number)), (30, (7 * number, 12))))
        wants_grad = number % 3 > 0  # as the reference and the policy take turns
        with torch.set_grad_enabled(wants_grad):
            for window in windows:
                query = torch.randn(
                    4, layout.tokens, 64, device=device(), dtype=torch.bfloat16, requires_grad=wants_grad
                )
                output = attention._flex(query, query[:2], query[:2], None, layout, 0.125, window, softcap)
                if wants_grad:
                    output.sum().backward()
    return True, f"{counters['stats']['unique_graphs']} compilations for 24 lengths, with and without gradients"


def nf4(dtype: torch.dtype):
    """Packed pairs on an NF4 base under autocast, against padded ones on its dequantised copy in float32 without."""
    lengths = [(60, 33, 8), (200, 1, 90), (9, 140, 70), (130, 64, 64)]
    pairs = [random_pair(each, TINY.vocab_size, str(each)) for each in lengths]
    results = []
    for plain in (False, True):
        lm = random_lm(TINY, dtype, std=0.2)  # large enough that who sees whom shows
        base = as_base(lm.dequantize(dtype=torch.float32).float() if plain else lm, fixture_tokenizer())
        torch.manual_seed(1)
        base.add_adapter(Role.POLICY, Lora(r=4, alpha=64))
        batch = pad(pairs, 0).to(device()) if plain else pack(pairs).to(device())
        with contextlib.nullcontext() if plain else base.packed_attention(), base.acting_as(Role.POLICY) as policy:
            logps = pair_logps(policy, batch)
            ups = [p for n, p in base.model.named_parameters() if ".lora_B.policy." in n]
            grads = torch.autograd.grad(logps[:, 0].sum() - logps[:, 1].sum(), ups)
        results.append((logps, torch.cat([grad.flatten() for grad in grads])))
    (logps, grad), (plain_logps, plain_grad) = results
    errors = off(logps, plain_logps), float((grad - plain_grad).norm() / plain_grad.norm())
    good = errors[0] <= TOLERANCES[dtype] and errors[1] <= 2 * TOLERANCES[dtype]  # a wrong mask gives 0.5 and more
    return good, f"log-probs {errors[0]:.1e}, adapter's gradient {errors[1]:.1e}"


def packings(dtype: torch.dtype):
    """Policy = reference: to the bit where both are packed alike, as in a first epoch; in other packings, as cached
    log-probs may be in later ones, to rounding."""
    lengths = [(60, 33, 8), (200, 1, 90), (9, 140, 70), (130, 64, 64), (30, 20, 300), (77, 5, 50)]
    pairs = [random_pair(each, TINY.vocab_size, str(each)) for each in lengths]
    base = as_base(random_lm(TINY, dtype, std=0.2), fixture_tokenizer())
    base.add_adapter(Role.POLICY, Lora(r=4))

    def logps(role: Role, *groups: tuple[int, ...]) -> torch.Tensor:
        with base.packed_attention(), base.acting_as(role) as lm:
            some = [pair_logps(lm, base.batch([pairs[number] for number in group])) for group in groups]
        return torch.cat(some).detach()

    numbers = tuple(range(len(pairs)))
    with torch.no_grad():
        reference = logps(Role.REFERENCE, numbers)
        apart = max(off(logps(Role.REFERENCE, *g), reference) for g in (((0, 1), (2, 3, 4, 5)), tuple(zip(numbers))))
    same = bool((logps(Role.POLICY, numbers) == reference).all())
    return same and apart <= TOLERANCES[dtype], f"{'' if same else 'not '}equal; in other packings {apart:.1e} apart"


def streamed(dtype: torch.dtype):
    """A step whose layers are streamed, policy and reference together, against one with all layers in memory."""
    pairs = [random_pair(each, TINY.vocab_size, str(each)) for each in [(60, 33, 8), (200, 1, 90), (9, 140, 70)]]
    results, copies = [], 0
    for where in (device(), torch.device("cpu")):
        lm = random_lm(LlamaConfig.from_dict(TINY.to_dict() | {"num_hidden_layers": 6}), dtype, std=0.2, where=where)
        stream = LayerStream(lm, device()) if results else None
        base = as_base(lm, fixture_tokenizer())
        torch.manual_seed(1)
        base.add_adapter(Role.POLICY, Lora(r=4, alpha=64))
        base.lm.activation_checkpointing_enable({"use_reentrant": False})
        base.train()
        for _ in range(3):
            before, weights = stream.copies if stream else 0, list(base.trained_weights(Role.POLICY).values())
            with base.packed_attention():
                policy, reference = ReferenceLogps().beside_policy(base, pairs, base.batch(pairs))
                grads = torch.autograd.grad(policy[:, 0].sum(), weights)
        copies = stream.copies - before if stream else 0
        results.append((policy, reference, torch.cat([grad.flatten() for grad in grads])))
    same = all(map(torch.equal, *results))
    error = max(off(*both) for both in zip(*results, strict=True))
    figures = f"{'' if same else 'not '}equal to the bit, {error:.1e} apart; {copies} layers copied a step"
    return error <= TOLERANCES[dtype] and copies == 8, figures


def experts(family: str, kind: str, dtype: torch.dtype):
    """Experts in 4 bits against transformers' own loop over the same weights, dequantised: output, gradient, bits."""
    made = {"qwen3_moe": (Qwen3MoeConfig, Qwen3MoeExperts), "gpt_oss": (GptOssConfig, GptOssExperts)}
    config = made[family][0](hidden_size=256, intermediate_size=128, moe_intermediate_size=128, num_local_experts=16)
    generator = torch.Generator(device()).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device()).to(dtype)

    module = made[family][1](config).to(device(), dtype).requires_grad_(False)
    config._experts_implementation = weights.NAME
    for name in weights.names_of(module):
        weight = 0.1 * random(*getattr(module, name).shape)
        if kind == "mxfp4":
            weights.make_room(module, name, kind, double_quant=False)
            for part, low, high in (("blocks", 0, 256), ("scales", 120, 126)):
                size = getattr(module, f"{name}_{part}").shape
                found = torch.randint(low, high, size, generator=generator, device=device()).to(torch.uint8)
                setattr(module, f"{name}_{part}", found)
        else:
            weights.hold(module, name, weight, kind, double_quant=True)
        if module.has_bias:
            setattr(module, f"{name}_bias", torch.nn.Parameter(random(*getattr(module, f"{name}_bias").shape), False))
    states, upstream = random(300, 256).requires_grad_(), random(300, 256)
    scores, chosen = random(300, module.num_experts).softmax(-1).topk(4)
    held, count = sum(buffer.nbytes for buffer in module.buffers()), weights.held_parameters(module)
    results = []
    for implementation in (weights.NAME, "eager"):
        config._experts_implementation = implementation
        output = module(states, chosen, scores)
        results.append([output, *torch.autograd.grad(output, states, upstream)])
        weights.release(module, dtype)
    errors = [off(*both) for both in zip(*results, strict=True)]
    figures = f"output {errors[0]:.1e}, gradient {errors[1]:.1e}, {8 * held / count:.2f} bits a weight"
    return max(errors) <= TOLERANCES[dtype] and 8 * held / count < 4.3, figures


class Stage:
    """The DPO command on a tiny model, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        tokenizer = fixture_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig.from_dict(TINY.to_dict() | {"vocab_size": len(tokenizer), "initializer_range": 0.1})
        LlamaForCausalLM(config).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)

    def run(self, name: str, dtype: str, optimiser: str, *, steps: int = 4, resume: bool = False, **model):
        """(its folder, losses of each step, the adapter's weights)."""
        data = str(ROOT / "recipes" / "data" / "house_style_train.jsonl")
        stage = {"data": data, "limit": 24, "batch_size": 4, "learning_rate": 1e-3, "max_steps": steps, "save_every": 2}
        stage["trainer"] = {"optim": optimiser}
        model |= {"base": str(self.model), "compute_dtype": dtype, "max_length": 512}
        file = self.folder / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump({"model": model, "lora": {"r": 4}, "output": str(self.folder / name), "dpo": stage})
        )
        with (self.folder / "log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            run = RunFolder(load(str(file), stage="dpo"), "dpo", str(file))
            run.claim(resume=resume, overwrite=not resume)
            dpo.train(run.recipe, run)
        from safetensors.torch import load_file

        weights = load_file(run.adapter / "adapter_model.safetensors")
        losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
        return run, losses, torch.cat([weights[name].flatten() for name in sorted(weights)])

    def trains(self, dtype: str, optimiser: str):
        """Two epochs. (float16's gradient scaler skips the first steps, until its scale is small enough.)"""
        _, losses, weights = self.run(f"{dtype}-{optimiser}", dtype, optimiser, steps=12)
        last = sum(losses[-3:]) / 3
        good = abs(losses[0] - LN2) < 1e-6 and last < LN2 - 0.1 and bool(weights.isfinite().all())
        return good, f"loss {losses[0]:.7f} (ln 2 is {LN2:.7f}) to {last:.4f}, the mean of the last three steps"

    def resumes(self, optimiser: str):
        """Four steps at once, and the last two of them again from the checkpoint in the middle."""
        run, losses, weights = self.run("resumed", "float32", optimiser)
        run.summary.unlink()
        shutil.rmtree(run.checkpoints / "checkpoint-4")
        run, again, other = self.run("resumed", "float32", optimiser, resume=True)
        assert json.loads(run.summary.read_text())["resumed_from"].endswith("checkpoint-2")
        error = off(other, weights)
        return error < 1e-4 and again[:2] == losses[
            :2
        ], f"adapter {error:.1e} apart, losses {losses[-1]:.6f}, {again[-1]:.6f}"

    def fused(self):
        """Fused kernels against the model's own layers."""
        _, losses, _ = self.run("plain", "auto", "adamw_torch", fused_kernels=False)
        _, others, _ = self.run("fused", "auto", "adamw_torch")
        error = max(abs(a - b) for a, b in zip(losses, others, strict=True))
        return error < 1e-2, f"losses at most {error:.1e} apart over {len(losses)} steps"


def check() -> int:
    """Runs all of it; the exit code says whether anything failed."""
    warnings.filterwarnings("ignore")
    for name, case in ATTENTIONS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            attempt(f"FlexAttention, {name}, {str(dtype).removeprefix('torch.')}", flex, case, dtype)
    many = "FlexAttention, rows of many lengths"
    attempt(many, recompilations, (None,), None, needs_cuda=True)
    attempt(f"{many}, two kinds of layers", recompilations, (None, 40), 3.0, needs_cuda=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attempt(f"NF4 and autocast, {str(dtype).removeprefix('torch.')}", nf4, dtype)
        attempt(f"policy = reference, {str(dtype).removeprefix('torch.')}", packings, dtype)
        attempt(f"layers streamed, {str(dtype).removeprefix('torch.')}", streamed, dtype)
        for family, kind in (("qwen3_moe", "nf4"), ("gpt_oss", "nf4"), ("gpt_oss", "mxfp4")):
            attempt(f"experts, {family} in {kind}, {str(dtype).removeprefix('torch.')}", experts, family, kind, dtype)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        attempt("DPO stage, bfloat16, adamw_torch", stage.trains, "bfloat16", "adamw_torch")
        attempt("DPO stage, resumed, adamw_torch", stage.resumes, "adamw_torch")
        for dtype in ("bfloat16", "float16"):  # float16 brings the gradient scaler along
            name = f"DPO stage, {dtype}, paged_adamw_8bit"
            attempt(name, stage.trains, dtype, "paged_adamw_8bit", needs_cuda=True)
        attempt("DPO stage, resumed, paged_adamw_8bit", stage.resumes, "paged_adamw_8bit", needs_cuda=True)
        attempt("DPO stage, fused kernels and none", stage.fused, needs_cuda=True)
    failed = sum(passed is False for _, passed, _ in RESULTS)
    skipped = sum(passed is None for _, passed, _ in RESULTS)
    print(f"{len(RESULTS) - failed - skipped} passed, {failed} failed, {skipped} not run")
    return 1 if failed else 0
