"""What an update of PPO, a step of SFT and a sampled token cost, each against a named peer in the same run.

``python bench/train_bench.py`` takes the embedded model, after ``--sft-steps`` of fine-tuning, through

* ppo: one update, split into playing, scoring and learning, against one row a turn, padded, every prompt read anew
  and a pass of its own for the values (the same loss, the same optimizer, the same episodes), and playing one
  answer at a time;
* sft: steps a second against TRL's ``SFTTrainer`` on the same batches, where TRL is installed, both without
  recomputing activations, which TRL does unless told not to;
* sampling: tokens a second against transformers' ``generate`` at the same batch, greedy.

A gate comes first: log-probabilities, values and losses, or the tokens, must agree within float32 rounding.
Contenders take turns, and the fastest run of each counts, in seconds of processor time.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from harness import machine, table

from rlspec.errors import MissingPackageError
from rlspec.jobs.loading import load_model, load_tokenizer, model_folder
from rlspec.run.config import EMBEDDED
from rlspec.tasks import get_task
from rlspec.train import Callback, PPOConfig, SFTConfig, StepState, experience, forward, train_sft
from rlspec.train import generate as sampling
from rlspec.train.batch import left_pad
from rlspec.train.encode import encode_prompt, pad_id
from rlspec.train.optimizer import make_adamw
from rlspec.train.ppo import improve
from rlspec.train.rollout import play
from rlspec.train.traces import Trace, single
from rlspec.train.value_head import ValueHead

Times = dict[str, float]


@contextmanager
def one_row_a_turn() -> Iterator[None]:
    """Context in which nothing is shared: neither between turns nor between rows."""

    def separate(turns: Any) -> list[Trace]:
        return [single(*turn) for turn in turns]

    with (
        mock.patch.object(experience, "conversation", separate),
        mock.patch.object(forward, "can_pack", lambda *_: False),
        mock.patch.object(sampling, "goes_on", lambda *_: False),
    ):
        yield


def refuse(name: str, found: Any, wanted: Any, bound: float) -> float:
    """The largest difference; stops the bench where it exceeds the bound."""
    worst = float((torch.as_tensor(found) - torch.as_tensor(wanted)).abs().max())
    if not worst <= bound:
        raise click.ClickException(f"{name} differ by {worst:.2g}, more than {bound:.0e}")
    return worst


def score(model: Any, head: ValueHead, found: experience.Experience, pad: int, config: PPOConfig) -> Any:
    """Log-probabilities and values, (N, A), of an experience by forward passes."""
    rows = experience.turn_rows(found.traces)
    logprobs, values = torch.zeros_like(found.logprobs), torch.zeros_like(found.values)
    with torch.no_grad():
        for split in forward.forward_passes(model, found.traces, config.micro_batch_size, pad):
            part = [row for i in split for row in rows[i]]
            traces = [found.traces[i] for i in split]
            logprobs[part], values[part], *_ = experience.score_actions(model, head, traces, pad, config)
    return logprobs, values


def update(start: Any, tokenizer: Any, task: Any, config: PPOConfig, *, shared: bool) -> tuple[Times, Any]:
    """Seconds of one update of a copy of the model, and what was computed on the way."""
    model = copy.deepcopy(start)
    head = ValueHead.for_model(model)
    optimizer = make_adamw([(model, config.learning_rate), (head, config.value_learning_rate)], 0.0)
    pad = pad_id(model, tokenizer)
    clock = [time.process_time()]
    episodes = experience.collect(model, tokenizer, task, config, 1, frozenset())
    clock.append(time.process_time())
    torch.nn.init.normal_(head.linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    found = experience.prepare(
        model, head, None, tokenizer, episodes, task.turn_limit_reward, config, first=False
    )
    scored = (found.logprobs, found.values) if shared else score(model, head, found, pad, config)
    clock.append(time.process_time())
    logs = improve(model, head, optimizer, found, pad, config, 1)
    clock.append(time.process_time())
    names = ("playing", "scoring", "learning")
    times = {name: b - a for name, a, b in zip(names, clock, clock[1:])}
    return times | {"turns": float(len(found.mask)), "ratio": logs["tokens_forwarded_ratio"]}, (found, scored)


def bench_ppo(model: Any, tokenizer: Any, task: Any, repeats: int) -> dict[str, Any]:
    config = PPOConfig(dtype="float32")
    best: dict[str, Times] = {}
    results: dict[str, Any] = {}

    def contend(name: str, shared: bool) -> None:
        times, results[name] = update(model, tokenizer, task, config, shared=shared)
        times["all"] = times["playing"] + times["scoring"] + times["learning"]
        if name not in best or times["all"] < best[name]["all"]:
            best[name] = times

    for _ in range(repeats):
        contend("shared", True)
        with one_row_a_turn():
            contend("one row a turn", False)
    found, scored = results["shared"]
    other, wanted = results["one row a turn"]
    errors = {
        "log-probabilities": refuse("log-probabilities", scored[0], wanted[0], 1e-3),
        "values": refuse("values", scored[1], wanted[1], 1e-3),
        "advantages": refuse("advantages", found.advantages, other.advantages, 1e-3),
    }
    rng, began = random.Random(0), time.process_time()
    few = [task.sample(rng) for _ in range(4)]
    with one_row_a_turn():
        episodes = play(
            model,
            tokenizer,
            task,
            few,
            turns=task.max_turns,
            generator=torch.Generator().manual_seed(0),
            batch_size=1,
        )
    single_turn = (time.process_time() - began) / sum(len(episode.turns) for episode in episodes)
    return {"errors": errors, "times": best, "playing one at a time, s a turn": single_turn}


def bench_sampling(model: Any, tokenizer: Any, task: Any, repeats: int, batch: int = 64) -> dict[str, Any]:
    rng = random.Random(1)
    pad = pad_id(model, tokenizer)
    prompts = [encode_prompt(tokenizer, task.prompt(task.sample(rng))) for _ in range(batch)]
    ids, mask = left_pad(prompts, pad)
    steps = task.max_answer_tokens

    def ours() -> list[list[int]]:
        return sampling.generate(model, tokenizer, prompts, max_new_tokens=steps, temperature=0).tokens

    def theirs() -> list[list[int]]:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)
        rows = out[:, ids.shape[1] :].tolist()
        end = tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    best, results = compete({"ours": ours, "transformers": theirs}, repeats)
    if results["ours"] != results["transformers"]:
        raise click.ClickException("greedy answers are not those of transformers")
    tokens = sum(map(len, results["ours"]))
    return {name: tokens / seconds for name, seconds in best.items()}


def compete(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[Times, dict[str, Any]]:
    """The least processor seconds of each contender, taking turns, and its last result."""
    best: Times = {}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            results[name] = run()
            best[name] = min(best.get(name, float("inf")), time.process_time() - began)
    return best, results


def bench_sft(start: Any, tokenizer: Any, task: Any, repeats: int, steps: int) -> dict[str, Any] | None:
    try:
        from rlspec.integrations import trl
    except MissingPackageError:
        return None
    config = SFTConfig(
        steps=steps, batch_size=32, schedule="constant", warmup_ratio=0.0, learning_rate=1e-4, dtype="float32"
    )

    class Timed(Callback):
        """The seconds of processor time from before the first step to after the last."""

        def on_start(self, state: StepState) -> None:
            self.began = time.process_time()

        def on_step(self, state: StepState) -> None:
            self.seconds = time.process_time() - self.began

    seconds: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in ("ours", "TRL"):
            model, timed = copy.deepcopy(start), Timed()
            with tempfile.TemporaryDirectory() as folder:
                train = train_sft if name == "ours" else partial(trl.train_sft, out=Path(folder))
                losses[name] = train(model, tokenizer, task, config, callbacks=[timed]).losses
            seconds[name] = min(seconds.get(name, float("inf")), timed.seconds)
    error = refuse("SFT losses", losses["ours"], losses["TRL"], 2e-3)
    return {"error": error} | {name: steps / taken for name, taken in seconds.items()}


@click.command(help=__doc__)
@click.option("--sft-steps", default=0, show_default=True, help="Fine-tuning before anything is measured.")
@click.option("--repeats", default=2, show_default=True, help="Runs of each contender.")
@click.option("--steps", default=10, show_default=True, help="Steps of SFT that are timed.")
@click.option("--parts", default="ppo,sampling,sft", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(sft_steps: int, repeats: int, steps: int, parts: str, json_file: Path | None) -> None:
    about = machine()
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    folder = model_folder(EMBEDDED)
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.device("cpu"))
    task = get_task("general_points", tokenizer=tokenizer, turns=5)
    if sft_steps:
        train_sft(model, tokenizer, task, SFTConfig(steps=sft_steps, batch_size=32))
    results: dict[str, Any] = {}
    if "ppo" in parts:
        found = results["ppo"] = bench_ppo(model, tokenizer, task, repeats)
        names = ("playing", "scoring", "learning", "all")
        cells = [("PPO, s an update", *names, "tokens forwarded")]
        for contender, times in found["times"].items():
            cells.append((contender, *(f"{times[name]:.2f}" for name in names), f"{times['ratio']:.2f}x"))
        slow, fast = found["times"]["one row a turn"], found["times"]["shared"]
        alone = found["playing one at a time, s a turn"] * fast["turns"]
        click.echo(table(cells))
        click.echo(
            f"{slow['all'] / fast['all']:.1f}x; playing one answer at a time would take {alone:.1f} s, "
            f"{alone / fast['playing']:.0f}x; differences {found['errors']}"
        )
    if "sampling" in parts:
        rates = results["sampling"] = bench_sampling(model, tokenizer, task, repeats)
        click.echo("sampling, tokens/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    if "sft" in parts:
        speeds = results["sft"] = bench_sft(model, tokenizer, task, repeats, steps)
        shown = (
            "TRL is not installed" if speeds is None else ", ".join(f"{k} {v:.3g}" for k, v in speeds.items())
        )
        click.echo(f"SFT, steps/s: {shown}")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
