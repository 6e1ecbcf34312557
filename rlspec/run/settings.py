"""Where a run's settings come from: defaults, a file, flags, and the config.yaml of the run to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError, RunFolderError
from rlspec.run.config import EMBEDDED, TrackConfig, flag
from rlspec.run.folder import RunFolder


def resolve_settings(
    flags: Mapping[str, Any],
    from_file: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> TrackConfig:
    """The config of a run: ``flags`` win over ``from_file``, which wins over the defaults.

    A resumed run takes its settings from its own config.yaml; flags and file may repeat, not change them.

    Raises:
        OptionError: An unknown or wrong setting, or ``resume`` without ``out``.
        RunFolderError: There is no run to resume, or a setting differs from its config.yaml.
    """
    file_config = TrackConfig.from_settings(_absolute(from_file), source=f"--config {config_file}")
    if not resume:
        settings = {**_only(file_config, from_file), **_absolute(flags)}
        return TrackConfig.from_settings(settings, source="command line")
    if out is None:
        raise OptionError("--resume needs --out, the folder of the run to continue")
    folder = RunFolder(out)
    stored = TrackConfig.from_settings(folder.settings(), source=str(folder.config_path))
    asked = {**_only(file_config, from_file), **_absolute(flags)}
    wanted = TrackConfig.from_settings({**stored.to_settings(), **asked}, source="command line")
    refuse_other_settings(stored, wanted, folder)
    return stored


def refuse_other_settings(stored: TrackConfig, wanted: TrackConfig, folder: RunFolder) -> None:
    """Raise RunFolderError naming each setting of ``wanted`` that is not as in the folder's config.yaml."""
    pairs = [(f.name, getattr(stored, f.name), getattr(wanted, f.name)) for f in fields(TrackConfig)]
    differences = [
        f"{flag(name)} is {_shown(old)}, not {_shown(new)}" for name, old, new in pairs if old != new
    ]
    if differences:
        raise RunFolderError(f"{folder.config_path} has other settings: {'; '.join(differences)}")


def _absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with the model's folder made absolute, so that a run can be resumed from elsewhere."""
    model = settings.get("model")
    if model in (None, EMBEDDED):
        return dict(settings)
    return {**settings, "model": str(Path(str(model)).expanduser().absolute())}


def _only(config: TrackConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``config`` that ``names`` names (with either ``-`` or ``_``)."""
    settings = config.to_settings()
    return {key: settings[key] for key in (str(name).replace("-", "_") for name in names)}


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
