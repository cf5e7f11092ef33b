"""One page in headless Chromium, driven by Selenium."""

import json
import os
import shutil
import tempfile
import time
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
STANDS_STILL = """const [element, done] = arguments, place = () => JSON.stringify(element.getBoundingClientRect());
element.scrollIntoView({block: 'center'});
const before = place();
requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => done(place() === before), 20)));"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")  # fmt: skip


class Browser:
    """One page in Chromium."""

    def __init__(self, *flags: str):
        if not (CHROMIUM and DRIVER):
            give_up = pytest.fail if os.environ.get("QALIGN_BROWSER") == "insist" else pytest.skip
            give_up("Chromium is missing: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        for flag in (*FLAGS, f"--user-data-dir={self.profile.name}", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def close(self) -> None:
        self.driver.quit()
        self.profile.cleanup()

    def open(
        self, address: str, width: int = 1280, height: int = 1000, *, dark: bool = False, sees: str = "#prompt textarea"
    ) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(address)
        self.until(lambda: self(sees).is_displayed())
        time.sleep(1)  # the page greets with what the server knows by now

    def __call__(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self(selector).text

    def run(self, script: str):
        return self.driver.execute_script(script)

    def tab(self, name: str) -> None:
        """Opens the tab of this name."""
        self.until(lambda: [tab.click() for tab in self.driver.find_elements("css selector", "[role=tab]")
                            if tab.text == name])  # fmt: skip

    def choose(self, option: str) -> None:
        """Chooses from the list that is open."""
        self.until(lambda: [found.click() for found in self.driver.find_elements("css selector", "[role=option]")
                            if found.text.strip().endswith(option)])  # fmt: skip

    def click(self, selector: str) -> None:
        self.until(lambda: self.stands_still(self(selector)) and (self(selector).click(), True)[-1])

    def stands_still(self, element) -> bool:
        """Scrolls to an element. False while it moves, as when a text box above it grows: a click could miss it."""
        return self.driver.execute_async_script(STANDS_STILL, element)

    def type(self, *keys: str) -> None:
        self("#prompt textarea").send_keys(*keys)

    def ask(self, text: str) -> None:
        self.type(text, "\n")
        self.answered()

    def prompt(self) -> str:
        return self("#prompt textarea").get_attribute("value")

    def until(self, true, seconds: float = 30):
        """Waits for a result that is true; meanwhile elements may be missing, or be drawn anew."""
        try:
            return WebDriverWait(self.driver, seconds, 0.05, [WebDriverException]).until(lambda _: true())
        except TimeoutException as error:
            boxes = self.run("return [...document.querySelectorAll('input, textarea')].map(box => box.value)")
            raise AssertionError(f"the page shows {self.text('body')!r}, its boxes hold {boxes}") from error

    def answered(self, seconds: float = 30) -> None:
        """Waits for both answers to be whole. (Gradio may show figures before it takes the button away.)"""

        def whole() -> bool:
            found = self("#send").is_displayed() and self.text("#right-figures")
            time.sleep(0.4)  # figures of an answer that grows have changed by then
            return bool(found) and self("#send").is_displayed() and self.text("#right-figures") == found

        self.until(whole, seconds)

    def requests(self) -> set[str]:
        """Hosts that the page asked for something."""
        sent = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
        return {urlsplit(url).hostname for url in urls if url.startswith("http")}
