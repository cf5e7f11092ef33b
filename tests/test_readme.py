"""What the documents tell people to type and to open is there."""

import importlib
import re
import shlex

import pytest

from qalign import cli
from qalign.config.load import load
from qalign.config.stages import SECTIONS
from qalign.fit import memory_of
from tests.conftest import ROOT

DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]
DOCUMENTS += ["SECURITY.md", "AGENTS.md"]
DOCUMENTS += [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    (document, line.strip())
    for document in DOCUMENTS
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines()
]


def commands(text: str) -> list[str]:
    """What a document tells people to type, `MODULE WORD …`: lines of code, and code in a sentence."""
    text = re.sub(r"(?<!`)`(?!`)[^`]+`(?!`)", lambda span: " ".join(span[0].split()), text)
    found = re.findall(r"(?:python|\btorchrun\b[^`\n]*?) -m (qalign\b[^`\n#]*)", text)
    found += [f"qalign.{short}" for short in re.findall(r"(?:^ {4,}|`)qalign ([a-z][^`\n#]*)", text, re.MULTILINE)]
    return [" ".join(re.sub(r"(?<!\S)\[(.*?)\](?!\S)", r"\1", each.partition(" | ")[0]).split()) for each in found]


COMMANDS = sorted({one for document in DOCUMENTS for one in commands((ROOT / document).read_text(encoding="utf-8"))})
PLACEHOLDERS = {"…", "OVERRIDES"}  # for words that the reader knows
RECIPES = {"kto": "smollm2_kto", "grpo": "smollm2_grpo", "goodhart": "smollm2_goodhart"}
RECIPES |= {"constitution": "constitution_demo"}  # for `RECIPE` and `my.yaml`; of the others, the demo


def test_commands_are_found_in_code_and_in_sentences():
    text = """Type `python -m
    qalign.fit RECIPE` or

        torchrun --nproc-per-node 2 -m qalign.dpo my.yaml a=[1]   # two cards

    ```
    .venv/bin/python -m qalign.export RUN --to gguf | mlx
    python -m qalign.h3 RUN [--limit 5]
    ```
    and `qalign init NAME`"""
    expected = ["fit RECIPE", "dpo my.yaml a=[1]", "export RUN --to gguf", "h3 RUN --limit 5", "init NAME"]
    assert commands(text) == [f"qalign.{words}" for words in expected]
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", COMMANDS)
def test_each_qalign_command_names_a_module_and_a_recipe_that_loads(command, monkeypatch):
    name, *words = [word for word in shlex.split(command.replace("STAGE", "dpo")) if word not in PLACEHOLDERS]
    module = importlib.import_module("qalign.__main__" if name == "qalign" else name)
    if not words:
        return  # the command is named, with nothing to type
    parsed = []

    def parse(parser, *_, **__):
        parsed.append(parser.parse_intermixed_args(words))

    monkeypatch.setattr(cli, "run_parsed", parse)
    monkeypatch.setattr(module, "run_parsed", parse, raising=False)
    module.main(words)
    (args,) = parsed
    if not hasattr(args, "recipe") or args.recipe is None:  # a command on finished runs
        return
    stage, overrides = name.partition(".")[2], args.overrides
    if stage == "best_of":
        stage, overrides = "ppo", [word for word in overrides if not word.startswith(("n=", "rounds="))]
    recipe = args.recipe
    if recipe in ("RECIPE", "my.yaml"):
        recipe = f"recipes/{RECIPES.get(stage, 'smollm2_demo')}.yaml"
    section = stage if stage in (*SECTIONS, "goodhart") else None
    if any("start_from=runs/" in word for word in overrides):  # the run of an earlier command
        found = load(str(ROOT / recipe), overrides, files_of=("model",))
        assert section is None or getattr(found, section), f"{recipe} has no section {section}:"
    else:
        load(str(ROOT / recipe), overrides, section)
    if getattr(args, "memory", None):
        assert memory_of(args.memory)


def test_each_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    told = {target for _, line in LINES for target in re.findall(r"(?:`|^)make ([a-z-]+)", line)}
    assert {"setup", "demo", "test"} <= told <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_file_that_is_named_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text)
    named += re.findall(r"`((?:qalign|tests|recipes|docs|benchmarks)/[\w./-]+)`", text)
    beside = (ROOT / document).parent
    assert not [name for name in named if not (ROOT / name).exists() and not (beside / name).exists()]
    assert "@@" not in text, "a figure is still to be filled in"


def test_the_harness_calls_the_readmes_test_command():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert "    make test " in (ROOT / "README.md").read_text()
