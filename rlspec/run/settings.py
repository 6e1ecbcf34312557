"""Where a run's settings come from: defaults, a file, flags, and the config.yaml of the run to resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError, RunFolderError
from rlspec.run.config import EMBEDDED, TRAINED, TrackConfig, checked_types
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

    They are merged first and checked then: a value may need another one that comes from elsewhere.
    A resumed run takes its settings from its own config.yaml; flags and file may repeat, not change them.

    Raises:
        OptionError: An unknown or wrong setting, or ``resume`` without ``out``.
        RunFolderError: There is no run to resume, or a setting differs from its config.yaml.
    """
    asked = {
        **checked_types(_absolute(from_file), source=str(config_file)),
        **checked_types(_absolute(flags), source="command line"),
    }
    if not resume:
        return TrackConfig.of(asked)
    if out is None:
        raise OptionError("resume=True needs out=, the folder of the run to continue")
    folder = RunFolder(out)
    stored = stored_settings(folder)
    try:
        wanted = stored.changed(asked)
    except OptionError:
        # One that differs may not go with the others; that it differs is what matters here.
        _refuse_others(stored, asked, folder)
        raise
    refuse_other_settings(stored, wanted, folder)
    return stored


def stored_settings(folder: RunFolder) -> TrackConfig:
    """The config of the run in ``folder``.

    Raises:
        OptionError: A setting that this version does not know or take.
        RunFolderError: There is no run.
    """
    settings = folder.settings()
    # Before a run could have branches, PPO that was not told where to start from started from SFT's end.
    if settings.get("ppo_from", ()) is None and settings.get("stages") == list(TRAINED):
        settings["ppo_from"] = settings.get("sft_steps")
    return TrackConfig.from_settings(settings, source=str(folder.config_path))


def refuse_other_settings(stored: TrackConfig, wanted: TrackConfig, folder: RunFolder) -> None:
    """Raise RunFolderError naming each setting of ``wanted`` that is not as in the folder's config.yaml."""
    _refuse_others(stored, wanted.values(), folder)


def _refuse_others(stored: TrackConfig, wanted: Mapping[str, Any], folder: RunFolder) -> None:
    known = stored.values()
    pairs = [(name, known[name], new) for name, new in wanted.items()]
    differences = [f"{name}={_shown(old)!r}, not {_shown(new)!r}" for name, old, new in pairs if old != new]
    if differences:
        raise RunFolderError(f"{folder.config_path} has other settings: {'; '.join(differences)}")


def _absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with the model's folder made absolute, so that a run can be resumed from elsewhere."""
    model = settings.get("model")
    if model in (None, EMBEDDED):
        return dict(settings)
    return {**settings, "model": str(Path(str(model)).expanduser().absolute())}


def _shown(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
