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


def shown(page: str, folder: Path) -> str:
    """The document as it stands once its scripts have run."""
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
    command = [program, *options, f"--user-data-dir={folder / 'browser'}", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def answer(page: str, script: str, folder: Path) -> Any:
    """What the body of a function in JavaScript returns, which runs after the page's own and is let by its policy."""
    script = f"document.body.dataset.answer = JSON.stringify((() => {{ {script} }})());"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policed = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    assert policed != page
    found = re.search(
        r'data-answer="([^"]*)"',
        shown(policed.replace("</body>", f"<script>{script}</script></body>"), folder),
    )
    assert found is not None, "the script did not run"
    return json.loads(unescape(found[1]))
