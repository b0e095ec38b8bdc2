"""A headless Chromium, driven over its own protocol (CDP); shared by tests of pages.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request

import websockets.sync.client

NAMES = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_S = 120.0
FLAGS = ("--headless=new", "--no-sandbox", "--no-first-run", "--mute-audio", "--hide-scrollbars")


class Browser:
    """One page. `with Browser(folder) as page: page.open(url); page.ask("document.title")`."""

    def __init__(self, folder, size=(1100, 760), flags=("--disable-gpu",)):
        self._folder, self._size, self._flags, self._numbers = folder, size, flags, itertools.count(1)

    def __enter__(self):
        program = next((path for name in NAMES if (path := shutil.which(name))), None)
        assert program, "no browser: apt-get install chromium, or run pytest with -m 'not browser'"
        window = f"--window-size={self._size[0]},{self._size[1]}"
        where = [f"--user-data-dir={self._folder}", "--remote-debugging-port=0", window, "about:blank"]
        self._log = (self._folder / "log").open("w+")
        self._process = subprocess.Popen(
            [program, *FLAGS, *self._flags, *where], stdout=self._log, stderr=subprocess.STDOUT
        )
        port = self._wait(lambda: re.search(r"ws://127\.0\.0\.1:(\d+)/", (self._folder / "log").read_text()))[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            (target,) = [page for page in json.load(answer) if page["type"] == "page"]
        self._socket = websockets.sync.client.connect(
            target["webSocketDebuggerUrl"], max_size=None, compression=None, open_timeout=DEADLINE_S
        )
        return self

    def __exit__(self, *exc_info):
        self._socket.close()
        self._process.terminate()
        self._process.wait(DEADLINE_S)
        self._log.close()

    def open(self, url):
        self._do("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def ask(self, expression):
        """Value of a JavaScript expression."""
        answer = self._do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression):
        """Waits until an expression is true."""
        return self._wait(lambda: self.ask(expression), expression)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self._do("Page.captureScreenshot", format="png")["data"]))

    def _do(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(DEADLINE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    @staticmethod
    def _wait(condition, what="the browser"):
        end = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            assert time.monotonic() < end, f"waited for {what}"
            time.sleep(0.05)
        return value
