"""Run folders made up for the report's tests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlspec.run.config import TrackConfig
from rlspec.run.evaluation import metrics_columns
from rlspec.run.folder import RunFolder
from rlspec.run.segments import Event
from rlspec.run.summary import summarize
from rlspec.tasks import wilson_interval

MODEL = "a <b>&model"


def _metrics(stage: str, step: int, at: int, identity: float, ood: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": stage,
        "step": step,
        "global_step": at,
        "loss": 1 / (1 + at),
        "ood_shift": "both",
    }
    for prefix, value in (("id", identity), ("ood", ood)):
        row |= {f"{prefix}_accuracy": value, f"{prefix}_n": 234, f"{prefix}_low": value * 0.9}
        row |= {f"{prefix}_high": min(1.0, value * 1.1 + 0.01)}
    return row | {"kl_base_nats_per_token": at / 500, "seconds_wall": 10.0 + at, "seconds_tracking": 0.1 * at}


def make_run(folder: Path, *, steps: int = 3, layers: int = 4) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model": MODEL, "shifts": ["none", "both"], "seed": 3})
    )
    rng = random.Random(0)
    oods = [0.0, 0.5123, 0.1] + [0.1] * steps
    metrics = [_metrics("sft", 50 * i, 50 * i, 0.3 * min(i, 3), oods[i]) for i in range(steps)]
    metrics += [_metrics("ppo", 5 * i, 50 * (steps - 1) + 10 * i, 0.9, 0.2) for i in range(2)]
    spectra = []
    for row in metrics:
        for layer in range(layers):
            for module in "qkv":
                angle = rng.random() * row["global_step"] / 100
                spectra.append(
                    {
                        "stage": row["stage"], "step": row["step"], "module": module, "layer": layer,
                        "angle_left_mean_rad": angle if module != "k" else None, "angle_right_mean_rad": angle,
                        "sigma_change_rel_mean": angle / 10, "nss_k": angle / 9, "delta_relative": angle,
                        "note": "left angles skipped" if module == "k" else None,
                    }
                )  # fmt: skip
    for name, rows in (("metrics", metrics), ("spectra", spectra)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_tree(
    folder: Path,
    ood: Mapping[Event, int],
    *,
    angles: Mapping[Event, float] | None = None,
    deals: int = 100,
    finished: bool = True,
    **settings: Any,
) -> Path:
    """A run of the true store whose OOD evaluation at each event solves the first ``ood[event]`` of its deals.

    Args:
        ood: also the order of the events; the ID accuracy is 0.5 throughout.
        angles: the mean rotation at each event, in radians; 0 where it is not given.
        finished: with the summary that a run ends with.
    """
    if not any(name == "restore" for name, _ in ood):
        settings = {"stages": ("sft", "ppo"), **settings}
    config = TrackConfig(deals=deals, **settings)
    run = RunFolder.create(folder, config.to_settings())
    segments = {segment.id: segment for segment in config.segments}
    for (name, step), solved in ood.items():
        segment = segments[name]
        pace = {"sft": 1, "ppo": 16, "restore": 0}[segment.stage]
        place = {"run": run.run_id, "segment": name, "stage": segment.stage, "step": step}
        evals = []
        for shift, count in (("none", deals // 2), ("both", solved)):
            low, high = wilson_interval(count, deals)
            evals.append(
                {
                    **place, "shift": shift, "n": deals, "turns": 5, "seed": 0, "accuracy": count / deals, "low": low,
                    "high": high, "first_turn_accuracy": 0.0, "outcomes": "1" * count + "0" * (deals - count),
                }
            )  # fmt: skip
        metrics = {**place, "global_step": step * pace, **metrics_columns(evals, "both")}
        if segment.parent is not None:
            metrics |= {"parent_segment": segment.parent[0], "parent_step": segment.parent[1]}
            metrics["global_step"] += segment.parent[1]
        metrics |= {"kl_base_nats_per_token": 0.1, "loss": 1.0}
        metrics |= {
            f"seconds_{kind}": 1.0 for kind in ("training", "tracking", "evaluating", "kl", "saving", "wall")
        }
        angle = (angles or {}).get((name, step), 0.0)
        spectra = {
            **place, "module": "q", "layer": 0, "angle_left_mean_rad": angle, "angle_right_mean_rad": angle,
            "sigma_change_rel_mean": 0.01, "sigma_change_rel_max": 0.02, "delta_relative": 0.1,
        }  # fmt: skip
        run.commit(metrics, spectra=[spectra], evals=evals)
    if finished:
        run.write_summary(summarize(config, run))
    run.close()
    return folder
