"""A page in headless Chromium, over the DevTools protocol on a pipe: no port, no network, no dependency."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120  # seconds


class Browser:
    """One tab.

    Args:
        profile: empty folder.

    ``events`` holds whatever the tab reported: console messages, exceptions, log entries, requests.
    """

    def __init__(self, profile):
        (to_browser, self._write), (self._read, from_browser) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # Chromium reads commands from descriptor 3 and writes to 4; the shell puts ours there, whatever their numbers
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", CHROMIUM, *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium did not answer within {PATIENCE} s"
            found = os.read(self._read, 1 << 20)
            assert found, "Chromium ended"
            self._buffer += found
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, file):
        """Open a file and wait until it is loaded."""
        self("Page.navigate", url=file.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while self.run("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < end, "the page did not load"
            time.sleep(0.05)

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def emulate(self, width=1280, height=800, scheme="light", media="screen"):
        """Size of the window, light or dark, screen or print."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, whole=True):
        """PNG bytes of the page, or of what the window shows of it."""
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self):
        """The page printed, as bytes."""
        return base64.b64decode(self("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])

    def named(self, method):
        """Parameters of all events of that name so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self):
        """End the browser."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(30)
