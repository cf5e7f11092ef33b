"""The page's tabs about training in Chromium."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from qalign.train.lock import locked
from tests.chat_runs import serving
from tests.conftest import ROOT
from tests.page.browser import Browser
from tests.reward_runs import DATA, write_recipe

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # Selenium's own sockets


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


def log(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1 / step, "eval_loss": 2 / step}) + "\n" for step in steps)


def begun(run: Path) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("{}")
    log(run, 1, 2)
    return run


def ticks(browser: Browser) -> int:
    """How many calls the page has sent."""
    return browser.run("return performance.getEntriesByType('resource').filter(e => e.name.endsWith('/join')).length")


def test_curves_of_a_run_at_work_move_without_a_base_and_only_while_they_are_seen(browser, tmp_path):
    run, other = begun(tmp_path / "runs" / "a" / "dpo"), begun(tmp_path / "runs" / "b" / "sft")
    with serving("--runs", str(tmp_path / "runs"), "--votes", str(tmp_path / "v.jsonl")) as address:
        with locked(run):
            browser.open(address, sees="[role=tab]")
            assert "There is no run yet" in browser.text("#tabs")
            browser.tab("Curves")
            browser.until(lambda: "running by process" in browser.text("#curves"))
            assert "step 2" in browser.text("#curves")
            assert len(browser.driver.find_elements("css selector", "#curves polyline")) == 2
            log(run, 3, 4)
            browser.until(lambda: "step 4" in browser.text("#curves"))
            assert "held out 0.5" in browser.text("#curves")
            browser.tab("Compare")
            browser.until(lambda: (before := ticks(browser), time.sleep(5), ticks(browser) == before)[-1])
            log(run, 5)
            browser.tab("Curves")
            browser.until(lambda: "step 5" in browser.text("#curves"))
        browser.until(lambda: "stopped, step 5" in browser.text("#curves"))
        browser.until(lambda: (before := ticks(browser), time.sleep(5), ticks(browser) == before)[-1])
        log(other, 7)
        browser.click("#curves-run input")
        browser.choose("b/sft")
        browser.until(lambda: "step 7" in browser.text("#curves"))
        browser.open(address, 390, 844, sees="[role=tab]")
        browser.tab("Curves")
        browser.until(lambda: browser("#curves svg").is_displayed())
        assert browser.run("return document.documentElement.scrollWidth") <= 390


SLOW = 600  # seconds that a command may take on a busy machine


class Training(NamedTuple):
    """A run that a person starts on the page, with enough steps to stop it before its end."""

    recipe: str
    steps: int
    settings: tuple[str, ...] = ()


TINY = Training("recipes/dpo.yaml", 200)
DEMO = Training("recipes/smollm2_demo.yaml", 12, ("dpo.start_from=null", "dpo.batch_size=2", "dpo.micro_batch_size=2"))


@pytest.fixture
def home(tiny_folder, tmp_path) -> Path:
    """A folder with two recipes, as a person has it who has not trained yet."""
    for stage in ("dpo", "sft"):
        write_recipe(tmp_path / "recipes", tiny_folder, stage, limit=None)
    return tmp_path


@pytest.fixture
def demo_home(tmp_path) -> Path:
    """The same with the demo's recipe and data."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / DEMO.recipe, tmp_path / DEMO.recipe)
    shutil.copytree(DATA, tmp_path / "data")
    return tmp_path


def rows_with_a_bad_one(file: Path) -> Path:
    good = (DATA / "house_style_train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    file.write_text("\n".join([*good[:3], '{"prompt": "Why?", "chosen": "So."}', *good[3:]]) + "\n", encoding="utf-8")
    return file


def value(browser: Browser, selector: str) -> str:
    return browser(selector).get_attribute("value")


def picture(browser: Browser, name: str) -> None:
    """Saves what is seen, where a person asked for pictures."""
    if folder := os.environ.get("QALIGN_PICTURES"):
        browser.driver.save_screenshot(f"{folder}/{name}.png")


def test_from_an_upload_to_the_comparison(browser, home):
    with serving("--votes", str(home / "v.jsonl"), folder=home) as address:
        opens(browser, address, TINY)
        chooses_another_recipe_and_back(browser)
        from_the_upload_on(browser, home, address, TINY)


def test_from_an_upload_to_the_comparison_with_the_demo(browser, demo_home):
    with serving("--votes", str(demo_home / "v.jsonl"), folder=demo_home) as address:
        opens(browser, address, DEMO)
        browser.click("#train-stage input")
        browser.choose("dpo")
        from_the_upload_on(browser, demo_home, address, DEMO)


def opens(browser, address, training):
    browser.open(address, sees="[role=tab]")
    assert "There is no run yet" in browser.text("#tabs")
    assert not browser.driver.find_elements("css selector", ".toast-body")  # no error was shown
    browser.tab("Train")
    browser.until(lambda: value(browser, "#train-recipe input") == training.recipe)


def from_the_upload_on(browser, home, address, training):
    uploads(browser, home, training)
    says_what_was_read_and_what_fits(browser)
    trains_stops_and_resumes(browser, home, address, training.steps)
    picture(browser, "finished390")
    browser.click("#train-open")
    browser.until(lambda: browser("#prompt textarea").is_displayed(), SLOW)
    browser.until(lambda: "mine/dpo" in browser.text("#right"))
    browser.type("Why?\n")
    browser.answered(SLOW)
    picture(browser, "opened390")
    assert "tokens" in browser.text("#right-figures")


def chooses_another_recipe_and_back(browser):
    for stage in ("sft", "dpo"):
        browser.click("#train-recipe input")
        browser.choose(f"recipes/{stage}.yaml")
        browser.until(lambda s=stage: value(browser, "#train-commands textarea").endswith(f"{s} recipes/{s}.yaml"))
        assert value(browser, "#train-stage input") == stage


def uploads(browser, home, training):
    browser("#upload-file").send_keys(str(rows_with_a_bad_one(home / "my rows.jsonl")))
    browser.until(lambda: "uploads/my_rows.jsonl is uploaded" in browser.text("#train-status"))
    assert (home / "uploads" / "my_rows.jsonl").read_bytes() == (home / "my rows.jsonl").read_bytes()
    browser.until(lambda: "dpo.data=uploads/my_rows.jsonl" in value(browser, "#train-commands textarea"))
    settings = [*training.settings, f"dpo.max_steps={training.steps}", "output=runs/mine"]
    browser("#train-settings textarea").send_keys("\n".join(settings))
    words = " ".join([training.recipe, "dpo.data=uploads/my_rows.jsonl", *settings])
    browser("#train-card :is(input, textarea)").send_keys("12GB")
    browser.click("#train-overwrite input")
    expected = [f"dpo {words} --check", f"fit {words} --memory 12GB", f"dpo {words} --overwrite"]
    browser.until(lambda: value(browser, "#train-commands textarea").split("\n") == [
        f"python -m qalign.{command}" for command in expected])  # fmt: skip


def says_what_was_read_and_what_fits(browser):
    for name, words in (("check", "40 rows are used, 1 refused"), ("fit", "fits           yes")):
        browser.click(f"#train-{name}")
        browser.until(lambda words=words: words in value(browser, "#train-log textarea"), SLOW)
        picture(browser, f"{name}1280")
        if name == "check":
            assert "my_rows.jsonl:4: " in value(browser, "#train-log textarea")


def trains_stops_and_resumes(browser, home, address, steps):
    metrics = home / "runs" / "mine" / "dpo" / "metrics.jsonl"
    browser.click("#train-train")
    browser.until(lambda: browser.driver.find_elements("css selector", "#train-curves polyline"), SLOW)
    assert not browser.driver.find_elements("id", "train-train")  # one run at a time
    browser.until(lambda: len(browser("#train-curves polyline").get_attribute("points").split()) > 1, SLOW)
    browser.click("#train-stop")
    browser.until(lambda: "stopped, step" in browser.text("#train-curves"), SLOW)
    assert "stopped by SIGINT" in value(browser, "#train-log textarea")
    done = len(metrics.read_text().splitlines())
    assert 0 < done < steps
    browser.until(lambda: value(browser, "#train-commands textarea").endswith("output=runs/mine --resume"))
    picture(browser, "stopped1280")
    browser.click("#train-resume")
    browser.until(lambda: "running by process" in browser.text("#train-curves"), SLOW)
    picture(browser, "running1280")
    browser.open(address, 390, 844, sees="[role=tab]")  # who comes back finds the run
    browser.tab("Train")
    browser.until(lambda: "runs/mine/dpo: " in browser.text("#train-curves"), SLOW)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    picture(browser, "running390")
    browser.until(lambda: f"finished, step {steps}" in browser.text("#train-curves"), SLOW)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, steps + 1)]
