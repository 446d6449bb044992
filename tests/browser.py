"""Headless Chromium, for tests of pages and for looking at them.

python tests/browser.py PAGE.html --out FOLDER     pictures, in light and dark, 1280 and 390 pixels wide, and problems
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: Seconds that the browser may take for one answer.
PATIENCE = 60.0

# What must not be: a page wider than its window, a box whose content sticks out without a way to scroll there, two ids
# that are equal, references to nothing.
_PROBLEMS = """(() => {
  const found = [], root = document.documentElement, width = root.clientWidth;
  if (root.scrollWidth > width) found.push(`the page is ${root.scrollWidth} wide in a window of ${width}`);
  const scrolls = e => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') && e.tagName !== 'svg') continue;
    const box = e.getBoundingClientRect();
    if ((box.right > width + 1 || box.left < -1) && box.width && !scrolls(e))
      found.push(`<${e.tagName.toLowerCase()}> reaches from ${Math.round(box.left)} to ${Math.round(box.right)}`);
  }
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) found.push(`id ${id} is there twice`);
  for (const e of document.querySelectorAll('svg text')) {
    const box = e.getBoundingClientRect(), svg = e.closest('svg').getBoundingClientRect();
    if (box.left < svg.left - 2 || box.right > svg.right + 2 || box.top < svg.top - 2 || box.bottom > svg.bottom + 2)
      found.push(`the text "${e.textContent}" is cut off`);
  }
  return found;
})()"""


class Browser:
    """A running Chromium with one tab. errors: what its console has reported of the present page."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, fro: int) -> None:
        self._process, self._to, self._from = process, to, fro
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> list[str]:
        """Loads a file into a window of the given size in CSS pixels; returns the page's faults, with the console's
        errors."""
        self.errors, self._events = [], []
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take(until)
        self.value("document.querySelectorAll('details').forEach(e => e.open = true)")
        found: list[str] = self.value(_PROBLEMS)
        return self.errors + found

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression on the page, decoded from JSON."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ValueError(f"{script[:60]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._take(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _take(self, until: float) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._buffer:
            os.set_blocking(self._from, False)
            try:
                part = os.read(self._from, 1 << 20)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"Chromium did not answer in {PATIENCE:.0f} s") from None
                time.sleep(0.005)
                continue
            if not part:
                raise RuntimeError(f"Chromium ended with exit code {self._process.wait()}")
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value")) for part in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


@contextmanager
def browser() -> Iterator[Browser]:
    """A Browser that ends with the block. RuntimeError where there is no Chromium."""
    if CHROMIUM is None:
        raise RuntimeError("there is no chromium: apt-get install chromium")
    to_read, to_write = os.pipe()
    fro_read, fro_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads from file descriptor 3 and writes to 4: a shell gives it the pipes under these numbers.
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
        command = f'exec "$0" {options} --remote-debugging-pipe --user-data-dir="$1" 3<&{to_read} 4>&{fro_write}'
        process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, profile],
            pass_fds=(to_read, fro_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(fro_write)
        try:
            yield Browser(process, to_write, fro_read)
        finally:
            os.close(to_write)
            os.close(fro_read)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures (default: .)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with browser() as seen:
        for page in options.pages:
            for dark in (False, True):
                for width in (1280, 390):
                    problems = seen.open(page, width=width, dark=dark)
                    path = options.out / f"{page.stem}_{'dark' if dark else 'light'}_{width}.png"
                    seen.screenshot(path)
                    print(path, *problems, sep="\n  ")
                    wrong += len(problems)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
