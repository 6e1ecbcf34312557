"""Options that come from the dataclass of a command's settings: declared once, name, default and text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from rlspec.cli.flags import flag
from rlspec.cli.main import main
from rlspec.cli.settings import options_of
from rlspec.restore import RestoreOptions
from rlspec.settings import setting


@dataclass(frozen=True, kw_only=True)
class Toy:
    some_count: int = setting(3, "A count.")
    limit: int | None = setting(None, "A limit.", default_told="none")
    share: float = setting(0.5, "A share.")
    kind: Literal["a", "b"] = setting("a", "A kind.")
    rank: float | str = setting(0.2, "A rank.")
    quick: bool = setting(False, "A flag.")


def parsed(settings: type, *arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @options_of(settings)
    def command(**values: Any) -> None:
        seen.update(values)

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return seen


def test_every_kind_of_field_becomes_an_option_of_its_type() -> None:
    defaults = {"some_count": 3, "limit": None, "share": 0.5, "kind": "a", "rank": "0.2", "quick": False}
    assert parsed(Toy) == defaults and list(parsed(Toy)) == list(defaults)
    given = parsed(Toy, "--some-count", "4", "--limit", "5", "--share", "1", "--rank", "7", "--quick")
    assert given == defaults | {"some_count": 4, "limit": 5, "share": 1.0, "rank": "7", "quick": True}
    assert [type(given[name]) for name in ("limit", "share", "rank")] == [int, float, str]
    with pytest.raises(click.BadParameter, match="not a valid integer"):
        parsed(Toy, "--limit", "x")


def test_help_tells_each_default_once() -> None:
    @click.command()
    @options_of(Toy)
    def command(**_: Any) -> None: ...

    text = CliRunner().invoke(command, ["--help"]).output
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if "--" in line}
    assert lines["--some-count"] == "--some-count INTEGER A count. [default: 3]"
    assert lines["--limit"] == "--limit INTEGER A limit. [default: none]"
    assert lines["--quick"] == "--quick A flag."


def test_a_field_that_is_not_told_of_is_no_setting() -> None:
    @dataclass
    class Untold:
        count: int = 3

    with pytest.raises(KeyError, match="told"):
        parsed(Untold)


def test_restore_without_options_has_the_defaults_of_the_library() -> None:
    assert RestoreOptions(**parsed(RestoreOptions)).to_dict() == RestoreOptions().to_dict()
    command = main.get_command(click.Context(main), "restore")
    assert command is not None
    offered = {option.name: option for option in command.params if isinstance(option, click.Option)}
    for field in fields(RestoreOptions):
        assert offered[field.name].opts == [flag(field.name)]
        assert field.metadata["told"] in (offered[field.name].help or "")
