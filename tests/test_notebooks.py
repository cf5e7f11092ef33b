"""The notebooks run from top to bottom on a CPU, and define nothing of their own."""

import ast
import json
import os
import re
import sys
import tarfile

import pytest

from qalign.config.load import dump, load
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_clean(notebook):
    python = re.sub(r"^(\s*)[!%].*", r"\1pass", code(notebook), flags=re.MULTILINE)
    defined = [node for node in ast.walk(ast.parse(python)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not defined
    assert "import" in python
    assert "==" not in re.sub(r"#.*", "", code(notebook).partition("elif")[0]), "a notebook pins nothing"
    text = notebook.read_text(encoding="utf-8")
    assert f"/blob/main/notebooks/{notebook.name})" in text, "no badge"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_cells_print_is_stored(notebook):
    """As `docs/run_notebooks.py` stores it."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        prints = re.search(r"^ *(print\(|!python)", source, re.MULTILINE) and "NOTEBOOK_TEST" not in source
        assert bool(outputs) == bool(prints)
        said = "".join("".join(output["text"]) for output in outputs)  # a KeyError where a cell failed
        assert not re.search(r"Traceback|\r|/(root|home|tmp|work|content)/", said)


def test_the_notebooks_are_there_and_in_the_readme():
    names = {"compare_chat", "constitution", "dpo_quickstart", "one_base_four_roles", "reward_hacking"}
    assert names <= {path.stem for path in NOTEBOOKS}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"/blob/main/notebooks/{path.name})" in readme


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The demo recipe cut to one step a stage, and where its runs go."""
    folder = tmp_path_factory.mktemp("notebooks")
    words = ["reward=", "ppo="]
    for stage, held_out in (("sft", "house_style_dialogues_test"), ("dpo", "house_style_test")):
        words += [f"{stage}.{key}" for key in ("max_steps=1", "limit=8", "batch_size=4", "micro_batch_size=2")]
        words.append(f"{stage}.eval_data={{path: {ROOT}/recipes/data/{held_out}.jsonl, limit: 4}}")
    recipe = load(str(ROOT / "recipes" / "smollm2_demo.yaml"), words)
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    words = ["goodhart.seeds=1", "goodhart.pairs=4", "goodhart.epochs=1", "goodhart.members=2", "goodhart.best_of=2"]
    words += ["reward.limit=8", "reward.eval_data=null", "ppo.max_steps=1", "ppo.eval_every=1", "ppo.limit=2"]
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
        "QALIGN_OVERRIDES_CONSTITUTION": "constitution.data.limit=2 constitution.max_new_tokens=32 "
        "constitution.agree_with.limit=2 sft= dpo=",
        "QALIGN_NOTEBOOK_TEST": "1",
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.mark.true_model
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo_quickstart", ["preferred", "aligned", "dpo/adapter", "quickstart.tar.gz"]),
        ("one_base_four_roles", ["equal to the bit: True", "reference  moved by 0.0000", "value", "switches so far"]),
        ("constitution", ["harm, crime", "this labeller", "no pairs were written", "revisions"]),
        ("compare_chat", ["base (", "quickstart/dpo (", "tokens/s"]),
        ("reward_hacking", ["best_of, seed 1, 1 member(s)", "rl, seed 1, 2 member(s)", "ppo_4_ensemble step-1"]),
    ],
)
def test_a_notebook_runs_from_top_to_bottom(name, words, environment, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "Traceback" not in said
    for word in words:
        assert word in said, said[-3000:]
    if name == "dpo_quickstart":
        with tarfile.open(environment["QALIGN_ARCHIVE"]) as archive:
            kept = archive.getnames()
        assert {f"quickstart/dpo/{file}" for file in ("adapter", "recipe.yaml", "summary.json")} <= set(kept)
        assert not any("checkpoint" in file for file in kept)
