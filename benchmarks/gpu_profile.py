"""Where the time of a training step goes, by kind of kernel, from PyTorch's profiler."""

import re
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PRODUCTS, UNPACKED = "products of 16 bits", "4-bit weights unpacked or multiplied"
GAPS = "nothing runs (launch gaps)"
# By the kernel's name, or on a CPU the operation's: the first pattern that fits counts.
KINDS = {
    "attention": r"flex_attention|flash|fmha|attention|BlockAttention",
    PRODUCTS: r"gemm(?!_4bit)|nvjet|cutlass|splitK|xmma|aten::(addmm|mm|bmm|baddbmm|linear)",
    UNPACKED: r"[Dd]equantize|gemm_4bit|bitsandbytes",
    "optimiser": r"[Oo]ptimizer|[Aa]dam|multi_tensor",
    "fused norms, rotary, MLPs": r"_rms_norm|_swiglu|_geglu|_triton_rope",
    "copies and casts": r"[Mm]emcpy|[Mm]emset|copy|aten::(_to_copy|clone|fill_|zero_)",
    "elementwise": r"elementwise|aten::(mul|add|silu|sub|div|exp|pow|neg|cat|rsqrt|mean|sum)|CatArray|index",
}
REST = "the rest"


def kind_of(name: str) -> str:
    """The kind of work that a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def profiled(step) -> dict:
    """Seconds by kind of one call of `step`, those of the longest kernels, and of the whole. One call is timed without
    the profiler, which slows down launches, and another is profiled."""
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    wall = time.perf_counter() - began
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        step()
        wait()
    seconds = dict[str, tuple[float, int]]()
    for row in found.key_averages():
        if cuda and (row.device_type != DeviceType.CUDA or row.is_user_annotation):
            continue  # an operation's time is that of its kernels, which have rows of their own
        took = (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6
        seconds[row.key] = took, row.count
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for name, (took, _) in seconds.items():
        kinds[kind_of(name)] += took
    kinds[GAPS] = max(0.0, wall - sum(kinds.values()))
    longest = sorted(seconds.items(), key=lambda item: -item[1][0])[:15]
    launched = sum(count for _, count in seconds.values())
    return {"seconds": wall, "kinds": kinds, "kernels": launched, "longest": [[n[:100], *each] for n, each in longest]}


def table(found: dict) -> list[str]:
    """Markdown of what `profiled` returns."""
    lines = [
        f"\n{found['seconds'] * 1e3:,.1f} ms a step, {found['kernels']:,} kernels\n",
        "| kind | ms | share |",
        "|---|---|---|",
    ]
    whole = sum(found["kinds"].values())
    lines += [f"| {kind} | {took * 1e3:,.1f} | {took / whole:.1%} |" for kind, took in found["kinds"].items()]
    lines += ["\n| kernel | ms | calls |", "|---|---|---|"]
    return lines + [f"| `{name}` | {took * 1e3:,.1f} | {count:,} |" for name, took, count in found["longest"]]
