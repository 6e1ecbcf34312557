"""Which tests may be skipped, and where: with ``--strict-skips``, as `make test` asks, any other skip is a failure.

Plain ``pytest`` skips what the environment cannot run, and says so.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from browser import browser
from slurm_toy import without_slurm


class Meant(NamedTuple):
    """A skip that is meant: its reason, as the test gives it, and whether this machine is one that it is meant for."""

    reason: str
    here: Callable[[], bool]


def _without_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _without_browser() -> bool:
    return browser() is None


def without_cairosvg() -> bool:
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):  # it is a package around a system's library
        return True
    return False


def _without_triton_wheels() -> bool:
    return (platform.system(), platform.machine()) != ("Linux", "x86_64")


def _with_one_float32() -> bool:
    from rlspec.linalg import flags

    return not flags.own_kernels_pay()


def _without_backend_flags() -> bool:
    from rlspec.linalg import flags

    return not flags.has_backend_flags()


def _without_submitit() -> bool:
    return importlib.util.find_spec("submitit") is None


def _without_wandb() -> bool:
    return importlib.util.find_spec("wandb") is None


def _without_trackio() -> bool:
    return importlib.util.find_spec("trackio") is None


def _without_nvcc() -> bool:
    return shutil.which("nvcc") is None


_TRITON = Meant("triton is not installed", _without_triton_wheels)
#: "file::function", or "file" for all of it -> the skips that are meant there
MEANT: dict[str, tuple[Meant, ...]] = {
    "test_io_device.py::test_on_a_gpu": (Meant("no GPU", _without_gpu),),
    "test_io_stream.py::test_the_page_cache_stays_as_it_was": (
        # What the temporary folder's file system can do shows only when it is tried.
        Meant("this file system has no direct reads", lambda: True),
        Meant("this file system keeps its files in memory", lambda: True),
    ),
    # Large, with many dependencies, and not in the test extra.
    "test_integrations_loggers.py::test_wandb_offline": (Meant("wandb is not installed", _without_wandb),),
    "test_integrations_loggers.py::test_trackio": (Meant("trackio is not installed", _without_trackio),),
    "test_linalg_switches.py": (
        Meant("this CPU multiplies float32 matrices in one way only", _with_one_float32),
    ),
    "test_linalg_precision.py": (Meant("this torch has one flag for all backends", _without_backend_flags),),
    "test_report_browser.py": (Meant("no Chromium", _without_browser),),
    "test_report_figures.py::test_a_png_shows_the_lines_where_the_svg_has_them": (
        Meant("no cairosvg, or no Cairo library", without_cairosvg),
    ),
    "test_backend.py::test_the_interpreter_on_request": (_TRITON,),
    "test_op_delta_stats.py::test_in_the_interpreter": (_TRITON,),
    "test_op_delta_matmul.py::test_in_the_interpreter": (_TRITON,),
    "test_op_chebyshev_step.py::test_in_the_interpreter": (_TRITON,),
    "test_linalg_kernels.py::test_svd_in_the_interpreter": (_TRITON,),
    "test_op_residual_norms.py::test_in_the_interpreter": (_TRITON,),
    "test_op_gram.py::test_in_the_interpreter": (_TRITON,),
    "test_spectra_kernels.py::test_tracking_in_the_interpreter": (_TRITON,),
    "test_kernels_compiled.py": (_TRITON,),
    "test_linalg_solvers.py::test_on_a_gpu": (Meant("no GPU", _without_gpu),),
    "test_cuda_compiled.py": (Meant("no nvcc", _without_nvcc),),
    "test_cuda_compiled.py::test_every_kernel_compiles_within_limits": (
        # Which targets and headers a toolkit has shows only when it is asked.
        Meant("this nvcc is older than the target", lambda: True),
    ),
    "test_cuda_compiled.py::test_cusolver_compiles_where_its_headers_are": (
        Meant("no headers of cuSOLVER", lambda: True),
    ),
    "test_study.py::test_jobs_of_a_cluster_change_no_result": (
        Meant("submitit is not installed", _without_submitit),
    ),
    "test_study_slurm.py": (
        Meant("submitit is not installed", _without_submitit),
        Meant("no Slurm, or not root's", without_slurm),
    ),
}


def is_meant(node: str, reason: str) -> bool:
    """Whether the test or file ``node``, as pytest names it, may be skipped here for ``reason``."""
    # Parameters go first: there may be any text in them.
    file, *inside = node.partition("[")[0].rpartition("/")[2].split("::")
    function = f"{file}::{inside[-1]}" if inside else file
    meant = (*MEANT.get(file, ()), *MEANT.get(function, ()))
    return any(skip.reason == reason and skip.here() for skip in meant)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail for a skip that tests/skips.py does not list"
    )


def _judge(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (config.getoption("--strict-skips") and report.skipped) or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not is_meant(report.nodeid, reason):
        report.outcome = "failed"
        report.longrepr = f"skipped ({reason}), which tests/skips.py does not list for this machine"


# At the report, not at the session's end: it is the same under pytest-xdist, whose workers make the reports.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    _judge(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _judge(collector.config, report)
    return report
