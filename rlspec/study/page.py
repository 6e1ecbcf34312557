"""report.html of a study: what was found, self-contained, as the page of a run is; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence

from rlspec.io.files import write_atomically
from rlspec.report.pages import rendered
from rlspec.study.cells import Study
from rlspec.study.findings.section import Section
from rlspec.study.folder import StudyFolder


def write_page(study: Study, folder: StudyFolder, sections: Sequence[Section]) -> None:
    """Write ``report.html`` into the study's folder."""
    page = render(study, sections).encode(errors="replace")
    write_atomically(folder.path / "report.html", page)


def render(study: Study, sections: Sequence[Section]) -> str:
    """The page's HTML."""
    facts = {
        "plan": study.plan,
        "model": str(study.cells[0].settings["model"]),
        "seeds": list(dict.fromkeys(str(cell.settings["seed"]) for cell in study.cells)),
        "cells": len(study.cells),
        "sections": sections,
    }
    return rendered("study/page.html.jinja", facts)
