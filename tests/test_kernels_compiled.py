"""Every kernel, configuration and target compiled ahead of time, against limits and against the committed table."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

from rlspec.kernels.compiling import _ATOMIC, Key, built, compiled, keys
from rlspec.kernels.configs import PRODUCT, SHARED_LIMIT, product_config
from rlspec.kernels.report import committed
from rlspec.perturb.sample import Sample

KEYS = {key.name: key for key in keys()}
KERNELS = Path(__file__).parent.parent / "kernels" / "triton"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", KEYS)
def test_compiles_within_limits_and_as_the_table_says(name: str) -> None:
    made = compiled(KEYS[name])
    assert made.problems(KEYS[name]) == []
    table = committed()
    if table["triton"] == triton.__version__:  # other releases allot registers otherwise
        assert asdict(made) == table["kernels"][name], "python -m rlspec.kernels.report makes the table anew"


def test_every_kernel_and_every_configuration_is_compiled() -> None:
    written = {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert written == {key.kernel for key in KEYS.values()}
    assert len(KEYS) == len(list(keys()))  # no two keys of one name
    assert set(committed()["kernels"]) == set(KEYS)
    chosen = {
        (key.target, c["BR"], c["BC"], c["BK"]) for key in KEYS.values() if "BC" in (c := key.constants)
    }
    for (family, _), sizes in PRODUCT.items():
        for config in sizes:
            assert family == "interpreter" or (family, *config[:3]) in chosen


def test_samples_of_a_result_are_multiplied_in_tiles_of_their_width() -> None:
    """And not in tiles of 128 columns, most of which would be padding."""
    for k in (1, 4, 9, 20, 64, 717):
        columns = Sample(k).combinations(k).shape[-1]
        for (family, precision), sizes in PRODUCT.items():
            if family != "interpreter":
                tile = product_config(family, precision, columns)
                assert tile.columns < 2 * columns <= 2 * tile.columns
                assert tile in (sizes.few, sizes.some)


def product(target: str, *words: str) -> Key:
    """The first key of a product whose name has all the words."""
    return next(
        k
        for name, k in KEYS.items()
        if f"delta_matmul_kernel {target} " in name and all(w in name for w in words)
    )


def test_the_gate_sees_spills() -> None:
    key = product("sm_90", "transposed, fp32", "tf32x3", "up to 32")
    wide = replace(key, constants=key.constants | {"BK": 64})
    assert any("spilled" in problem for problem in compiled(wide).problems(wide))


def test_the_gate_sees_shared_memory_that_is_not_there() -> None:
    key = replace(product("sm_80", "plain, bf16", "bf16 products", "many"), stages=6)
    made = compiled(key)
    assert made.shared_bytes > SHARED_LIMIT["sm_80"]
    assert any("bytes of shared memory" in problem for problem in made.problems(key))


def test_the_gate_sees_products_without_tensor_cores() -> None:
    key = product("sm_90", "plain, bf16", "tf32x3", "up to 32")
    scalar = replace(key, constants=key.constants | {"PRECISION": "ieee"})
    assert "no instruction of tensor cores" in compiled(scalar).problems(scalar)


def test_the_gate_sees_lost_alignment_and_atomics() -> None:
    key = next(iter(KEYS.values()))
    unaligned = replace(key, constants=key.constants | {"ALIGNED": False})
    assert any("no load of 16 bytes" in problem for problem in compiled(unaligned).problems(unaligned))
    for line in ("\tatom.global.gpu.acq_rel.add.f32 ", "\tred.global.add.f32 ", "\tglobal_atomic_add_f32 v0"):
        assert _ATOMIC.search(line)


_COARSE = re.compile(r"\b(div\.full|(?:div|sqrt|rsqrt|rcp)\.approx)\.")


def test_rotations_are_rounded_to_the_nearest() -> None:
    """Triton's plain division and root of float32 are not, and the interpreter's are: no other test can see it."""
    for bits in (32, 64):
        key = next(
            k for name, k in KEYS.items() if name.startswith(f"jacobi_kernel sm_90 float{bits}, up to 32")
        )
        text = built(key).asm["ptx"]
        assert f"sqrt.rn.f{bits}" in text and f"div.rn.f{bits}" in text and not _COARSE.search(text)
    plain = next(
        k for k in KEYS.values() if k.kernel.startswith("sylvester_rotation") and k.target == "sm_90"
    )
    assert _COARSE.search(built(plain).asm["ptx"])


def test_registers_are_what_the_key_allows() -> None:
    key = next(k for name, k in KEYS.items() if name.startswith("jacobi_kernel sm_90 float64, up to 64"))
    assert compiled(key).problems(key) == []
    tight = replace(key, registers=64)
    assert compiled(tight).registers <= 64 and any("spilled" in p for p in compiled(tight).problems(tight))
