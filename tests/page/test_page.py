"""The page as those see it who started it from the command line: over HTTP, and in a browser."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from versions import skip_if_older

from ofadiff.page.form import Request

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: pip install ofadiff[app]"),
]

# As in a terminal, whose Ctrl-C a process in the background does not see.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ofadiff.commands.app import main
main()
"""
FIELDS = {"prompt": "a c", "label": None, "seed": 5, "steps": 2, "guidance": 2.0, "size": "0.6"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(text_to_image, tmp_path_factory):
    """The address of a page, the process that serves it, and the file of what that says of errors."""
    log = tmp_path_factory.mktemp("page") / "log"
    command = [sys.executable, "-c", COMMAND, "app", str(text_to_image), "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    said = process.stdout.readline()
    if " shows " not in said:
        pytest.fail(log.read_text())
    yield said.split(" shows ")[0], process, log
    process.kill()
    process.communicate()


@pytest.fixture
def address(server):
    return server[0]


def ask(address, event="draw", **changed):
    """What a drawing ends with: either an error's words, or the outputs of the page."""
    url = f"{address}gradio_api/call/{event}"
    # The last one is what the page remembers, which an older gradio wants from its callers too.
    data = json.dumps({"data": [*{**FIELDS, **changed}.values(), None]}).encode()
    post = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post) as answer:
        number = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{number}") as answer:
        *_, kind, last = (line for line in answer.read().decode().splitlines() if line.strip())
    return kind.removeprefix("event: "), json.loads(last.removeprefix("data: "))


def drawn(address, **changed):
    """The chosen size's title, picture and caption."""
    kind, outputs = ask(address, **changed)
    assert kind == "complete", outputs
    title, image, words = outputs[3:6]
    with urllib.request.urlopen(image["value"]["url"]) as answer:
        return title, Image.open(io.BytesIO(answer.read())), words


def apart(image, other):
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max()


def test_the_page_shows_what_the_pipeline_gives(address, playground):
    for size in playground.choices:
        title, image, words = drawn(address, size=size)
        expected = playground.draw(Request(seed=5, prompt="a c", steps=2, guidance=2.0), size)
        assert apart(image, expected.image) <= 1 and expected.title in title
        assert ("<svg" in words) == (size == "schedule fast") and "<th>parameters</th>" in words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "The prompt is empty; write what the picture shall show"),
        ({"steps": 0}, "The number of steps is 0; it must be a whole number from 1 to 1000"),
        ({"steps": "many"}, "The number of steps is 'many'; it must be a whole number from 1 to 1000"),
        ({"seed": -1}, "The seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"size": "0.7"}, "0.7"),
        ({"steps": 900}, "900 cannot be larger than"),  # what the pipeline itself says
    ],
)
def test_a_mistake_is_shown_and_the_page_goes_on(address, changed, message):
    kind, said = ask(address, **changed)
    assert kind == "error" and message in said["error"]
    assert "size 0.6" in drawn(address)[0]


def test_users_at_once_get_their_own_sizes(address, playground):
    wanted = [{"size": size, "seed": seed} for seed in range(2) for size in playground.choices]
    with ThreadPoolExecutor(len(wanted)) as users:
        pictures = [*users.map(lambda changed: drawn(address, **changed)[1], wanted)]
    for changed, picture in zip(wanted, pictures, strict=True):
        request = Request(seed=changed["seed"], prompt="a c", steps=2, guidance=2.0)
        assert apart(picture, playground.draw(request, changed["size"]).image) <= 1


def test_nobody_else_is_told(address):
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    assert address.startswith("http://127.0.0.1:")
    assert config["analytics_enabled"] is False and not config.get("share_url")
    with urllib.request.urlopen(f"{address}theme.css") as answer:
        theme = answer.read().decode()
    assert "system-ui" in theme and "@font-face" not in theme and "@import" not in theme  # fonts are the system's


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser():
    if BROWSER is None or shutil.which("chromedriver") is None:
        pytest.skip("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install ofadiff[dev]")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1360,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield started
    started.quit()


class Visitor:
    """Who looks at a page, by CSS selectors."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, selector):
        return self.wait(lambda: self.browser.find_elements("css selector", selector), selector)[0]

    def wait(self, happens, what):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = happens()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"there is no {what}; the page says {self.browser.find_element('tag name', 'body').text}")

    def write(self, field, words):
        found = self.find(field)
        found.clear()
        found.send_keys(words)

    def draw(self):
        self.find("#draw").click()

    def choose(self, size):
        labels = [label for label in self.browser.find_elements("css selector", "#size label") if label.text == size]
        labels[0].click()

    def picture(self, name, title, other_than=None):
        """The address of a panel's picture, once it has a title and is another one."""

        def shown():
            panel = self.find(f"#{name}-title").text
            images = self.browser.find_elements("css selector", f"#{name} img")
            found = images[0].get_attribute("src") if images and panel == title else None
            return found if found != other_than else None

        return self.wait(shown, f"{name} picture of {title}")


def test_a_visit(address, browser):
    visitor = Visitor(browser)
    browser.get(address)
    visitor.draw()  # nothing is written yet
    visitor.wait(lambda: "The prompt is empty" in visitor.find("body").text, "error")
    visitor.write("#prompt textarea", "a c")
    visitor.write("#steps input", "2")
    visitor.draw()
    original = visitor.picture("original", "the largest size, 1.0")
    small = visitor.picture("chosen", "size 0.6")
    assert "M (100.0%)" in visitor.find("#original-caption").text and "MACs 60." in visitor.find("#chosen-caption").text
    visitor.choose("1.0")
    large = visitor.picture("chosen", "size 1.0", other_than=small)
    visitor.choose("schedule fast")
    visitor.picture("chosen", "schedule fast", other_than=large)
    assert visitor.find("#chosen-caption svg.steps").size["height"] > 50
    assert visitor.picture("original", "the largest size, 1.0") == original  # it was not drawn again
    visitor.write("#prompt textarea", "b")
    visitor.choose("0.6")
    visitor.picture("original", "the largest size, 1.0", other_than=original)
    visitor.picture("chosen", "size 0.6", other_than=small)
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    if elsewhere and all("/iframe-resizer/" in url for url in elsewhere):
        skip_if_older("gradio", "iframe-resizer of its own, and loads it from the network")
    assert urls and not elsewhere


@pytest.mark.parametrize("path", ["/etc/passwd", ROOT / "pyproject.toml", "model_index.json"])
def test_no_file_of_the_disk_is_served(path, address):
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}gradio_api/file={path}")


def test_ctrl_c_ends_it(server):
    _, process, log = server
    said = len(log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    assert "Traceback" not in log.read_text()[said:]
