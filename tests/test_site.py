"""The documents as a site: links lead to pages or to GitHub, and one that leads nowhere ends the build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import qalign
from docs import site_pages
from tests.conftest import ROOT

BADGES = {"https://colab.research.google.com/assets/colab-badge.svg"}
BADGES |= {"https://kaggle.com/static/images/open-in-kaggle.svg"}


class Known:
    """The pages of a site, as the hook asks for them."""

    def get_file_from_path(self, page: str) -> bool:
        return page in {"recipe.md", "ppo.md", "guide.md", "one-base.svg", "measured/ppo_demo.md", "measured/index.md"}


@pytest.mark.parametrize(
    ("file", "at", "link", "expected"),
    [
        ("README.md", "guide.md", "docs/recipe.md", "recipe.md"),
        ("README.md", "guide.md", "docs/ppo.md#goodharts-law", "ppo.md#goodharts-law"),
        ("README.md", "guide.md", "docs/one-base.svg", "one-base.svg"),
        ("README.md", "guide.md", "qalign/losses", f"{site_pages.GITHUB}/tree/v{qalign.__version__}/qalign/losses"),
        ("docs/ppo.md", "ppo.md", "../benchmarks/results/ppo_demo.md", "measured/ppo_demo.md"),
        ("docs/ppo.md", "ppo.md", "../qalign/cli.py", f"{site_pages.GITHUB}/blob/v{qalign.__version__}/qalign/cli.py"),
        ("benchmarks/results/ppo_demo.md", "measured/ppo_demo.md", "../../docs/ppo.md", "../ppo.md"),
        ("benchmarks/README.md", "measured/index.md", "results/ppo_demo.md", "ppo_demo.md"),
        ("docs/ppo.md", "ppo.md", "#rewards", "#rewards"),
        ("docs/ppo.md", "ppo.md", "https://arxiv.org/abs/2210.10760", "https://arxiv.org/abs/2210.10760"),
    ],
)
def test_where_a_link_of_the_repository_leads(file, at, link, expected):
    assert site_pages.in_site(link, PurePosixPath(file), at, Known()) == expected


def build(folder: Path) -> subprocess.CompletedProcess:
    words = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site"))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_links_and_anchors_that_lead_nowhere_end_the_build(tmp_path):
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    shutil.copy(ROOT / "docs" / "site_pages.py", tmp_path / "docs")
    for name in ("qalign", "recipes", "notebooks", "tests", "app.py", ".devcontainer", "AGENTS.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("[a](docs/nowhere.md) [b](docs/ppo.md#nowhere) [c](#nowhere) [d](qalign/nowhere.py)\n")

    failed = build(tmp_path)

    assert failed.returncode == 1
    warnings = [line for line in failed.stderr.splitlines() if line.startswith("WARNING")]
    for link in ("docs/nowhere.md", "ppo.md#nowhere", "#nowhere", "qalign/nowhere.py"):
        assert any(re.search(rf"[^\w/.]{re.escape(link)}'", line) for line in warnings), (link, warnings)


@pytest.mark.slow
def test_the_site_fetches_nothing(tmp_path):
    """Neither fonts nor scripts of others: what a page loads lies beside it. (Pictures of badges are the exception.)"""
    words = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?\b(?:src|href)="?([^" >]+)', page.read_text(encoding="utf-8"))
        others = {url for url in loaded if "://" in url and not url.startswith("https://qalign.github.io/")}
        assert others <= BADGES, page
