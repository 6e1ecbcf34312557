"""Several processes on this machine that hold one model together, with gloo between them."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from train_toys import toy_model

#: What one of several processes does: called with its number and what the test gives besides.
Work = Callable[..., None]


def together(
    count: int, work: Work, *values: Any, timeout: float = 60.0, patience: float = 20.0
) -> list[int | None]:
    """Run ``work(number, *values)`` in processes with a group between them; their exit codes, None of one that hung.

    In the group one waits ``patience`` seconds for the others.
    """
    # Each starts as a copy of one process that has imported torch and transformers once.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "rlspec.integrations.transformers"])
    port = free_port()
    started = [
        context.Process(target=_run, args=(number, count, port, patience, work, values))
        for number in range(count)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def _run(number: int, count: int, port: int, patience: float, work: Work, values: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=patience)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count, timeout=limit
    )
    try:
        work(number, *values)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    dist.barrier()  # none leaves while another still reads from it
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def held(model: nn.Module, kind: str, count: int) -> nn.Module:
    """A model as a trainer hands it out: what each process holds of it depends on ``kind``."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind.startswith("fsdp2"):
        whole = {"reshard_after_forward": False} if kind == "fsdp2, whole after a pass" else {}
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, **whole)
        return fully_shard(model, **whole)
    assert kind in ("tp", "tp and fsdp2")
    if kind == "tp":
        mesh = init_device_mesh("cpu", (count,))
    else:
        both = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "tp"))
        mesh = both["tp"]
    plan: Any = {f"self_attn.{p}_proj": ColwiseParallel() for p in "qkv"} | {
        "self_attn.o_proj": RowwiseParallel()
    }
    for layer in model.model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, plan)
        if kind != "tp":
            fully_shard(layer, mesh=both["dp"])
    return model


def toy_with_uneven_layers(seed: int = 0) -> nn.Module:
    """Two shapes of matrices, that no number of processes above 1 divides evenly."""
    return toy_model(seed, num_hidden_layers=3)


def changed(model: nn.Module) -> nn.Module:
    """The same after a step, in each process's part alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(0.003 * torch.sign(parameter))
    return model


def listening() -> list[str]:
    """What rlspec's loggers say in this process from now on."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rlspec").addHandler(handler)
    return told
