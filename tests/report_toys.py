"""Run folders made up for the report's tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

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
