"""How templates become pages: all texts are escaped, and no script can run but ours.

A page's policy names that script by its hash: a text that got out as a script could not run, nor could anything be
loaded. Where scripts do not run at all, tables do not sort; the rest is there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined

from rlspec.report import chart
from rlspec.report.csv_link import csv_link


def rendered(template: str, facts: Mapping[str, Any]) -> str:
    """The text of a page from its facts.

    Args:
        template: one of this package, or ``study/page.html.jinja``.
        facts: what it names; ``branches``, for the legends of its charts, is none where it is not among them.
    """
    found = environment()
    script = found.get_template("sort.js").render().encode()
    own = {
        "frame": chart,
        "csv_link": csv_link,
        "script_hash": base64.b64encode(hashlib.sha256(script).digest()).decode(),
        "branches": [],
    }
    return found.get_template(template).render({**own, **facts})


@cache
def environment() -> Environment:
    """Of all templates: a text stays a text."""
    study = PrefixLoader({"study": PackageLoader("rlspec", "study")})
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("rlspec", "report"), study]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = lambda value: f"{value:.1f}"
    return environment
