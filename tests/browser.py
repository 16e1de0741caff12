"""A headless Chromium that opens pages from files, without a network.

It is driven through the DevTools protocol over a pipe (`--remote-debugging-pipe`): JSON
between NUL bytes on the descriptors 3 and 4 of the browser.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
    "--force-color-profile=srgb",
)
# The browser wants the pipes at 3 and 4, where this process may have something else.
START = """
import os, sys
read, write = (os.dup2(int(x), 100 + int(x)) for x in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 120  # for one answer
WIDTHS = (1280, 390)
# What sticks out of the window, other than inside a box that scrolls by itself.
STICKS_OUT = """
(() => {
  const boxed = e => { for (let p = e.parentElement; p; p = p.parentElement) {
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) &&
        p !== document.body && p !== document.documentElement) return true; }
    return false; };
  const out = [...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 0.5 && !boxed(e));
  return JSON.stringify({
    inner: innerWidth, scroll: document.scrollingElement.scrollWidth,
    out: out.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    broken: [...document.images].filter(i => !i.naturalWidth).length });
})()
"""


def find() -> str | None:
    """The path of a browser: one on PATH, else one that Playwright keeps."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    kept = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or "~/.cache/ms-playwright"
    for name in ("chrome", "headless_shell", "chrome-headless-shell"):
        found = sorted(Path(kept).expanduser().glob(f"chromium*/*/{name}"))
        if found:
            return str(found[-1])
    return None


def fits(*pages: Path) -> None:
    """Asserts that pages are shown at each of WIDTHS without a word on the console, a
    request, a broken picture or anything that sticks out of the window. Skips the
    test where there is no browser."""
    path = find()
    if path is None:
        pytest.skip(f"no browser: PATH has none of {', '.join(NAMES)}")
    with Browser(path) as window:
        for page in pages:
            for width in WIDTHS:
                found = window.look(page, width)
                assert found["messages"] == [] and found["requests"] == [], found
                assert found["inner"] == width and found["scroll"] <= width, found
                assert found["out"] == [] and found["broken"] == 0, found


class Browser:
    """`with Browser() as browser: browser.look(page, 390)`."""

    def __init__(self, path: str):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        command = [sys.executable, "-c", START, str(read), str(write), path, *FLAGS]
        command.append(f"--user-data-dir={self._folder.name}")
        if os.name == "posix" and os.geteuid() == 0:
            command.append("--no-sandbox")
        self._process = subprocess.Popen(
            command,
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self._number, self._rest, self._events = 0, b"", []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in (self._out, self._in):
            os.close(descriptor)
        try:
            self._process.wait(10)  # it ends where its pipe does
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def look(self, page: Path, width: int, picture: Path | None = None) -> dict:
        """The page in a window of `width` CSS pixels.

        Returns:
            "messages": what its console says and what goes wrong, "requests": what it
            asks for that is no part of it; "inner" and "scroll": widths of the window
            and of what can be scrolled to; "out": elements that stick out of the
            window; "broken": pictures that cannot be shown.
        """
        made = self._ask("Target.createTarget", url="about:blank")
        attached = self._ask(
            "Target.attachToTarget", targetId=made["targetId"], flatten=True
        )
        session = attached["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", session)
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self._ask("Emulation.setDeviceMetricsOverride", session, **size)
        address = page.resolve().as_uri()
        if wrong := self._ask("Page.navigate", session, url=address).get("errorText"):
            raise RuntimeError(f"{page}: {wrong}")
        while not self._happened("Page.loadEventFired"):
            self._receive()
        answer = self._ask("Runtime.evaluate", session, expression=STICKS_OUT)
        found = json.loads(answer["result"]["value"])
        if picture is not None:
            shot = self._ask(
                "Page.captureScreenshot", session, captureBeyondViewport=True
            )
            picture.write_bytes(base64.b64decode(shot["data"]))
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        found["messages"] = [e["params"] for e in self._happened(*said)]
        urls = [
            e["params"]["request"]["url"]
            for e in self._happened("Network.requestWillBeSent")
        ]
        found["requests"] = [
            url for url in urls if url != address and not url.startswith("data:")
        ]
        self._ask("Target.closeTarget", targetId=made["targetId"])
        return found

    def _happened(self, *methods):
        return [event for event in self._events if event["method"] in methods]

    def _ask(self, method: str, session: str | None = None, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict:
        """The next message; an event is kept as well."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            left = max(0, end - time.monotonic())
            ready, _, _ = select.select([self._in], [], [], left)
            part = os.read(self._in, 2**16) if ready else b""
            if not part:
                code = self._process.poll()
                raise RuntimeError(f"the browser says nothing more (exit code {code})")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
