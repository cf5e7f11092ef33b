"""What the documents tell people to type and to open is there."""

import importlib.util
import re
import shlex

import pytest

from qalign.config.load import load
from qalign.config.stages import STAGES
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
COMMANDS = sorted(
    {line.partition("#")[0].strip() for _, line in LINES if "/python -m qalign" in line and line[0] == "."}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_qalign_command_names_a_module_and_a_recipe_that_loads(command):
    _, _, module, first, *words = shlex.split(command)
    assert importlib.util.find_spec(module), command
    if first.startswith("runs/"):  # a command on a finished run
        assert module in ("qalign.score", "qalign.export")
        return
    if module == "qalign.fit":
        at = words.index("--memory")
        assert memory_of(words[at + 1])
        del words[at : at + 2]
    if module == "qalign.best_of":
        words.remove("n=16")
    overrides, stage = [word for word in words if not word.startswith("--")], module.partition(".")[2]
    assert set(words) - set(overrides) <= {"--resume", "--overwrite"}
    recipe = ROOT / ("recipes/smollm2_demo.yaml" if first == "my.yaml" else first)
    load(str(recipe), overrides, stage if stage in STAGES else None)


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
