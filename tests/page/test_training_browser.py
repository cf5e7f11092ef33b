"""The page's tabs about training in Chromium."""

import json
import time
from pathlib import Path

import pytest

from qalign.train.lock import locked
from tests.chat_runs import serving
from tests.page.browser import Browser

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
