"""Hub data sets through `datasets`, from a hub on this machine: configurations, revisions, streaming, refusals."""

import base64
import io
import json
import os
import random
import subprocess
import sys
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qalign.config.load import load
from qalign.config.paths import absolute
from qalign.data.formats import preferences
from tests.data.fake_hub import FakeHub
from tests.helpers import slow

MAIN = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}]
- config_name: small
  data_files: [{split: train, path: small/train.jsonl}, {split: test, path: small/test.jsonl}]
---
"""
READ = """
import json, sys, time
from qalign.config.stages import Source
from qalign.data.formats import preferences
from qalign.errors import UserError
import datasets
datasets.disable_progress_bars()
for line in sys.stdin:
    began = time.monotonic()
    try:
        rows, refused = preferences((Source(**json.loads(line)),), "train", None, 0)
        found = {"chosen": [row.chosen["content"] for row in rows], "where": [row.where for row in rows]}
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps({**found, "seconds": time.monotonic() - began}), flush=True)
"""


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def hub():
    files = {"README.md": CARD.encode(), "main/train.jsonl": lines(MAIN), "small/train.jsonl": lines(MAIN[:2])}
    return FakeHub({**files, "small/test.jsonl": lines(MAIN[3:])})


@pytest.fixture(scope="module")
def read(hub, tmp_path_factory):
    """Reads a source in one process of its own, as the hub's address is read once, when its client is imported."""
    home = str(tmp_path_factory.mktemp("home"))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": home}
    started = [sys.executable, "-c", READ]
    with subprocess.Popen(started, stdin=-1, stdout=-1, text=True, env=environment) as process:

        def asked(**source):
            process.stdin.write(json.dumps(source) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield asked


@pytest.mark.parametrize("streaming", [False, True])
def test_the_configuration_stands_after_the_name(read, streaming):
    assert read(path="org/set:main", streaming=streaming)["chosen"] == [row["chosen"] for row in MAIN]
    found = read(path="org/set:small", split="test", streaming=streaming)
    assert (found["chosen"], found["where"]) == (["good 3"], ["org/set:small[test], row 1"])


def test_a_revision_is_asked_for(read):
    assert len(read(path="org/set:main", revision="v1")["chosen"]) == 4
    assert "it has no revision 'none'" in read(path="org/set:main", revision="none")["error"]


REFUSED = {
    "org/set": ("main', 'small'", "write org/set:CONFIG"),
    "org/set:nope": ("'nope'", "main", "small"),
    "org/gone": ("no such dataset", "hf auth login"),
    "org/gated": ("is gated", "accept its terms at", "/datasets/org/gated"),
    "org/secret": ("refuses access (error 401)", "hf auth login"),
    "org/sick": ("error 500", "later"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_hub_refuses_is_one_line_at_once(read, name, streaming):
    found = read(path=name, streaming=streaming)

    assert found["error"].startswith(f"{name}: ")
    assert "\n" not in found["error"]
    assert all(part in found["error"] for part in REFUSED[name])
    assert found["seconds"] < 5


def test_a_split_that_is_not_there(read):
    assert "train" in read(path="org/set:main", split="validation")["error"]


def test_a_hub_that_cannot_be_reached_is_named_without_retries(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    asked = json.dumps({"path": "org/set"})
    began = time.monotonic()

    done = subprocess.run([sys.executable, "-c", READ], input=asked, capture_output=True, text=True, env=environment)

    assert "the hub can't be reached" in json.loads(done.stdout)["error"]
    assert time.monotonic() - began < 15  # the client's own retries take 23 seconds


@pytest.mark.parametrize("kind", ["parquet", slow("jsonl")])
def test_streaming_with_a_limit_fetches_little_else(tmp_path, kind):
    """The hub's file system reads blocks of 5 MB, twice: for the columns, then for the rows."""
    rng = random.Random(0)
    rows = [{**MAIN[0], "prompt": base64.b64encode(rng.randbytes(1500)).decode()} for _ in range(20_000)]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=500)
    hub = FakeHub({f"train.{kind}": parquet.getvalue() if kind == "parquet" else lines(rows)})
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    asked = json.dumps({"path": "org/set", "streaming": True, "limit": 5})

    done = subprocess.run(
        [sys.executable, "-c", READ], input=asked, capture_output=True, text=True, env=environment, timeout=120
    )

    assert done.returncode == 0, done.stderr  # threads that still read would crash or hang at the end
    assert json.loads(done.stdout)["chosen"] == ["good 0"] * 5
    assert 0 < hub.served[f"train.{kind}"] < len(hub.files[f"train.{kind}"]) / 2


def test_a_folder_may_have_configurations_too(tmp_path, monkeypatch):
    (folder := tmp_path / "set").mkdir()
    (folder / "README.md").write_text(CARD)
    for name, rows in (("main/train", MAIN), ("small/train", MAIN[:2]), ("small/test", MAIN[3:])):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_bytes(lines(rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: {base: org/base}\noutput: out\ndpo: {data: 'set:small', split: test}\n"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    recipe = load(str(tmp_path / "recipe.yaml"))  # `set` lies in the recipe's folder
    rows, refused = preferences(recipe.dpo.data, recipe.dpo.split, None, 0)

    assert absolute(recipe).dpo.data[0].path == f"{folder}:small"
    assert ([row.chosen["content"] for row in rows], refused) == (["good 3"], [])
