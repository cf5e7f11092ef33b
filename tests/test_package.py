"""What a user gets who installs the wheel, without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOT_COPIED = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")


def run(*words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment that has the wheel, and the libraries of this one but not its qalign."""
    source, folder = tmp_path_factory.mktemp("source") / "qalign", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (wheel,) = folder.glob("qalign-*.whl")
    run(*pip, "--python", folder / "env", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files in there are not obeyed
    return folder / "env" / "bin"


@pytest.mark.slow
def test_the_wheel_writes_a_recipe_and_plans_its_memory(installed, tmp_path):
    where = run(installed / "python", "-c", "import qalign; print(qalign.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))

    run(installed / "qalign", "init", "smollm2_demo", cwd=tmp_path)
    planned = run(installed / "qalign", "fit", "smollm2_demo.yaml", cwd=tmp_path)

    assert (tmp_path / "smollm2_demo.yaml").is_file()
    assert planned.count("in all") == 5  # sft, reward, dpo, ppo, evaluate


def test_the_wheel_holds_the_page_and_its_files(installed):
    (package,) = (installed.parent / "lib").glob("python*/site-packages/qalign")
    assert (package / "page" / "launch.py").is_file()
    assert (package / "py.typed").is_file()
    for file in (ROOT / "qalign" / "page").glob("*.*"):
        assert (package / "page" / file.name).is_file(), f"{file.name} is missing in the wheel"
