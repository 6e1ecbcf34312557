"""Scores in trainings of several processes: those of one, not noticed, and ended in all by a fault in one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_toys import examples, plain_trainer
from process_toys import held, listening, together
from torch.distributed.fsdp import FSDPModule
from train_toys import toy_model, toy_tokenizer

from rlspec.integrations.scoring import Scoring
from rlspec.integrations.store import TrackingFolder
from rlspec.integrations.transformers import SpectralCallback
from rlspec.io.module import gathered, strip_wrappers
from rlspec.spectra.processes import Processes
from rlspec.train.texts import text_losses

LAST = 3
TEXTS = ["1 2 3 yes", "no again 7 8 9 1 2", "4", "5 6", "yes no 3 3"]


def texts_file(folder: Path) -> Path:
    path = folder / "retain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def losses_of(
    model: Any, callback: SpectralCallback | None, number: int, first: int = 0, last: int = LAST
) -> list[float]:
    """A loop as people write them, which lets go of the gradients where the next step begins."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = SimpleNamespace(global_step=first, max_steps=last, is_world_process_zero=number == 0)
    given: Any = (SimpleNamespace(world_size=2, output_dir="out"), state, SimpleNamespace())
    more = {"model": model, "processing_class": toy_tokenizer()}
    losses = []
    if callback is not None:
        callback.on_train_begin(*given, **more)
    for step in range(first, last):
        model.zero_grad()
        batch = torch.tensor([row["input_ids"] for row in examples()[4 * step + 2 * number :][:2]])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        state.global_step = step + 1
        if callback is not None:
            callback.on_step_end(*given, **more)
    if callback is not None:
        callback.on_train_end(*given, **more)
    return losses


def one_pass(model: Any) -> float:
    ids = torch.tensor([examples()[0]["input_ids"]])
    return float(model(input_ids=ids, labels=ids).loss.item())


def evaluated(model: Any) -> dict[str, float]:
    """With a forward pass that all join, random numbers, and a process of its own."""
    return {
        "pass": one_pass(model),
        "process": dist.get_rank(),
        "random": torch.rand(()).item() + dist.get_rank(),
    }


def raises_in_one(model: Any) -> dict[str, float]:
    found = {"pass": one_pass(model)}
    if dist.get_rank() == 1 and stepped(model):
        raise ZeroDivisionError("a fault")
    return found


def raises_amid_a_pass(model: Any) -> dict[str, float]:
    def fault(*_: Any) -> None:
        if stepped(model):
            raise ZeroDivisionError("a fault")

    hook = getattr(model, "module", model).model.layers[1].mlp.register_forward_hook(fault)
    try:
        return {"pass": one_pass(model)}
    finally:
        hook.remove()


def stepped(model: Any) -> bool:
    """Not at the start, when there is no gradient yet that a model in the wrong pieces could lose."""
    return getattr(model, "module", model).model.layers[0].mlp.up_proj.weight.grad is not None


EVALUATIONS = {
    "scored": evaluated,
    "raises in one": raises_in_one,
    "raises amid a pass": raises_amid_a_pass,
}


def learns(number: int, out: Path, kind: str) -> None:
    """The same training without the callback, and with each evaluation."""
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    said = listening()
    found: dict[str, Any] = {}
    for name in (None, *EVALUATIONS):
        torch.manual_seed(number)
        model = held(toy_model(0, attention_dropout=0.2), kind, 2)
        callback = None
        if name is not None:
            callback = SpectralCallback(
                every=1, out=out / name, texts=out / "retain.jsonl", evaluate=EVALUATIONS[name]
            )
        losses = losses_of(model, callback, number)
        found[str(name)] = {"losses": losses, "random": torch.rand(()).item()}
        if callback is not None:
            assert callback.disabled is None, callback.disabled
            found[str(name)] |= {
                "unscored": callback.unscored,
                "scores": [record.scores for record in callback.records],
                "said": said[:],
            }
        said.clear()
        if name == "scored":
            whole = {strip_wrappers(k): gathered(v).detach() for k, v in model.named_parameters()}
            if number == 0:
                torch.save(
                    {key.removeprefix("module."): value for key, value in whole.items()}, out / "model.pt"
                )
    (out / f"{number}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_scores_are_those_of_one_process_and_the_training_does_not_notice_them_nor_their_faults(
    kind: str, tmp_path: Path
) -> None:
    texts_file(tmp_path)
    assert together(2, learns, tmp_path, kind) == [0, 0]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    for found in (first, second):
        for name in EVALUATIONS:
            if kind == "fsdp2" and "amid" in name and not hasattr(FSDPModule, "reset_iter_state"):
                continue  # older releases of torch cannot leave a pass
            assert found[name]["losses"] == found["None"]["losses"], name
            assert found[name]["random"] == found["None"]["random"], name
    assert len(set(first["None"]["losses"] + second["None"]["losses"])) == 2 * LAST

    scores = first["scored"]["scores"]
    assert second["scored"]["scores"] == scores and len(scores) == LAST + 1
    assert all(one["process"] == 0 and 0 <= one["random"] < 1 for one in scores)
    model: Any = toy_model(0)
    model.load_state_dict(torch.load(tmp_path / "model.pt"), strict=False)
    model.eval()
    truth = text_losses(model, toy_tokenizer(), TEXTS)
    assert scores[-1]["text_loss"] == sum(truth) / len(TEXTS) != scores[0]["text_loss"]
    assert scores[-1]["pass"] == one_pass(model)
    rows = [json.loads(line) for line in (tmp_path / "scored" / "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["score"]) for row in rows] == [
        (step, name) for step in range(LAST + 1) for name in ("pass", "process", "random", "text_loss")
    ]
    assert rows[-1]["results"] == truth

    assert first["scored"]["unscored"] is None and first["scored"]["said"] == []
    for name, told in (
        ("raises in one", "process 1 of 2: ZeroDivisionError: a fault"),
        ("raises amid a pass", "ZeroDivisionError: a fault"),
    ):
        assert first[name]["unscored"] == second[name]["unscored"] == told
        assert first[name]["said"] == [f"scores end here, the tracking and the training go on: {told}"]
        assert second[name]["said"] == []
        assert [sorted(one) for one in first[name]["scores"]] == [["pass", "text_loss"]] + [[]] * LAST


def solved(counts: list[int]) -> Any:
    """Of 40 problems so many at each event."""
    left = iter(counts)
    return lambda model: {"ood": [i < n for n in [next(left)] for i in range(40)]}


def is_stopped(number: int, out: Path) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RLSPEC_CACHE=str(out / "cache"))
    said = listening()
    counts = [36, 40, 0, 0, 0] if number == 0 else [40] * 5  # the second process has nothing to complain of
    callback = SpectralCallback(every=1, out=out / "run", evaluate=solved(counts), alarm="ood", stop=True)
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = plain_trainer(out / "t", [callback], ddp_backend="gloo", **saving)
    trainer.train()
    assert trainer.args.world_size == 2 and callback.disabled is callback.unscored is None
    assert callback.fall is not None
    found = [trainer.state.global_step, callback.fall.peak_step, callback.fall.step]
    (out / f"{number}.json").write_text(json.dumps([found, said]))


def test_the_alarm_of_the_first_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    assert together(2, is_stopped, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first[0] == second[0] == [2, 1, 2]
    assert len(first[1]) == 1 and first[1][0].endswith(f"go back to {tmp_path / 't' / 'checkpoint-1'}")
    assert second[1] == []


def cannot_keep_the_fall(number: int, out: Path) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    said = listening()
    append = TrackingFolder.append_scores

    def fault(folder: Any, rows: Any) -> None:
        if rows[0]["step"] == 1:
            raise OSError("a full disk")
        append(folder, rows)

    TrackingFolder.append_scores = fault  # type: ignore[method-assign]
    callback = SpectralCallback(every=1, out=out / "run", evaluate=solved([40, 0]), alarm="ood", stop=True)
    state = SimpleNamespace(global_step=0, max_steps=9, is_world_process_zero=number == 0)
    control = SimpleNamespace(should_training_stop=False)
    given: Any = (SimpleNamespace(world_size=2, output_dir="out"), state, control)
    model = toy_model(0)
    callback.on_train_begin(*given, model=model)
    assert not control.should_training_stop
    state.global_step = 1
    callback.on_step_end(*given, model=model)
    assert callback.fall is not None and callback.disabled == "process 0 of 2: OSError: a full disk"
    assert control.should_training_stop
    assert [" at step 1 " in line for line in said] == ([True, False] if number == 0 else []), said


def test_all_stop_at_a_fall_that_the_first_process_cannot_write(tmp_path: Path) -> None:
    """Else it alone would train on, and wait for the others."""
    assert together(2, cannot_keep_the_fall, tmp_path) == [0, 0]


def goes_on(number: int, out: Path) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    options: dict[str, Any] = {"every": 1, "out": out / "run", "alarm": "ood"}
    model = held(toy_model(0), "fsdp2", 2)
    losses_of(model, SpectralCallback(evaluate=solved([36, 40, 40]), **options), number, last=2)
    second = SpectralCallback(evaluate=solved([0]), **options)
    losses_of(model, second, number, first=2, last=3)
    assert second.disabled is second.unscored is None
    assert [record.scores["ood"] for record in second.records] == [0.9, 1.0, 1.0, 0.0]
    assert second.fall is not None and (second.fall.peak_step, second.fall.step) == (1, 3)


def test_a_resumed_training_keeps_what_the_alarm_has_seen_in_all_processes(tmp_path: Path) -> None:
    assert together(2, goes_on, tmp_path) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def cannot_write(number: int, out: Path) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")

    def fault(*_: Any) -> None:
        raise OSError("a full disk")

    for name in ("append", "append_scores"):
        right = getattr(TrackingFolder, name)
        if number == 0:
            setattr(TrackingFolder, name, fault)
        callback = SpectralCallback(every=1, out=out / name, evaluate=lambda model: {"pass": one_pass(model)})
        losses_of(held(toy_model(0), "fsdp2", 2), callback, number)
        setattr(TrackingFolder, name, right)
        assert callback.disabled == "process 0 of 2: OSError: a full disk"
    dist.barrier()


def test_a_first_process_that_cannot_write_ends_the_tracking_in_all(tmp_path: Path) -> None:
    assert together(2, cannot_write, tmp_path) == [0, 0]


def talks(number: int, out: Path) -> None:
    processes = Processes.of_training().apart()
    mine = torch.ones(3)
    if number == 0:  # as one that is still in a forward pass
        work = dist.all_reduce(mine, async_op=True)
        said = processes.gathered("all is well")
    else:
        said = processes.gathered("a fault")
        work = dist.all_reduce(mine, async_op=True)
    work.wait()
    assert said == ["all is well", "a fault"] and mine.tolist() == [2.0] * 3

    scoring = Scoring(None, out / "retain.jsonl", None)
    rows, _ = scoring.score(held(toy_model(0), "tp", 2), toy_tokenizer(), 0, processes)
    truth = text_losses(toy_model(0).eval(), toy_tokenizer(), TEXTS)
    assert rows[0]["results"] == pytest.approx(truth, rel=1e-5)  # a sum over two processes
    processes.close()


def test_what_processes_say_meets_no_collective_of_the_model_whose_pass_tensor_parallelism_shares(
    tmp_path: Path,
) -> None:
    texts_file(tmp_path)
    assert together(2, talks, tmp_path) == [0, 0]
