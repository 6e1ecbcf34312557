"""report.html of a study: what was found, self-contained, as the page of a run is; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined
from jinja2.loaders import ChoiceLoader

from rlspec.io.files import write_atomically
from rlspec.report import chart
from rlspec.study.cells import Study
from rlspec.study.findings.section import Section
from rlspec.study.folder import StudyFolder


def write_page(study: Study, folder: StudyFolder, sections: Sequence[Section]) -> None:
    """Write ``report.html`` into the study's folder."""
    page = render(study, sections).encode(errors="replace")
    write_atomically(folder.path / "report.html", page)


def render(study: Study, sections: Sequence[Section]) -> str:
    """The page's HTML."""
    own = PrefixLoader({"study": PackageLoader("rlspec.study", "")})
    environment = Environment(
        loader=ChoiceLoader([own, PackageLoader("rlspec", "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = lambda value: f"{value:.1f}"
    return environment.get_template("study/page.html.jinja").render(
        plan=study.plan,
        model=str(study.cells[0].settings["model"]),
        seeds=list(dict.fromkeys(str(cell.settings["seed"]) for cell in study.cells)),
        cells=len(study.cells),
        sections=sections,
        frame=chart,
        branches=[],
    )
