"""Open report.html in headless Chromium: python tests/browser/check_report.py RUN [--output FOLDER]

RUN is a run folder, or an HTML file. Takes pictures of the page in light, in dark, at 375 px and in print. Exit code 1
for a message on the console, a request to anywhere, a script, or a page that scrolls sideways. Needs `chromium` on the
path (Debian: apt-get install chromium); pytest does not collect it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# name -> (width in px, colour scheme)
VIEWS = {
    "light": (1280, "light"),
    "dark": (1280, "dark"),
    "phone": (375, "light"),
    "phone_dark": (375, "dark"),
}


class Browser:
    """One page of a Chromium that is spoken to over the pipe of its DevTools protocol."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to = os.fdopen(to_browser, "wb")
        self._from = os.fdopen(from_browser, "rb")
        self._last_id = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        """Everything that the page said or asked for, in order."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer; events that come meanwhile are kept."""
        call_id = self._send(method, parameters)
        while True:
            answer = self._read()
            if answer.get("id") == call_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def wait_for(self, event: str) -> None:
        while all(seen["method"] != event for seen in self.events):
            self._read()

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        return self._last_id

    def _read(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("chromium ended; run it by hand to see why")
            raw += byte
        message = dict(json.loads(raw))
        if "method" in message:
            self.events.append(message)
        if message.get("method") == "Page.javascriptDialogOpening":  # the page would wait for an answer for ever
            self._send("Page.handleJavaScriptDialog", {"accept": False})
        return message


@contextmanager
def chromium() -> Iterator[Browser]:
    to_browser, from_browser = os.pipe(), os.pipe()
    # The protocol's pipe is file descriptors 3 and 4 of the browser.
    redirected = f'exec chromium "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen(
            ["bash", "-c", redirected, "chromium", *options],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            process.terminate()
            process.wait()


def problems_of(events: list[dict[str, Any]], page: str) -> list[str]:
    """What a page that stands alone never does."""
    problems = []
    for event in events:
        method, parameters = event["method"], event["params"]
        if method == "Log.entryAdded":
            problems.append(f"console: {parameters['entry']['text']}")
        elif method == "Runtime.consoleAPICalled":
            problems.append(f"console: {[argument.get('value') for argument in parameters['args']]}")
        elif method == "Runtime.exceptionThrown":
            problems.append(f"exception: {parameters['exceptionDetails']['text']}")
        elif method == "Network.requestWillBeSent" and parameters["request"]["url"] != page:
            problems.append(f"request: {parameters['request']['url']}")
        elif method == "Page.javascriptDialogOpening":
            problems.append(f"script: a dialog opened: {parameters['message']}")
    return problems


def check(page: str, output: Path) -> list[str]:
    """Take the pictures; returns the problems."""
    with chromium() as browser:
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.call(f"{domain}.enable")
        problems = []
        for name, (width, scheme) in VIEWS.items():
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
            )
            if name == "light":
                browser.call("Page.navigate", url=page)
                browser.wait_for("Page.loadEventFired")
            script = "[document.documentElement.scrollWidth, document.scripts.length]"
            measured = browser.call("Runtime.evaluate", expression=script, returnByValue=True)
            scroll_width, num_scripts = measured["result"]["value"]
            if scroll_width > width:
                problems.append(f"{name}: the page is {scroll_width} px wide on {width} px: it scrolls sideways")
            if num_scripts:
                problems.append(f"script: the page holds {num_scripts}")
            picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)
            (output / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))
        printed = browser.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        (output / "print.pdf").write_bytes(base64.b64decode(printed["data"]))
        return list(dict.fromkeys(problems + problems_of(browser.events, page)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the pictures; default: a new one")
    arguments = parser.parse_args()
    file = arguments.run / "report.html" if arguments.run.is_dir() else arguments.run
    output = arguments.output or Path(tempfile.mkdtemp(prefix="report-"))
    output.mkdir(parents=True, exist_ok=True)
    problems = check(file.resolve(strict=True).as_uri(), output)
    print(f"pictures in {output}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
