"""Errors: the library speaks of arguments, the command line of flags; a wrong value is a ValueError."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import rlspec
from rlspec import errors
from rlspec.cli.flags import as_flags
from rlspec.cli.main import COMMANDS, main
from rlspec.io.projections import find_projections
from rlspec.restore import RestoreOptions
from rlspec.run.config import TrackConfig
from rlspec.spectra import Rank, SpectralTracker
from rlspec.tasks import get_task
from rlspec.train import PPOConfig, SFTConfig

ROOT = Path(rlspec.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def library() -> list[Path]:
    """Every module that is no command."""
    commands = {ROOT / "models" / "pretrain.py", *(ROOT / "cli").rglob("*.py")}
    return [path for path in sorted(ROOT.rglob("*.py")) if path not in commands]


def docstrings(tree: ast.AST) -> set[int]:
    """The nodes that are docstrings, or strings that stand alone."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module that may reach a user."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, message with {} for what is filled in) of every error with a message written where it is made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            message = node.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)
            if node.func.id.endswith("Error"):
                yield node.func.id, text


def test_no_library_text_speaks_of_flags() -> None:
    assert len(library()) > 80
    found = [
        (path.name, text)
        for path in library()
        for text in texts(ast.parse(path.read_text()))
        if FLAG.search(text)
    ]
    assert found == []


def test_the_search_for_flags_would_notice_one() -> None:
    source = (
        'def f(x):\n    """A --flag here is documentation."""\n    raise OptionError(f"{x}: give --rank {x}")'
    )
    assert [text for text in texts(ast.parse(source)) if FLAG.search(text)] == [": give --rank "]


def test_an_error_that_names_an_argument_is_a_value_error() -> None:
    named = [
        (name, text)
        for path in library()
        for name, text in raised(ast.parse(path.read_text()))
        if re.match(r"(\{\}|[a-z_]+)=\S", text)
    ]
    assert len(named) > 15
    for name, text in named:
        kind = getattr(errors, name, None) or getattr(builtins, name)
        environment = text.startswith("{}=triton")  # a machine that cannot run what was asked for
        assert issubclass(kind, ValueError) or environment, (name, text)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: RestoreOptions(strength=2), errors.OptionError, r"^strength=2 is not in \[0, 1\]"),
        (lambda: RestoreOptions(layers="x"), errors.OptionError, "^layers='x' is not valid"),
        (lambda: RestoreOptions(part="9:1"), errors.OptionError, "^part='9:1': the range is empty"),
        (lambda: TrackConfig(every=0), errors.OptionError, "^every=0 must be at least 1"),
        (lambda: Rank.parse("x"), errors.OptionError, "^rank='x' is not valid"),
        (lambda: rlspec.svd(torch.ones(3, 3), 4), errors.OptionError, "^rank=4 must be a count from 1 to"),
        (lambda: rlspec.svd(torch.full((3, 3), torch.nan)), errors.TensorError, "nan at position"),
        (lambda: find_projections({"x": (2, 2)}, ("q",)), errors.ProjectionError, "no q projection"),
        (lambda: get_task("chess", tokenizer=None), errors.OptionError, "unknown task 'chess'"),
        (lambda: SFTConfig(steps=0), errors.OptionError, "steps"),
        (lambda: PPOConfig(clip=0), errors.OptionError, "clip"),
        (lambda: SpectralTracker(None, engine="x"), errors.OptionError, "unknown engine 'x'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_values_are_value_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert type(caught.value) is kind and issubclass(kind, errors.RlspecError)
    assert not FLAG.search(str(caught.value))


Q = "model.layers.0.self_attn.q_proj.weight"
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda basis: rlspec.restore_(torch.nn.Linear(2, 2), None),
            "basis=None is not a SpectralBasis or the",
        ),
        (lambda basis: rlspec.restore_("/x", basis), "model='/x' is not a module"),
        (lambda basis: rlspec.restore_({Q: W}, basis), "model, a dict, is not a module"),
        (lambda basis: rlspec.restore_matrix([[1.0]], W, 1), "W_base, a list, is not a tensor"),
        (lambda basis: rlspec.restore_matrix(W.numpy(), W, 1), "W_base, a ndarray, is not a tensor"),
        (lambda basis: rlspec.restore_matrix(W, None, 1), "W_tuned=None is not a tensor"),
        (
            lambda basis: rlspec.restore_matrix(W, W, 1, basis=basis),
            "basis, a SpectralBasis, is not a MatrixBasis",
        ),
        (lambda basis: rlspec.restore_matrix(W, W, 1, strength="1"), "strength='1' is not a number"),
        (
            lambda basis: rlspec.restore_matrix(W, W, 1, dtype="float32"),
            "dtype='float32' is not a torch.dtype",
        ),
        (lambda basis: rlspec.SpectralBasis.from_model(None), "model=None is not a module, a mapping"),
        (lambda basis: rlspec.SpectralBasis.from_tensors([W]), "model, a list, is not a module, a mapping"),
        (lambda basis: rlspec.SpectralBasis.from_checkpoint(W), "folder, a Tensor, is not the path of a"),
        (
            lambda basis: SpectralTracker("/x"),
            "basis='/x' is not a SpectralBasis, as SpectralBasis.from_checkp",
        ),
        (lambda basis: SpectralTracker(basis).measure(W, step=0), "model, a Tensor, is not a module"),
        (
            lambda basis: rlspec.restore_checkpoint(basis, "/y", "/z"),
            "base, a SpectralBasis, is not the path",
        ),
        (lambda basis: rlspec.restore_checkpoint("/x", "/y", None), "out=None is not the path"),
        (
            lambda basis: rlspec.restore_checkpoint("/x", "/y", "/z", layers=3),
            "layers=3 is not a text such as",
        ),
        (
            lambda basis: rlspec.restore_checkpoint("/x", "/y", "/z", modules=3),
            "modules=3 is not names, or a",
        ),
        (lambda basis: rlspec.restore_checkpoint("/x", "/y", "/z", part=3), "part=3 is not a text"),
        (
            lambda basis: rlspec.restore_checkpoint("/x", "/y", "/z", seed="a"),
            "seed='a' is not a whole number",
        ),
        (
            lambda basis: rlspec.restore_checkpoint("/x", "/y", "/z", strength=True),
            "strength=True is not a num",
        ),
    ],
)
def test_arguments_of_another_type_are_named(
    call: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    basis = rlspec.SpectralBasis.from_tensors({Q: W}, modules="q", cache_dir=tmp_path)
    with pytest.raises(errors.OptionError, match=f"^{message}"):
        call(basis)


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("strength=2 is not in [0, 1]", "--strength 2 is not in [0, 1]"),
        ("part='tail' with mode='copy'", "--part 'tail' with --mode 'copy'"),
        ("memory_gib=0.0 is too little", "--memory-gib 0.0 is too little"),
        ("x: exists; give overwrite=True to", "x: exists; give --overwrite to"),
        ("measured with overwrite=False, now", "measured with no --overwrite, now"),
        ("modules= also takes", "--modules also takes"),
        ("resume=True needs out=, the folder", "--resume needs --out, the folder"),
        ("report_file='x'", "--report 'x'"),
        # No argument of this command, and a path that only looks like one.
        ("RLSPEC_BACKEND=x and other=3 in /a/rank=3/b", "RLSPEC_BACKEND=x and other=3 in /a/rank=3/b"),
    ],
)
def test_the_command_line_shows_its_own_spelling(message: str, shown: str) -> None:
    assert as_flags(message, command("restore")) == shown


def test_every_argument_that_a_config_error_can_name_is_an_option_of_its_command() -> None:
    names = set(TrackConfig().to_settings())
    assert names <= {option.name for option in command("track").params}
    assert set(RestoreOptions().to_dict()) <= {option.name for option in command("restore").params}
    evaluated = {"model", "task", "shifts", "deals", "turns", "seed", "device", "threads", "json_file"}
    assert evaluated <= {option.name for option in command("eval").params}
    assert set(COMMANDS) >= {"track", "restore", "eval"}
