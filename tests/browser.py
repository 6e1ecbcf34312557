"""A page in a real browser: Chromium without a window, on a machine that has it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """Chromium's path, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def shown(page: str, folder: Path, width: int = 800) -> str:
    """The document as it stands once its scripts have run."""
    return _opened(page, folder, f"--window-size={width},600").stdout


def complaints(page: str, folder: Path) -> list[str]:
    """What the browser's console says while the page is opened: faults of scripts, and what its policy refused."""
    return re.findall(r":CONSOLE[^ ]* (.*)", _opened(page, folder, "--enable-logging=stderr").stderr)


def _opened(page: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    program = browser()
    assert program is not None
    file = folder / "shown.html"
    file.write_text(page)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command = [program, *options, *more, f"--user-data-dir={folder / 'browser'}", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def answer(page: str, script: str, folder: Path, width: int = 800) -> Any:
    """What the body of a function in JavaScript returns, which runs after the page's own and is let by its policy."""
    found = re.search(r'data-answer="([^"]*)"', shown(asked(page, script), folder, width))
    assert found is not None, "the script did not run"
    return json.loads(unescape(found[1]))


def asked(page: str, script: str) -> str:
    """The page with a script that runs after its own, whose answer it keeps."""
    script = f"document.body.dataset.answer = JSON.stringify((() => {{ {script} }})());"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policed = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    assert policed != page
    return policed.replace("</body>", f"<script>{script}</script></body>")
