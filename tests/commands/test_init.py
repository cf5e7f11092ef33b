"""`qalign init`: a shipped recipe in the working folder, with what it needs, loadable without the repository."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from qalign import init
from qalign.config.load import load
from qalign.config.recipe import Recipe
from tests.conftest import ROOT

NAMES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            init.main(words)
        return (leaving.value.code, *capsys.readouterr())

    return run


def without_paths(recipe: Recipe) -> str:
    return re.sub(r"recipes/(data/|\w+\.py)", r"\1", recipe.model_dump_json())


@pytest.mark.parametrize("words", [(), ("--full",)])
@pytest.mark.parametrize("name", NAMES)
def test_a_written_recipe_loads_where_it_is_and_means_the_same(run, tmp_path, monkeypatch, name, words):
    code, out, _ = run(name, *words)

    assert code == 0
    assert f"{name}.yaml" in out
    written, text = load(f"{name}.yaml"), (tmp_path / f"{name}.yaml").read_text(encoding="utf-8")
    schema_line, _, rest = text.partition("\n")
    assert json.loads((tmp_path / schema_line.partition("$schema=")[2]).read_text(encoding="utf-8"))["$defs"]
    assert re.search(rf"python -m qalign(\.goodhart)? {name}\.yaml", rest)
    monkeypatch.chdir(ROOT)
    assert without_paths(written) == without_paths(load(f"recipes/{name}.yaml"))


def test_the_demos_rows_and_functions_come_with_it_and_yours_are_kept(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "house_style_test.jsonl").write_text("mine")

    _, out, _ = run("smollm2_demo")

    assert (tmp_path / "data" / "house_style_test.jsonl").read_text() == "mine"
    for path in ("rewards.py", "data/house_style_train.jsonl"):
        assert (tmp_path / path).read_bytes() == (ROOT / "recipes" / path).read_bytes()
        assert f"wrote {path}" in out


def test_full_shows_every_key_of_every_section_with_its_meaning(run, tmp_path):
    run("mistral7b", "--full")

    text = (tmp_path / "mistral7b.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    assert set(raw) == set(Recipe.model_fields) - {"constitution", "goodhart", "kto", "grpo"}
    assert "\n# kto:\n" in text, "of a stage that the recipe doesn't have, the keys are comments"
    assert "\n#   desirable_weight: 1.0\n" in text
    assert all(
        set(raw[key]) == set(getattr(load("mistral7b.yaml"), key).model_dump()) for key in ("lora", "dpo", "ppo")
    )
    assert "# PPO clip range ε: " in text
    assert raw["dpo"]["beta"] == 0.01


def test_it_never_overwrites(run, tmp_path):
    (tmp_path / "qwen3_4b.yaml").write_text("mine")

    code, _, err = run("qwen3_4b")

    assert (code, len(err.splitlines())) == (2, 1)
    assert "qwen3_4b.yaml" in err
    assert [file.name for file in tmp_path.iterdir()] == ["qwen3_4b.yaml"]
    assert (tmp_path / "qwen3_4b.yaml").read_text() == "mine"


def test_an_unknown_name_gets_the_nearest_one_and_all_of_them(run, tmp_path):
    code, _, err = run("mistral")

    assert (code, len(err.splitlines())) == (2, 1)
    assert "did you mean 'mistral7b'?" in err
    assert all(name in err for name in NAMES)
    assert not list(tmp_path.iterdir())


def test_without_a_name_it_lists_the_recipes(run):
    code, out, _ = run()

    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == NAMES


def test_it_works_from_an_installed_package_without_the_repository_and_imports_no_torch(tmp_path):
    shutil.copytree(ROOT / "qalign", tmp_path / "site" / "qalign", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "site" / "qalign" / "recipes", dirs_exist_ok=True)
    code = "import sys, qalign.init as i; print('torch' in sys.modules, i.RECIPES); i.main(['smollm2_demo'])"
    work = tmp_path / "work"
    work.mkdir()

    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=work,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )

    assert found.stdout.startswith(f"False {tmp_path / 'site' / 'qalign' / 'recipes'}\n"), found.stderr
    assert (work / "smollm2_demo.yaml").is_file()
