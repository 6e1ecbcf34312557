"""What the cells of a plan say, in sentences, tables and charts."""

from __future__ import annotations

from rlspec.study.cells import Study
from rlspec.study.findings.choice import choice_sections
from rlspec.study.findings.duration import duration_sections
from rlspec.study.findings.prevention import prevention_sections
from rlspec.study.findings.section import Section
from rlspec.study.folder import StudyFolder
from rlspec.study.table import rows_of


def sections(study: Study, folder: StudyFolder) -> list[Section]:
    """The findings of a study whose cells are finished."""
    rows = rows_of(study, folder)
    if study.plan == "duration":
        return duration_sections(rows)
    if study.plan == "prevent":
        tokens = {
            cell.digest: folder.result(cell.digest)["tokens"] for cell in study.cells if cell.work == "sft"
        }
        spent = {
            cell.digest: sum(tokens[cell.parent][: cell.step]) for cell in study.measured() if cell.parent
        }
        return prevention_sections(rows, spent)
    return choice_sections(rows, by="layers" if study.plan == "layers" else "modules")
