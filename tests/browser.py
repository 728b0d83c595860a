"""A real browser without a window, for tests of pages; and a model that says one given text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

WAIT = 60  # seconds after which something that should be on the page has failed to come
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver") and find_spec("selenium")),
    reason="needs chromium, chromedriver and the package selenium",
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Browser:
    """One window, with what a user does in it."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, url: str) -> None:
        self.driver.get(url)

    def size(self, width: int, height: int, finger: bool = False) -> None:
        """The window as a screen of this size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": finger}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": finger})

    def colours(self, scheme: str) -> None:
        """What the system prefers: dark or light."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        (found,) = self.all(css)
        return found

    def texts(self, css: str) -> list[str]:
        """As they stand in the document, blanks and all."""
        return [each.get_property("textContent") for each in self.all(css)]

    def run(self, script: str, *words: Any) -> Any:
        return self.driver.execute_script(script, *words)

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        """What is true at last."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, WAIT, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _driver: ready(), what)

    def keys(self, *keys: str) -> None:
        """Typed where the cursor is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def fill(self, css: str, text: str) -> None:
        """A field's value, as if typed; `change` is heard."""
        field = self.one(css)
        field.clear()
        field.send_keys(text)

    def choose(self, css: str, name: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.one(css)).select_by_visible_text(name)

    def requested(self) -> list[str]:
        """Addresses of all requests since this was last asked."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since this was last asked, such as those of the page's policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """One that has been nowhere yet; its files and downloads are in `folder`."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options, downloads = ChromeOptions(), folder / "downloads"
    downloads.mkdir()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver, downloads)
    finally:
        driver.quit()


def make_parrot(folder: Path, text: str, positions: int = 512) -> Path:
    """A checkpoint whose answer is this text, over and over: what it says depends on the place alone."""
    tokenizer = tiny_tokenizer()  # one token a byte
    said = tokenizer(text)["input_ids"]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=len(said), n_layer=1, n_head=1, n_inner=8,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
        for place in range(positions):
            model.transformer.wpe.weight[place, place % len(said)] = 1
        for place, token in enumerate(said):
            model.lm_head.weight[token, place] = 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
