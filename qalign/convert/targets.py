"""What `qalign.export` writes for each target: into a file or folder aside, which is kept once it has been measured."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalign.convert import adapters, gguf, merging, mlx, ollama
from qalign.convert.fidelity import load_exported, placed
from qalign.model import origin
from qalign.model.adapters.generation_config import trained
from qalign.model.base import Base
from qalign.train.run_folder import RunFolder

Written = tuple[dict[str, str], Callable[[], Any]]  # lines about it, by name; how to load it to be measured


def merged(run: RunFolder, args: argparse.Namespace, aside: Path) -> Written:
    """A folder of transformers."""
    lines = merging.write(run, args.onto, aside)
    return lines, lambda: load_exported(aside, is_reward=run.stage == "reward")


def whole_gguf(run: RunFolder, args: argparse.Namespace, aside: Path) -> Written:
    """One file with everything."""
    lines, load, _ = _whole(run, args, aside)
    return lines | {"chat": "llama-server -m {target} --jinja"}, load


def lora_gguf(run: RunFolder, args: argparse.Namespace, aside: Path) -> Written:
    """The adapter alone, for a base that llama.cpp has."""
    lines, load, _ = _adapter(run, args, aside)
    base = args.base or origin.gguf_file(run.recipe.model) or "BASE.gguf"
    return lines | {"chat": f"llama-server -m {base} --lora {{target}} --jinja"}, load


def for_ollama(run: RunFolder, args: argparse.Namespace, aside: Path) -> Written:
    """A Modelfile, with the model beside it, or with the adapter for a base that Ollama has."""
    file = aside / ("adapter.gguf" if args.base else "model.gguf")
    lines, load, base = (_adapter if args.base else _whole)(run, args, file)
    source = f"./{file.name}"
    if args.base:
        source = str(Path(args.base).resolve()) if Path(args.base).is_file() else args.base
    text = ollama.modelfile(
        base.template, source, f"./{file.name}" if args.base else None, trained(base.lm, base.template)
    )
    (aside / "Modelfile").write_text(text, encoding="utf-8")
    name = run.path.parent.name.lower()
    return lines | {"chat": f"ollama create {name} -f {{target}}/Modelfile && ollama run {name}"}, load


def for_mlx(run: RunFolder, args: argparse.Namespace, aside: Path) -> Written:
    """A merged folder whose settings mlx-lm finds, or the adapter alone as mlx-lm's own training leaves it."""
    if not args.base:
        lines, load = merged(run, args, aside)
        mlx.fit_config(aside)
        return lines | {"load it with": "mlx_lm.chat --model {target}"}, load
    base = _published(run)
    mlx.write_adapter(adapters.updates(run, base), base.lm.config.num_hidden_layers, aside)
    lines = {"load it with": f"mlx_lm.chat --model {args.base} --adapter-path {{target}}", "on": _words(run)}
    return lines, lambda: placed(mlx.with_adapter(_published(run).lm, aside))


WRITERS = {
    "merged": merged,
    "gguf": whole_gguf,
    "gguf-adapter": lora_gguf,
    "ollama": for_ollama,
    "mlx": for_mlx,
}


def _whole(run: RunFolder, args: argparse.Namespace, file: Path) -> tuple[dict[str, str], Callable[[], Any], Base]:
    """Writes base and adapter, or with `--bare` the base alone, as one `.gguf` file."""
    if args.bare:
        base = merging.loaded(run, args.onto)
        lm, lines = base.lm, {"holds": f"the base alone, without the adapter: {merging.WORDS[args.onto]}"}
    else:
        base, lm = merging.merged(run, args.onto, bits=32)
        lines = {"onto": merging.WORDS[args.onto]}
    gguf.write_model(lm, base.template, file, args.quantization, f"{run.path.parent.name} {run.stage}")
    return lines | {"in": args.quantization}, lambda: placed(gguf.model_of(gguf.read_tensors(file), lm)), base


def _adapter(run: RunFolder, args: argparse.Namespace, file: Path) -> tuple[dict[str, str], Callable[[], Any], Base]:
    """Writes the adapter as a LoRA of llama.cpp. It is measured on the base that will be under it."""
    base = _published(run)
    found = adapters.updates(run, base)
    adapters.write_gguf(found, base.lm, file, f"{run.path.parent.name} {run.stage}")
    under = args.base if args.base and Path(args.base).is_file() else None

    def load() -> Any:
        lm = _published(run).lm
        tensors = gguf.read_tensors(Path(under)) if under else dict(gguf.tensors_of(lm, gguf.layout_of(lm.config)))
        return placed(gguf.model_of(adapters.with_adapter(tensors, gguf.read_tensors(file)), lm))

    return {"on": under or _words(run)}, load, base


def _form(run: RunFolder) -> Any:
    """The base that others have: the published one, as far as it is published unquantised."""
    found = origin.gguf_file(run.recipe.model) is None and origin.find(run.recipe.model)
    return "dequantized" if found and (found.stored or found.experts) else "original"


def _published(run: RunFolder) -> Base:
    """That base, without the adapter, loaded anew each time: an adapter that is loaded changes its layers."""
    return merging.loaded(run, _form(run))


def _words(run: RunFolder) -> str:
    return f"the base as it is published, {run.recipe.model.base}"
