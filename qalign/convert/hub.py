"""A finished run as a repository of the Hugging Face hub: the adapter, a whole model card, the recipe, figures and
pictures. Paths of this machine become the names of their files. Checkpoints, data and sampled answers stay here.
Imports no torch."""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from qalign.config.paths import data_set_name, looks_local
from qalign.config.yaml_file import dump_yaml
from qalign.data.hub import why
from qalign.errors import UserError
from qalign.model.adapters.files import CONFIG, read_files
from qalign.model.adapters.serving import vllm_options, vllm_problem
from qalign.train.checkpoints import read_metrics
from qalign.train.model_card import CARD
from qalign.train.run_folder import RunFolder, print_table

# Of the adapter's folder: what PEFT, transformers and tokenizers save, and what qalign knows of its base.
ADAPTER = (
    CONFIG, "adapter_model.safetensors", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json",
    "lineage.json",
)  # fmt: skip
REPORTS = ("summary.json", "evaluation.json", "h3.json", "metrics.jsonl", "*_report.json", "*.png")  # of a run's folder
LINEAGE, TOKENIZER = "lineage.json", "tokenizer_config.json"
# A path of this machine in a text: not a part of an address, a word with a slash, or a closing tag.
PATH = re.compile(r"""(?<![\w/.~<-])(?:~[\w.-]*|\.{1,2})?(?:/[^\s/"'`|,;:()<>\[\]{}]+){2,}/?|\b[A-Za-z]:\\[^\s"'`|]+""")
# A home folder of this machine, whose name is often that of its owner.
HOME = re.compile(
    r"""(?<![\w/.~<-])(?:(?:/home|/Users)/[\w.@-]+(?:\([^)\s/]*\))?"""
    r"""|[A-Za-z]:\\Users\\[\w.@-]+(?![\w.@\\-])|~[A-Za-z_][\w.-]*(?=/|$))"""
)
# Where figures stand in the files above: the type and the name that a metric has in the card.
FIGURES = {
    "loss.after": ("loss", "loss on held-out rows, nats per token"),
    "perplexity.after": ("perplexity", "perplexity on held-out rows"),
    "token_accuracy.after": ("accuracy", "next tokens guessed on held-out rows"),
    "accuracy_after": ("accuracy", "held-out pairs whose chosen answer is the likelier one"),
    "reward_accuracy": ("accuracy", "held-out pairs whose chosen answer has the higher implicit reward"),
    "reward_margin": ("margin", "margin of implicit rewards on held-out pairs"),
    "trust.accuracy": ("accuracy", "held-out pairs whose chosen answer scores higher"),
    "reward.after": ("reward", "reward of answers to held-out prompts"),
    "judge.after": ("reward", "judge's score of answers to held-out prompts"),
    "kl_nats.after": ("kl", "KL divergence from the reference, nats per answer"),
    "held_out.last.proxy": ("reward", "reward of answers to held-out prompts, at the end of training"),
    "held_out.last.judge": ("reward", "judge's score of answers to held-out prompts, at the end of training"),
    "held_out.last.kl_nats": ("kl", "KL divergence from the reference, nats per answer, at the end of training"),
}
SERVED = "\n## vLLM\n\n```sh\nvllm serve {base} {options} --lora-modules {name}={repo}\n```\n"
READ_FROM = "\nThe run read its base from `{source}`; whoever pushed it says that this is `{base}`.\n"
PICTURE = "\n![{name}]({name})\n"
RECIPE = "\n## Recipe\n\nOf qalign, every default written out:\n\n```yaml\n{recipe}```\n"


def base_id(run: RunFolder, given: str | None) -> str:
    """The base's hub id: as the recipe names it, or `given`; a `UserError` if the recipe names files of this disk."""
    base = given or run.recipe.model.base
    if looks_local(base) or base.startswith("package:"):
        key = "--base" if given else "model.base"
        raise UserError(f"{key}: '{base}' is no hub id, by which others could load it; give one with --base ORG/NAME")
    return base


def write(run: RunFolder, repo: str, base: str, about_base: dict[str, str], folder: Path) -> None:
    """Writes what is pushed into an empty folder.

    Args:
        repo: the hub id that it will have.
        base: hub id of the base, by which the adapter will find it.
        about_base: the licence of the base, as its card has it: `license` and perhaps `license_name`, `license_link`.
    """
    recipe = run.recipe.model_dump(mode="json")
    read_files(run.adapter)
    source = _read(run.adapter / CONFIG)["base_model_name_or_path"]
    known = {str(run.adapter): repo, run.recipe.model.base: base, source: base}
    for file in {file for pattern in ADAPTER for file in run.adapter.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
    for name in (CONFIG, LINEAGE, TOKENIZER):
        if (folder / name).is_file():
            _write_json(folder / name, _portable(_read(run.adapter / name), known))
    for file in (file for pattern in REPORTS for file in sorted(run.path.glob(pattern))):
        if file.suffix == ".png":
            shutil.copyfile(file, folder / file.name)
        elif file.suffix == ".jsonl":
            rows = [json.dumps(_portable(line, known)) for line in read_metrics(file)]
            (folder / file.name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        else:
            _write_json(folder / file.name, _portable(_read(file), known))
    shown = _portable(recipe, known) | {"output": f"runs/{run.path.parent.name}"}
    shown["model"]["base"] = base
    (folder / "recipe.yaml").write_text(dump_yaml(shown), encoding="utf-8")
    (folder / CARD).write_text(_card(run, repo, base, about_base, folder, known), encoding="utf-8")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable(value: Any, known: dict[str, str]) -> Any:
    """A value of JSON without paths of this machine: each becomes its file's name, a `known` one what it stands for."""
    if isinstance(value, dict):
        return {
            portable_text(key, known): _portable(inside, known) for key, inside in cast(dict[str, Any], value).items()
        }
    if isinstance(value, list):
        return [_portable(inside, known) for inside in cast(list[Any], value)]
    return portable_text(value, known) if isinstance(value, str) else value


def portable_text(text: str, known: dict[str, str]) -> str:
    """A text without paths of this machine. One that is a path as a whole may have spaces in it."""
    if text in known:
        return known[text]
    if text.startswith("package:"):
        return text.rpartition("/")[2]
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path]) if looks_local(path) or path.startswith("package:") else text
    home = str(Path.home())  # it may have a space in it
    text = text.replace("file://", "")
    text = re.sub(rf"(?<![\w/.~<-]){re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text
    text = HOME.sub("~", text)
    if "\n" not in text and (text.startswith(("/", "~/")) or PureWindowsPath(text).drive):
        return PureWindowsPath(text).name
    return PATH.sub(lambda found: PureWindowsPath(found[0]).name, text)


def _card(run: RunFolder, repo: str, base: str, about_base: dict[str, str], folder: Path, known: dict[str, str]) -> str:
    """The model card: what the run's own says, its figures for the hub, pictures and the recipe."""
    hub: Any = import_module("huggingface_hub")
    gives_scores = run.stage == "reward"
    task = "text-classification" if gives_scores else "text-generation"
    results = [hub.EvalResult(task_type=task, **each) for each in _results(run, folder)]
    name = run.path.parent.name
    data = hub.ModelCardData(
        base_model=base, base_model_relation="adapter", library_name="peft", pipeline_tag=task,
        tags=["qalign", run.stage, "lora"], datasets=_hub_data(run) or None,
        model_name=f"{name} {run.stage}" if results else None, eval_results=results or None, **about_base,
    )  # fmt: skip
    own = run.adapter / CARD
    text = hub.ModelCard(own.read_text(encoding="utf-8")).text if own.is_file() else f"# {name}: {run.stage} adapter\n"
    text = portable_text(re.sub(r"^folder = .*$", f'folder = "{repo}"', text, flags=re.MULTILINE), known)
    if run.recipe.model.base != base:
        text += READ_FROM.format(source=portable_text(run.recipe.model.base, {}), base=base)
    spec = run.recipe.model
    if problem := vllm_problem(read_files(folder)):
        text += f"\n## vLLM\n\n{problem}; merge it with `python -m qalign.export RUN --to merged`.\n"
    elif not gives_scores:
        held = " --quantization bitsandbytes" if spec.quantization == "nf4" and spec.double_quant else ""
        text += SERVED.format(base=base, options=vllm_options(folder) + held, name=name, repo=repo)
    pictures = sorted(file.name for file in folder.glob("*.png"))
    text += ("\n## Pictures\n" if pictures else "") + "".join(PICTURE.format(name=picture) for picture in pictures)
    text += RECIPE.format(recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"))
    return f"---\n{data.to_yaml()}\n---\n{text.lstrip()}"


def _results(run: RunFolder, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures for `model-index`, as `EvalResult` takes them."""
    held_out = run.settings.eval_data or run.settings.data
    name = portable_text(held_out[0].path, {})
    here = {"dataset_type": name, "dataset_name": name if run.settings.eval_data else f"a share of {name}, held out"}
    seen = set[str]()
    for file in ("evaluation.json", "summary.json"):
        figures = _read(folder / file)
        for place, (kind, words) in FIGURES.items():
            value = _at(figures, place)
            if value is not None and place not in seen:
                seen.add(place)
                yield here | {"metric_type": kind, "metric_name": words, "metric_value": value}
    for measure in _read(folder / "h3.json").get("measures", []):
        if after := measure["after"]:
            interval = {"metric_args": {"interval_95": after["interval"], "count": after["count"]}}
            about = {"dataset_type": f"qalign-{measure['name']}", "dataset_name": f"qalign.h3, {measure['part']}"}
            yield about | interval | {
                "metric_type": measure["name"], "metric_name": measure["words"], "metric_value": after["value"]
            }  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is damaged, no JSON; restore it, or move it out of the run") from None


def _at(figures: Any, place: str) -> float | None:
    """The number at a dotted place, if there is one."""
    for key in place.split("."):
        figures = cast(dict[str, Any], figures).get(key) if isinstance(figures, dict) else None
    return figures if isinstance(figures, (int, float)) else None


def _hub_data(run: RunFolder) -> list[str]:
    """The hub ids of the data sets that it was trained on."""
    names = [data_set_name(source.path)[0] for source in run.settings.data]
    return list(dict.fromkeys(name for name in names if not looks_local(name) and not name.startswith("package:")))


# --- the hub itself ---------------------------------------------------------------------------------------------------


def licence_of(base: str, *, needed: bool) -> dict[str, str]:
    """The licence of a base, in the keys that a model card has: empty if its card names none, or, where it isn't
    `needed`, can't be read, which is a `UserError` otherwise."""
    api = import_module("huggingface_hub").HfApi()
    try:
        card = api.model_info(base).card_data
    except Exception as error:  # of several libraries, which `why` knows
        if not needed:
            return {}
        raise UserError(f"--base {base}: its card can't be read: {why(error, base, 'model', None)}") from None
    found = card.to_dict() if card else {}
    return {key: found[key] for key in ("license", "license_name", "license_link") if found.get(key)}


def check_login(repo: str) -> None:
    """A `UserError` if there is no token to push with, before anything is written."""
    if not import_module("huggingface_hub").get_token():
        raise UserError(
            f"--repo {repo}: pushing needs a token that may write; set HF_TOKEN, or log in with `hf auth login`"
        )


def push(repo: str, folder: Path, *, private: bool) -> str:
    """Pushes a folder into a repository of the hub, which is made if there is none. Returns the commit's address."""
    hub: Any = import_module("huggingface_hub")
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter trained with qalign")
    except Exception as error:  # of several libraries, which `why` knows
        said = why(error, repo, "model", None).replace(hub.get_token() or "\0", "HF_TOKEN")
        raise UserError(f"--repo {repo}: {said}") from None
    return str(done.commit_url)


def export(run: RunFolder, given: argparse.Namespace) -> None:
    """Pushes a finished run, or with `--dry-run` shows what would be pushed."""
    if not given.repo or not re.fullmatch(r"[\w.-]+/[\w.-]+", given.repo):
        raise UserError(f"--repo: {given.repo!r} is no repository; give OWNER/NAME with --to hub")
    base = base_id(run, given.base)
    if not given.dry_run:
        check_login(given.repo)
    about_base = licence_of(base, needed=not given.dry_run)
    with tempfile.TemporaryDirectory() as folder:
        write(run, given.repo, base, about_base, Path(folder))
        files = sorted(Path(folder).iterdir())
        lines = [(file.name, f"{file.stat().st_size:,} bytes") for file in files]
        if given.dry_run:
            print((Path(folder) / CARD).read_text(encoding="utf-8"))
            print_table(f"would push to {given.repo}", [*lines, ("licence", about_base.get("license", "unknown"))])
            return
        address = push(given.repo, Path(folder), private=given.private)
    same = "0 nats: the adapter itself, byte for byte"
    print_table(f"pushed {run.path}", [*lines, ("KL", same), ("to", address)])
