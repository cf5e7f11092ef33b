"""What a user gets who installs the wheel, without the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import qalign
from qalign.config.load import load
from tests.conftest import ROOT

PYTHON_LIBRARIES = sysconfig.get_path("purelib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment that has the wheel, and the libraries of this one but not its qalign."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--python", folder)
    run(*pip, "install", "--no-deps", "--no-index", "--find-links", wheel.parent, "qalign", cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(PYTHON_LIBRARIES + "\n")  # .pth files in there are not obeyed
    return folder / "bin"


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    found = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def held(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_every_recipe(wheel):
    files = [file for file in (ROOT / "qalign").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    wanted = {str(file.relative_to(ROOT)) for file in files}
    recipes = {f"qalign/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").rglob("*.*") if file.suffix != ".pyc"}

    assert wanted | recipes <= held(wheel)
    assert {"qalign/py.typed", "qalign/page/page.css", "qalign/recipes/recipe.schema.json"} <= held(wheel)
    assert not [name for name in held(wheel) if name.startswith(("tests", "docs", "recipes", "benchmarks"))]


def test_the_readme_of_the_wheel_has_no_link_that_only_works_in_the_repository(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"qalign-{qalign.__version__}.dist-info/METADATA").decode()
    links = re.findall(r"\]\(([^)]*)\)", metadata)

    assert len(links) > 40
    assert not [link for link in links if not link.startswith(("https://", "http://", "#"))]
    repository = PROJECT["urls"]["Repository"]
    assert f"{repository}/blob/v{qalign.__version__}/docs/recipe.md" in links
    assert f"{repository}/raw/v{qalign.__version__}/docs/one-base.svg" in links


@pytest.mark.slow
def test_each_recipe_of_the_wheel_loads_where_init_wrote_it(bin_folder, tmp_path):
    where = run(bin_folder / "python", "-c", "import qalign; print(qalign.__file__)", cwd=tmp_path)
    assert where.startswith(str(bin_folder.parent))
    names = [line.split()[0] for line in run(bin_folder / "qalign", "init", cwd=tmp_path).splitlines()]
    assert names == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))

    loop = "from qalign.init import write_recipe\nimport sys\nfor name in sys.argv[1:]: write_recipe(name)"
    run(bin_folder / "python", "-c", loop, *names, cwd=tmp_path)

    for name in names:
        load(str(tmp_path / f"{name}.yaml"))


@pytest.mark.slow
def test_the_wheel_plans_memory_and_finds_its_yaml_files(bin_folder, tmp_path):
    told = run(bin_folder / "qalign", "init", "smollm2_demo", cwd=tmp_path)
    planned = run(bin_folder / "qalign", "fit", "smollm2_demo.yaml", cwd=tmp_path)
    code = "from qalign.judge.principles import read_principles; print(len(read_principles()))"

    assert "then train: qalign smollm2_demo.yaml" in told
    assert planned.count("in all") == 5  # sft, reward, dpo, ppo, evaluate
    assert run(bin_folder / "python", "-c", code, cwd=tmp_path).strip() == "14"


@pytest.mark.slow
def test_uvx_runs_the_console_script(wheel, tmp_path):
    """Without a network: the wheel comes out of a folder, the libraries from this environment."""
    needless = [f"{Requirement(line).name} ; python_version < '3'" for line in PROJECT["dependencies"]]
    (tmp_path / "overrides.txt").write_text("\n".join(needless))
    (tmp_path / "work").mkdir()
    uvx = (sys.executable, "-m", "uv", "tool", "run", "--offline", "--no-index", "--find-links", wheel.parent)
    uvx += ("--overrides", tmp_path / "overrides.txt", "--python", sys.executable, "qalign")
    places = {"UV_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": PYTHON_LIBRARIES}

    assert "usage: qalign COMMAND" in run(*uvx, cwd=tmp_path / "work", **places)
    run(*uvx, "init", "mistral7b", cwd=tmp_path / "work", **places)

    assert sorted(file.name for file in (tmp_path / "work").iterdir()) == ["mistral7b.yaml", "recipe.schema.json"]


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "site"))
    build = (sys.executable, "-m", "uv", "build", "--no-build-isolation", "--offline", "--python", sys.executable)
    run(*build, "--out-dir", tmp_path / "made", source, cwd=tmp_path, UV_CACHE_DIR=str(tmp_path / "cache"))

    (made,) = (tmp_path / "made").glob("*.whl")  # by way of the source distribution
    assert held(made) == held(wheel)


def test_the_dockerfile_copies_what_is_there_and_takes_the_locked_cuda():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)", dockerfile, re.M) for word in line.split()[:-1]]
    let_in = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(Path(name).match(pattern) for pattern in let_in), f".dockerignore keeps {name} out"

    image = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)", dockerfile, re.M)[1]
    locked = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements-cuda.lock").read_text(), re.M)[1]
    assert image == locked


def test_the_dev_container_sets_the_project_up():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert container["hostRequirements"]["gpu"] == "optional"
    assert "make setup" in container["postCreateCommand"]
    minor = int(re.search(r"python:3\.(\d+)", container["image"])[1])
    assert 11 <= minor < 14
