"""MkDocs' hook: pages that lie outside docs/, and links as they are in the repository.

Every document links to others by its place in the repository, so that GitHub shows it right. In the site, a link to a
page leads to that page, and any other to the file on GitHub, at the tag of this version. One that leads nowhere is a
warning, which ends `mkdocs build --strict`; MkDocs itself checks anchors and links between pages.
"""

import logging
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/qalign/qalign"
# Read, not imported: the site is made where qalign isn't installed.
TAG = "v" + re.findall(r'^__version__ = "(.*)"', (ROOT / "qalign/__init__.py").read_text(), re.MULTILINE)[0]
OUTSIDE = {  # of docs/: the page in the site of a file in the repository
    "README.md": "guide.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measured/index.md",
    **{f"benchmarks/results/{f.name}": f"measured/{f.name}" for f in sorted(ROOT.glob("benchmarks/results/*.md"))},
}
INSIDE = {page: file for file, page in OUTSIDE.items()}
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
log = logging.getLogger("mkdocs.hooks.site_pages")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists what was measured in the navigation."""
    for section in config.nav or []:
        if section.get("Measured"):
            section["Measured"] = [page for page in OUTSIDE.values() if page.startswith("measured/")]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    at = page.file.src_uri
    file = INSIDE.get(at, f"docs/{at}")
    return LINK.sub(lambda found: found[1] + in_site(found[2], PurePosixPath(file), at, files) + found[3], markdown)


def in_site(link: str, file: PurePosixPath, at: str, files: Files) -> str:
    """Where a link of a file in the repository leads in the site, as its page `at` says it."""
    name, mark, anchor = link.partition("#")
    if link.startswith(f"{GITHUB}/blob/{TAG}/"):
        target = name.removeprefix(f"{GITHUB}/blob/{TAG}/")
    elif not name or "://" in name or name.startswith("mailto:"):
        return link
    else:
        target = os.path.normpath(file.parent / name)
    if not (ROOT / target).exists():
        log.warning(f"{file}: the link '{link}' leads nowhere")
        return link
    page = OUTSIDE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
    if page and files.get_file_from_path(page):
        return os.path.relpath(page, os.path.dirname(at) or ".") + mark + anchor
    return f"{GITHUB}/{'tree' if (ROOT / target).is_dir() else 'blob'}/{TAG}/{target}{mark}{anchor}"
