"""What the README and the docs show works: every command and every piece of Python in them runs, on tiny models.

A page is a story: its blocks run in order, in one folder that holds the checkpoints that the pages speak of. A command
that trains or evaluates gets sizes of seconds after its own options; a shell comment is one here, too.
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import torch
import transformers
import trl
from click.testing import CliRunner
from train_toys import save_toy_model

import rlspec
from rlspec.cli.main import main
from rlspec.models.vocabulary import make_tokenizer
from rlspec.spectra.table import COLUMNS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What makes a command one of seconds; the later of two equal options counts.
_SMALL = {
    "track": "--sft-steps 2 --every 2 --ppo-from 1,2 --ppo-updates 1 --turns-per-update 8 --deals 2 --batch-size 2 "
    "--turns 1",
    "eval": "--deals 2 --turns 1",
    "study": "--budget 2",
}


class OnCPU(trl.SFTConfig):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"use_cpu": True, "bf16": False, **kwargs})


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """A shell block's commands, word by word; an ellipsis stands for options of the reader's own."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := [word for word in shlex.split(line, comments=True) if word != "..."]:
                yield words


def blocks(page: Path, text: str | None = None) -> list[Block]:
    text = page.read_text() if text is None else text
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), namespace)
    elif block.language == "bash":
        for words in block.commands():
            run_command(words, block)
    else:
        assert block.language in ("", "text"), f"{block}: nothing runs {block.language}"


def run_command(words: list[str], block: Block) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{block}: {words}"
    elif words[:2] == ["pip", "install"]:
        what, *extras = re.findall(r"[.\w]+", words[-1])
        declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        # Of a clone: no index has the package.
        if what != "." or not set(extras) <= declared:
            raise AssertionError(
                f"{block}: `{' '.join(words)}`: wanted '.', or '.[EXTRA]' with a declared extra"
            )
    elif words[0] == "python":  # a bench: it is there, and knows its options
        bench = importlib.import_module(Path(words[1]).stem)
        assert (ROOT / words[1]).exists()
        bench.main.make_context(words[1], words[2:])
    elif words[:2] == ["rlspec", "study"] and "--base" not in words:  # minutes, even the quick ones
        parse(words)
    else:
        assert words[0] == "rlspec", f"{block}: nothing knows how to run {words[0]}"
        arguments = words[1:]
        if "--resume" not in arguments:
            arguments += _SMALL.get(words[1], "").split()
            if words[1] == "track" and "runs/mine" in arguments:
                shutil.rmtree("runs/mine")
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{block}: {' '.join(words)}\n{result.output}\n{result.exception!r}"
        if words[1] == "track":
            furnish(Path("runs/mine"))


def parse(words: list[str]) -> None:
    """Read a command line of rlspec as the command itself does, and go no further.

    Raises:
        click.UsageError: it is none.
    """
    command: click.Command = main
    name: str | None
    (name, *rest), found = words, command
    try:
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(command.make_context(name, [*rest]), [*rest])
            assert found is not None
            command = found
        command.make_context(name, rest)
    except click.exceptions.Exit:  # --help
        pass


def spans(page: Path, text: str | None = None) -> Iterator[Block]:
    """What a page has in backticks in its prose, be it over two lines."""
    text = page.read_text() if text is None else text
    prose = _FENCE.sub(lambda block: re.sub(r"[^\n]", "", block[0]), text)
    for match in re.finditer(r"`([^`]+)`", prose):
        yield Block(page, prose.count("\n", 0, match.start()) + 1, "span", " ".join(match[1].split()))


def check_span(span: Block) -> None:
    """A command with options is one that can be typed, but for an ellipsis; what is to be installed can be."""
    if "..." in span.text or "…" in span.text:
        return
    if span.text.startswith("pip install "):
        run_command(shlex.split(span.text), span)
    elif re.match(r"rlspec [a-z]", span.text) and " -" in span.text:
        try:
            parse(shlex.split(span.text))
        except click.UsageError as error:
            raise AssertionError(f"{span}: `{span.text}`: {error.format_message()}") from None


def furnish(run: Path) -> None:
    """The checkpoints that the pages take from a run of full length."""
    for step in (50, 300):
        if not (folder := run / "checkpoints" / f"sft-{step}").exists():
            shutil.copytree("sft-model" if step == 300 else "base-model", folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    save_toy_model(folder / "base-model")
    tuned = transformers.AutoModelForCausalLM.from_pretrained(folder / "base-model")
    for step in (100, 200):
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
        tuned.save_pretrained(folder / f"runs/other/checkpoint-{step}")
    shutil.copytree(folder / "base-model", folder / "sft-model")  # with the tokenizer
    tuned.save_pretrained(folder / "sft-model")
    words = " ".join(list(make_tokenizer().get_vocab())[20:40])
    for name, row in (
        ("texts", {"text": words}),
        ("task", {"prompt": words, "answer": words}),
        ("prompts", {"prompt": words}),
    ):
        (folder / f"{name}.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    for name in ("A", "B", "path/to/hf-model"):
        shutil.copytree(folder / "base-model", folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_shows_runs(
    page: Path, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))
    # TRL's own default is bfloat16, which it refuses on a CPU unless told.
    monkeypatch.setattr(trl, "SFTConfig", OnCPU)
    furnish(Path("runs/mine"))
    words = list(make_tokenizer().get_vocab())
    namespace = {
        "rlspec": rlspec,
        "model": transformers.AutoModelForCausalLM.from_pretrained("sft-model"),
        "tokenizer": transformers.AutoTokenizer.from_pretrained("sft-model"),
        "dataset": trl_dataset(words),
        "SFTTrainer": trl.SFTTrainer,
        "args": trl.SFTConfig(output_dir="trained", max_steps=2, report_to="none"),
        "W": torch.randn(40, 32),
        "W_base": (base := torch.randn(40, 32)),
        "W_tuned": base + 0.01 * torch.randn(40, 32),
    }
    for block in blocks(page):
        run_block(block, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_in_a_pages_prose_can_be_typed(page: Path) -> None:
    wrong = []
    for span in spans(page):
        try:
            check_span(span)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "`rlspec study duration\n--seeds 0,1,2`",
        "`rlspec study nothing --quick`",
        "`rlspec cache --prune much`",
        "`rlspec measure --bass x --base y --out z`",
        "`pip install 'rlspec[png]'`",
        "`pip install '.[nothing]'`",
    ],
)
def test_a_command_in_prose_that_cannot_be_typed_is_found(text: str) -> None:
    (span,) = spans(ROOT / "README.md", f"```text\n`rlspec measure --bass`\n```\nSee {text}.\n")
    with pytest.raises(AssertionError, match=r"README.md:4"):
        check_span(span)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda page: page.name)
def test_a_notebook_runs_cell_by_cell(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))
    for cell in json.loads(page.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            for span in spans(page, "".join(cell["source"])):
                check_span(span)
    drawn: list[str] = []
    # Every notebook has IPython around it, the tests have not.
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(SVG=drawn.append))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "what a cell prints is not kept"
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        small = re.sub(r"STEPS, DEALS = \d+, \d+", "STEPS, DEALS = 4, 4", code)
        exec(compile(small, f"{page.name}, cell {number}", "exec"), namespace)
    for picture in drawn:
        svg = ElementTree.fromstring(picture)
        assert {"ID", "OOD"} <= {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert drawn


def trl_dataset(words: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": [" ".join(words[i : i + 8]) for i in range(20, 28)]})


@pytest.mark.parametrize(
    "text",
    ["```bash\nrlspec restor\n```", "```bash\nrlspec measure --bass x\n```", "```python\nrlspec.sdv\n```"],
)
def test_a_page_that_shows_what_is_not_there_fails(text: str) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        run_block(blocks(ROOT / "README.md", text + "\n")[0], {"rlspec": rlspec})


def test_every_column_has_its_line_in_the_metric_reference() -> None:
    shown = set(re.findall(r"`(\w+)`", (ROOT / "docs/metrics.md").read_text()))
    assert not set(COLUMNS) - shown
    told = {name for name in shown if re.match("(angle|sigma|null|delta|block|energy|intruder)_", name)}
    assert not told - set(COLUMNS), "the page speaks of columns that no row has"


def test_the_command_line_reference_is_what_the_commands_say() -> None:
    page = runpy.run_path(str(ROOT / "tools/cli_reference.py"))
    assert page["PAGE"].read_text() == page["reference"](), "run: python tools/cli_reference.py"
    told = set(re.findall(r"^\* `(--[\w-]+)", page["reference"](), re.MULTILINE))
    assert {
        "--sft-kl-coef",
        "--slurm",
        "--win-back",
        "--prune",
    } <= told  # fine ones, a plan's, a search's, an IntRange


@pytest.mark.parametrize("room", ["rlspec", "rlspec.train", "rlspec.spectra", "rlspec.report"])
def test_the_api_page_has_every_public_name(room: str) -> None:
    shown = re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    for module, name in shown:
        assert getattr(importlib.import_module(module), name).__doc__, (
            f"{module}.{name} says nothing of itself"
        )
    public = set(importlib.import_module(room).__all__) - {"__version__", "tasks", "train"}
    assert public <= {name for _, name in shown}


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert navigation == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


def test_tests_that_the_docs_name_are_there() -> None:
    named = [
        (page, *found)
        for page in PAGES
        for found in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", page.read_text())
    ]
    assert len(named) >= 9
    for page, file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{page}: {file}::{test}"
