"""The page in a browser, headless Chromium: what it shows, how it is worked, by mouse and by keyboard, and what it never does."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask, request
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from trunkline import client, model
from trunkline.errors import InvalidInput, QueueFull, Unauthorized
from werkzeug.serving import make_server

from sidecar.bundle import write_bundle
from sidecar.http.admin import create_app
from sidecar.http.events import Feed
from sidecar.http.page import add_page
from sidecar.http.watch import Watcher
from sidecar.store import Store
from sidecar.units import NONE
from tests import zoo
from tests.integration.test_admin_http import free_port
from tests.integration.test_page import HOSTILE, Watched, picture_of
from tests.networks import Network
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, soon

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="Chromium and its driver are missing; on Debian or Ubuntu: apt-get install chromium chromium-driver",
)
# Three on one trunk, and one by itself.
NAMES = ("embed", "route", "similar", "classify")


class Browser:
    """A browser with a page in it. ``errors`` are what it complained of."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_page_load_timeout(PATIENCE_S)

    def open(self, url: str, width: int = 1280, scheme: str = "light") -> None:
        """Open a page, in a window of some pixels, where the system is light or dark."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return the text of an element, shown or not."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def cell(self, name: str, column: str) -> str:
        return self.text(f'tr[data-key="{name}"] .c-{column}')

    def until(self, holds: Callable[[], object]) -> None:
        deadline = soon()
        while not holds():
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.05)

    def until_live(self) -> None:
        self.until(lambda: self.text("#status") == "live")

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """Say what has the focus: its text, or what it is called."""
        return str(self.run("const e = document.activeElement; return e.getAttribute('aria-label') ?? e.textContent"))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser whose page complained of nothing in the end: no mistake of its script's, nothing its policy forbids."""
    chromium.errors()
    yield chromium
    assert chromium.errors() == []


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[Network]:
    # Layers of half a megabyte: a block each.
    source = zoo.mlp(inside=380, width=380, outside=380)
    found = zoo.packed(source, "embed")
    trunk = Network(found.bundle, {digest: bytes(content) for digest, content in found.blobs}, source)
    alone = zoo.mlp(inside=380, width=380, outside=380, seed=8)
    other = zoo.packed(alone, "classify")
    single = Network(other.bundle, {digest: bytes(content) for digest, content in other.blobs}, alone)
    return [trunk, trunk.tuned("similar", 1), trunk.tuned("route", 2), single]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, networks: list[Network]) -> Iterator[SidecarProcess]:
    folder = tmp_path_factory.mktemp("page")
    port = free_port()
    with sidecar_process(folder, "--admin-port", str(port)) as running:
        running.url = f"http://127.0.0.1:{port}/"  # type: ignore[attr-defined]
        for each in networks:
            write_bundle(folder / each.name, each.bundle, list(each.blobs.items()))
            running.admin.push(folder / each.name)
        yield running


@pytest.fixture
def url(sidecar: SidecarProcess) -> str:
    return str(sidecar.url)  # type: ignore[attr-defined]


def asked(sidecar: SidecarProcess, monkeypatch: pytest.MonkeyPatch, each: Network) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(sidecar.socket))
    client._pool.close()
    model(each.name).call(each.inputs(1))
    client._pool.close()


@contextlib.contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve an application while the block runs; gives its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        app.extensions["feed"].close()
        server.shutdown()
        thread.join()
        server.server_close()


# --- a real sidecar ---------------------------------------------------------------------------------------------------


def test_it_draws_the_models_and_the_trunk_that_they_share(browser: Browser, url: str) -> None:
    # Before any script.
    html = requests.get(url, timeout=PATIENCE_S).text
    assert all(f'data-key="{name}"' in html for name in NAMES)
    assert html.count('class="run') >= 6
    browser.open(url)
    browser.until_live()
    assert sorted(row.get_attribute("data-key") or "" for row in browser.all("#model-rows tr")) == sorted(NAMES)
    lanes = [lane.text for lane in browser.all(".lanes li")]
    assert sorted(lanes) == sorted(NAMES)
    shared, own = browser.all(".run.shared"), browser.all(".run:not(.shared)")
    assert shared
    assert len(own) >= 4
    assert shared[0].size["height"] > own[0].size["height"]
    webdriver.ActionChains(browser.driver).move_to_element(shared[0]).perform()
    detail = browser.text("#detail")
    assert detail.startswith("shared by 3")
    assert all(name in detail for name in ("embed", "route", "similar"))
    assert "classify" not in detail
    assert [lane.text for lane in browser.all(".lanes .through")] == [name for name in lanes if name != "classify"]
    # As wide as its bytes say: a layer of weights is wider than one without.
    assert browser.run("return getComputedStyle(document.querySelector('.run .disk')).fill") != "none"


def test_a_call_is_seen(
    browser: Browser, sidecar: SidecarProcess, url: str, networks: list[Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar.admin.post("models/classify/evict")
    browser.open(url)
    browser.until_live()
    browser.until(lambda: browser.cell("classify", "state") == "on disk")
    before = len(browser.all("#moves .fetched"))
    asked(sidecar, monkeypatch, networks[3])
    browser.until(lambda: browser.cell("classify", "state") == "in memory")
    browser.until(lambda: browser.cell("classify", "p50") not in ("", NONE))
    assert len(browser.all("#moves .fetched")) > before
    assert "for classify" in browser.text("#moves .fetched")
    browser.until(lambda: browser.cell("classify", "rate") not in (NONE, "0/s"))
    # The width of what is in memory follows.
    place = [lane.text for lane in browser.all(".lanes li")].index("classify")
    widths = browser.run(
        "return [...document.querySelectorAll('.run:not(.bare)')].map(g => [g.ariaLabel ?? g.getAttribute('aria-label'),"
        " +g.querySelector('.disk').getAttribute('width'), +g.querySelector('.device').getAttribute('width')])"
    )
    own = [(whole, resident) for label, whole, resident in widths if "classify" in label]
    assert own, place
    assert all(whole == resident for whole, resident in own)


def test_a_model_is_pinned_once_it_was_confirmed(browser: Browser, sidecar: SidecarProcess, url: str) -> None:
    def is_pinned() -> bool:
        return bool(sidecar.admin.get("models/similar")["pinned"])

    browser.open(url)
    browser.until_live()
    button = '#model-rows tr[data-key="similar"] [data-action="pin"]'
    browser.until(lambda: browser.one(button).is_enabled())
    browser.one(button).click()
    assert browser.text("#confirm-title") == "Pin similar?"
    browser.one("#confirm-no").click()
    assert not browser.one("#confirm").is_displayed()
    browser.one(button).click()
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.one("#confirm").is_displayed())
    assert not is_pinned()
    # And by keyboard alone: the question has the focus, and gives it back.
    browser.run("arguments[0].focus()", browser.one(button))
    browser.press(Keys.ENTER)
    assert browser.focused() == "Cancel"
    browser.press(Keys.TAB)
    assert browser.focused() == "Pin"
    browser.press(Keys.ENTER)
    browser.until(is_pinned)
    browser.until(lambda: "pinned" in browser.cell("similar", "state"))
    browser.until(lambda: browser.text("#told") == "Pin similar: done.")
    browser.until(lambda: browser.focused() == "Unpin similar")
    assert not browser.one('#model-rows tr[data-key="similar"] [data-action="evict"]').is_displayed()
    browser.until(lambda: browser.all(".run.pinned"))
    browser.press(Keys.ENTER)
    browser.one("#confirm-yes").click()
    browser.until(lambda: not is_pinned())


def test_what_the_engine_refuses_is_told(browser: Browser, sidecar: SidecarProcess, url: str) -> None:
    browser.open(url)
    browser.until_live()
    sidecar.admin.post("models/route/load")
    browser.until(lambda: browser.one('#model-rows tr[data-key="route"] [data-action="evict"]').is_displayed())
    browser.one('#model-rows tr[data-key="route"] [data-action="evict"]').click()
    # Meanwhile somebody else has pinned it.
    sidecar.admin.post("models/route/pin")
    browser.one("#confirm-yes").click()
    browser.until(lambda: "route is pinned; unpin it first" in browser.text("#told"))
    sidecar.admin.post("models/route/unpin")
    assert any("400" in error for error in browser.errors())


def test_an_engine_that_is_away_is_told_and_the_next_one_found(browser: Browser, sidecar: SidecarProcess, url: str) -> None:
    status = sidecar.admin.get("status")["engine"]
    browser.open(url)
    browser.until_live()
    # As long as it holds its connections and answers nothing, it is away; its rows stay to be read.
    os.kill(status["pid"], signal.SIGSTOP)
    browser.until(lambda: browser.text("#status") == "engine away")
    assert browser.one("#banner").is_displayed()
    assert "does not answer" in browser.text("#banner")
    assert len(browser.all("#model-rows tr")) == len(NAMES)
    assert not browser.one("#drain").is_enabled()
    # Whoever comes now is told, too, before any script.
    assert "The engine does not answer" in requests.get(url, timeout=PATIENCE_S).text
    os.kill(status["pid"], signal.SIGKILL)
    browser.until_live()
    assert not browser.one("#banner").is_displayed()
    browser.until(lambda: f"engine {status['generation'] + 1}" in browser.text(".node"))
    browser.until(lambda: len(browser.all("#model-rows tr")) == len(NAMES))


def test_the_http_worker_may_die(browser: Browser, sidecar: SidecarProcess, url: str) -> None:
    browser.open(url)
    browser.until_live()
    engine = sidecar.admin.get("status")["engine"]["pid"]
    for child in Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children").read_text().split():
        if int(child) != engine:
            os.kill(int(child), signal.SIGKILL)
    browser.until(lambda: browser.text("#status") == "not connected")
    browser.until_live()
    # That it could not connect meanwhile is the browser's to say.
    assert all("net::ERR" in error for error in browser.errors())


def test_it_is_light_or_dark(browser: Browser, url: str) -> None:
    def shade() -> int:
        colour = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(",")[:3])

    browser.open(url, scheme="dark")
    dark = shade()
    browser.open(url, scheme="light")
    assert dark < 150 < 600 < shade()
    browser.one("#theme").click()
    assert shade() == dark
    browser.open(url, scheme="light")
    assert shade() == dark
    browser.one("#theme").click()
    assert shade() > 600
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(browser: Browser, url: str, width: int) -> None:
    browser.open(url, width)
    browser.until_live()
    wide = browser.run(
        "const w = document.documentElement.clientWidth; return [...document.querySelectorAll('body *')]"
        ".filter(e => e.getClientRects().length && e.getBoundingClientRect().right > w + 1 && !e.closest('.skip'))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert all(button.size["height"] >= 24 for button in browser.all("button") if button.is_displayed())


def test_it_is_worked_by_keyboard(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until_live()
    browser.press(Keys.TAB)
    assert browser.focused() == "To the models"
    seen = []
    while not seen or "Model" not in seen[-1]:
        browser.press(Keys.TAB)
        seen.append(browser.focused())
        assert len(seen) < 20, seen
        outline = browser.run(
            "const s = getComputedStyle(document.activeElement.querySelector('rect') ?? document.activeElement);"
            "return [s.outlineStyle, s.outlineWidth, s.strokeWidth]"
        )
        assert outline[0] != "none" or outline[2] in ("2.5px", "5px"), (seen, outline)
    assert seen[:2] == ["Drain", "Light or dark"]
    # The graph is one stop, whatever there is in it.
    assert sum("block" in each for each in seen) == 1
    heads = [head.text for head in browser.all("#models thead button")]
    browser.press(Keys.TAB, Keys.TAB)
    assert browser.focused() == "Size"
    browser.press(Keys.ENTER)
    assert browser.one("#models th.c-bytes").get_attribute("aria-sort") == "descending"
    assert browser.one("#models th.c-name").get_attribute("aria-sort") == "none"
    assert len(heads) == 11
    browser.run("arguments[0].click()", browser.one("#models th.c-name button"))
    names = [row.get_attribute("data-key") for row in browser.all("#model-rows tr")]
    assert names == sorted(NAMES)
    browser.run("arguments[0].click()", browser.one("#models th.c-name button"))
    assert [row.get_attribute("data-key") for row in browser.all("#model-rows tr")] == names[::-1]


def test_arrow_keys_go_from_block_to_block(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until_live()
    browser.run("document.querySelector('.run.shared').focus()")
    first = browser.focused()
    assert "shared by 3" in browser.text("#detail")
    path = [first]
    while True:
        browser.press(Keys.ARROW_RIGHT)
        if browser.focused() == path[-1]:
            break
        path.append(browser.focused())
    assert len(path) >= 3
    assert browser.text("#detail").startswith("one model")
    for back in path[-2::-1]:
        browser.press(Keys.ARROW_LEFT)
        assert browser.focused() == back
    browser.press(Keys.ARROW_UP)
    up = browser.focused()
    browser.press(Keys.ARROW_DOWN)
    browser.press(Keys.ARROW_DOWN)
    assert browser.focused() != up
    assert len(browser.all('.run[tabindex="0"]')) == 1


# --- what no sidecar says ----------------------------------------------------------------------------------------------


class Refusing(Watched):
    """An engine that refuses what it is told to do, in strange words."""

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        if name == "pin":
            raise InvalidInput(f"no: {HOSTILE}")
        return super().command(name, arguments)


def test_what_strangers_wrote_is_shown_and_does_nothing(browser: Browser, tmp_path: Path) -> None:
    engine = Refusing("fine", HOSTILE, "</script><script>alert(2)</script>")
    engine.documents["cpu"]["engine"]["torch"] = HOSTILE
    # Neither is pinned, so that they can be.
    for each in engine.documents["cpu"]["models"].values():
        each["pinned"] = False
    with served(create_app(engine, Store(tmp_path / "store"))) as url:
        browser.open(url)
        browser.until_live()
        assert browser.all("main img, main script, tr img") == []
        assert HOSTILE in [row.get_attribute("data-key") for row in browser.all("#model-rows tr")]
        assert HOSTILE in [lane.text for lane in browser.all(".lanes li")]
        assert HOSTILE in browser.text(".node")
        for label in browser.all("#model-rows tr:not(.corrupt)"):
            label.find_element(By.CSS_SELECTOR, '[data-action="pin"]').click()
            browser.one("#confirm-yes").click()
            browser.until(lambda: not browser.one("#confirm").is_displayed())
            browser.until(lambda: browser.one("#told").is_displayed())
        assert browser.run("return document.querySelectorAll('#told *').length") == 0
        fine = browser.one('#model-rows tr[data-key="fine"] [data-action="pin"]')
        browser.until(fine.is_enabled)
        fine.click()
        browser.one("#confirm-yes").click()
        browser.until(lambda: HOSTILE in browser.text("#told"))
        browser.open("about:blank")
    assert all("status of 4" in error for error in browser.errors())


def page_alone(engine: Any, role: Callable[[], str] = lambda: "operate") -> Flask:
    """Return an application that has the page, and nothing besides."""
    app = Flask("trunkline", static_folder=None)
    add_page(app, Feed(Watcher(engine).look, period_s=0.05, beat_s=0.2), role)
    return app


def test_a_token_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    roles = {"Bearer looker": "read", "Bearer operator": "operate"}

    def role() -> str:
        return roles.get(request.headers.get("Authorization", ""), "")

    app = page_alone(Watched("m"), role)

    @app.before_request
    def check() -> None:
        if request.path.startswith("/admin/") and not role():
            raise Unauthorized("this needs a token that counts")

    app.register_error_handler(Unauthorized, lambda error: ({"error": error.to_dict()}, 401))
    with served(app) as url:
        assert 'data-key="m"' not in requests.get(url, timeout=PATIENCE_S).text
        browser.open(url)
        browser.until(lambda: browser.one("#login").is_displayed())
        assert not browser.one("#models").is_displayed()
        browser.one("#token").send_keys("wrong", Keys.ENTER)
        browser.until(lambda: "needs a token that counts" in browser.text("#told"))
        browser.until(lambda: browser.one("#login").is_displayed())
        browser.one("#token").send_keys("looker", Keys.ENTER)
        browser.until_live()
        assert browser.cell("m", "name") == "m"
        # Whoever may look may press nothing.
        assert not any(button.is_enabled() for button in browser.all("[data-action], #drain, #resume"))
        assert browser.run("return [document.cookie, localStorage.length, location.href]") == ["", 0, url]
        browser.run("sessionStorage.setItem('trunkline-token', 'operator')")
        browser.driver.refresh()
        browser.until_live()
        browser.until(lambda: browser.one("#drain").is_enabled())
        browser.run("sessionStorage.clear()")
        browser.open("about:blank")
    assert all("401" in error for error in browser.errors())


def test_a_sidecar_is_drained_and_goes_on(browser: Browser) -> None:
    engine = Watched("m")
    app = page_alone(engine)
    bodies = []

    @app.post("/admin/v1/drain")
    def drain() -> dict[str, object]:
        bodies.append((request.mimetype, request.get_json(), request.headers["Origin"]))
        engine.documents["cpu"]["engine"]["draining"] = True
        return {}

    with served(app) as url:
        browser.open(url)
        browser.until_live()
        browser.until(lambda: browser.one("#drain").is_enabled())
        browser.one("#drain").click()
        assert "finishes those it has" in browser.text("#confirm-text")
        browser.one("#confirm-yes").click()
        browser.until(lambda: browser.text("#status") == "draining")
        assert bodies == [("application/json", {}, url.rstrip("/"))]
        # One that is older than the page has no such route.
        browser.until(lambda: browser.one("#resume").is_displayed())
        browser.one("#resume").click()
        browser.one("#confirm-yes").click()
        browser.until(lambda: "has no such route" in browser.text("#told"))
        browser.open("about:blank")
    assert all("404" in error for error in browser.errors())


def test_one_page_too_many_waits_for_its_turn(browser: Browser) -> None:
    app = page_alone(Watched("m"))
    feed = app.extensions["feed"]
    feed._most_viewers = 0
    app.register_error_handler(QueueFull, lambda error: ({"error": error.to_dict()}, 503, {"Retry-After": "1"}))
    with served(app) as url:
        browser.open(url)
        browser.until(lambda: "0 pages are open here" in browser.text("#banner"))
        # What was rendered stays to be read.
        assert browser.cell("m", "name") == "m"
        feed._most_viewers = 8
        browser.until_live()
        browser.open("about:blank")
    assert all("503" in error for error in browser.errors())


def test_many_models_and_blocks_stay_usable(browser: Browser) -> None:
    names = [f"model-{number:03}" for number in range(300)]
    engine = Watched(*names)
    picture = picture_of(*names)
    picture["block_count"] = 10_000
    engine.answers["picture"]["devices"]["cpu"] = picture
    with served(page_alone(engine)) as url:
        browser.open(url)
        browser.until_live()
        assert len(browser.all(".run")) == 301
        assert "10000 blocks, drawn as 301" in browser.text("#graph-note")
        assert len(browser.all("#model-rows tr")) == 301
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        # Changes still come, one after the other.
        engine.documents["cpu"]["models"]["model-007"]["leases"] = 3
        browser.until(lambda: "in use" in browser.cell("model-007", "state"))
        browser.until(lambda: len(browser.all(".run.used")) == 3)
        browser.open("about:blank")
