"""The emulation itself: it does what a GPU does, and detects errors that a GPU would have."""

import ctypes
import os
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch

from . import VARIANT, load, set_seed
from .build import ROOT, environment

pytestmark = pytest.mark.cpu

SEEDS = range(8)
WARP = 32


def run(kernel, data, n=0, grid=(1, 1, 1), block=(WARP, 1, 1), shared_bytes=0, cluster=(1, 1, 1), seed=0):
    """Run one of kernels.cu on a float32 tensor (or of this size), with a seed."""
    set_seed(seed, "kernels")
    data = torch.zeros(data) if isinstance(data, int) else data
    torch.ops.emulator_test_emulated.run(kernel, data, n, grid, block, shared_bytes, cluster)
    return data


def numbers(count, start=0):
    return torch.arange(start, start + count, dtype=torch.float32)


# --- positions, order


@pytest.mark.parametrize("grid, block", [((3, 2, 4), (4, 2, 3)), ((1, 1, 5), (1, 1, 1)), ((2, 1, 1), (1024, 1, 1))])
def test_positions(grid, block):
    count = torch.Size(grid + block).numel()
    assert torch.equal(run("positions", count, grid=grid, block=block), numbers(count))


@pytest.mark.parametrize("grid, block", [((2, 1, 1), (32, 1, 1)), ((64, 1, 1), (1, 1, 1))])
def test_the_seed_draws_the_order(grid, block):
    orders = [run("order", 65, grid=grid, block=block, seed=seed)[1:].tolist() for seed in (1, 2, 1)]
    assert sorted(orders[0]) == list(range(64))
    assert orders[0] == orders[2] != orders[1] and orders[1] != sorted(orders[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(seed):
    data = run("atomics", 5, grid=(2, 1, 1), block=(50, 1, 1), seed=seed).view(torch.int32).tolist()
    assert data[:3] == [sum(range(100)), 99, 255] and 1 <= data[3] <= 100 and data[4] == 100 % 3


# --- warps


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_shuffles(width):
    idx, up, down, xor = run("shfl", 4 * 64, width, block=(64, 1, 1)).view(4, 64).int().tolist()
    for i in range(64):
        lane, first = i % WARP, i % WARP // width * width
        base = i - lane
        assert idx[i] == base + first + (i + 1) % width
        assert up[i] == (i - 2 if lane - 2 >= first else i)
        assert down[i] == (i + 3 if lane + 3 < first + width else i)
        assert xor[i] == (base + (lane ^ 5) if lane ^ 5 < first + width else i)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_warp_shuffle_apart(seed):
    data = run("shfl_of_a_part", WARP, seed=seed)
    assert data[:16].tolist() == [3 * (i ^ 1) for i in range(16)]
    assert data[16:].tolist() == [16] * 16


@pytest.mark.parametrize("n", [0, 1, 31, 32])
def test_votes(n):
    expected = torch.tensor([n, n > 0, n == WARP] * 2, dtype=torch.float32)
    expected[3:] = torch.tensor([n, n > 0, n == WARP])
    assert torch.equal(run("votes", 6 * WARP, n).view(6, WARP), expected[:, None].expand(6, WARP))


# --- barriers: with them results are the same for all seeds, without them not


def results(kernel, count, n=0, **options):
    return [run(kernel, count, n, shared_bytes=4 * count, block=(count, 1, 1), seed=s, **options) for s in SEEDS]


def sums_of_neighbours(count, n):
    value = numbers(count)
    for _ in range(n):
        value = value + value.roll(-1)
    return value


def test_a_dropped_barrier_is_caught():
    expected = sums_of_neighbours(64, 5)
    assert all(torch.equal(data, expected) for data in results("syncthreads", 64, 5))
    assert not all(torch.equal(data, expected) for data in results("no_syncthreads", 64, 5))


def test_a_dropped_syncwarp_is_caught():
    expected = numbers(WARP).view(-1, 2).flip(1).flatten()
    assert all(torch.equal(data, expected) for data in results("syncwarp", WARP))
    assert not all(torch.equal(data, expected) for data in results("no_syncwarp", WARP))


@pytest.mark.parametrize(
    "kernel, n, message",
    [
        ("divergent_barrier", 0, r"thread \(\d+, 0, 0\): in __syncthreads at .*kernels.cu:\d+, but block .* at "),
        ("barrier_without_some", 3, r"\n  3 exited.*\n  29 in __syncthreads at .*kernels.cu:\d+"),
        ("shfl_without_some", 3, r"(lane [012] has exited|\n  3 exited.*\n  29 in __shfl_xor_sync of mask f{8} at )"),
        ("shfl_and_barrier", 0, "31 in __shfl_xor_sync of mask ffffffff at .*\n  1 in __syncthreads at"),
        ("shfl_outside_the_mask", 0, "__shfl_sync of mask 0000ffff reads from lane 16"),
        ("shfl_of_others", 0, "__shfl_sync of mask 0000ffff, which is without the lane that calls"),
        ("shfl_of_a_strange_width", 3, "a shuffle of width 3"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_waiting_in_vain_is_an_error(kernel, n, message, seed):
    name = rf"CUDA emulation: emulator_test::{kernel}\(float\*, int\): "
    with pytest.raises(RuntimeError, match=rf"{name}(.|\n)*{message}"):
        run(kernel, WARP, n, seed=seed)
    assert torch.equal(run("positions", WARP), numbers(WARP))  # later launches are unaffected


def test_a_warp_has_the_lanes_of_its_block():
    with pytest.raises(RuntimeError, match="in a warp of 16 lanes"):
        run("shfl", 4 * 48, 32, block=(48, 1, 1))


# --- memory


def test_shared_memory_is_not_a_number_at_first():
    assert run("read_shared", 128, grid=(2, 1, 1), block=(64, 1, 1), shared_bytes=256).isnan().all()


@pytest.mark.parametrize("shared_bytes", [4, 124, 128, 4096])
def test_an_overrun_of_shared_memory_is_caught(shared_bytes):
    run("write_shared", 1, shared_bytes // 4 - 1, shared_bytes=shared_bytes)
    if VARIANT == "sanitized":
        return  # test_the_sanitizer_stops_an_overrun
    with pytest.raises(RuntimeError, match=f"has written behind its {shared_bytes} bytes of shared memory"):
        run("write_shared", 1, shared_bytes // 4, shared_bytes=shared_bytes)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"block": (1025, 1, 1)}, "invalid configuration"),
        ({"block": (0, 1, 1)}, "invalid configuration"),
        ({"grid": (1, 65536, 1)}, "invalid configuration"),
        ({"shared_bytes": (48 << 10) + 1}, "invalid argument"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "invalid cluster size"),
        ({"grid": (16, 1, 1), "cluster": (16, 1, 1)}, "invalid cluster size"),
    ],
    ids=str,
)
def test_a_launch_that_no_gpu_takes(options, error):
    with pytest.raises(RuntimeError, match=error):
        run("positions", 1, **options)


# --- clusters


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_read_each_other(seed):
    data = run("cluster", 12 * WARP, grid=(6, 2, 1), cluster=(3, 2, 1), shared_bytes=4 * WARP, seed=seed)
    blocks = (data.view(12, WARP) - numbers(WARP)) / WARP
    for cx, rank in product(range(2), range(6)):

        def block(rank, cx=cx):
            return 3 * cx + rank % 3 + 6 * (rank // 3)

        assert (blocks[block(rank)] == block((rank + 1) % 6)).all()


def test_a_dropped_cluster_barrier_is_caught():
    options = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "shared_bytes": 4 * WARP}
    assert any(run("no_cluster_sync", 2 * WARP, seed=seed, **options).isnan().any() for seed in SEEDS)


def test_a_block_that_has_left_its_cluster_cannot_be_read():
    with pytest.raises(RuntimeError, match="map_shared_rank: block 0 of the cluster has ended"):
        run("cluster_left_early", WARP, grid=(2, 1, 1), cluster=(2, 1, 1), shared_bytes=4 * WARP)


# --- approximations


@pytest.mark.parametrize("number, exact, bound", [(0, torch.tanh, 2**-11), (1, torch.exp2, 2**-22)])
def test_approximations_are_off_by_what_the_manual_allows(number, exact, bound):
    x = torch.linspace(-20, 20, 4096)
    y = run("approximations", x.clone(), number, grid=(128, 1, 1))
    error = (y.double() / exact(x.double()) - 1).abs().max().item()
    assert bound / 2 < error < bound + 2**-24


def test_approximate_reciprocal():
    x = torch.linspace(-20, 20, 4096)
    y = run("approximations", x.clone(), 2, grid=(128, 1, 1))
    ulp = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(y.abs().double())))
    error = ((y.double() - 1 / x.double()).abs() / ulp).max().item()
    assert 0.9 < error < 1


@pytest.mark.parametrize(
    "number, expected",
    [
        # of 0, -0, inf, -inf, nan, 1e-40, -1e-40, 3e38, -140
        (0, [0.0, -0.0, 1.0, -1.0, torch.nan, 1e-40, -1e-40, 1.0, -1.0]),
        (1, [1.0, 1.0, torch.inf, 0.0, torch.nan, 1.0, 1.0, torch.inf, 0.0]),
        (2, [torch.inf, -torch.inf, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 0.0, None]),
    ],
)
def test_approximations_at_the_edges(number, expected):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38, -140.0])
    y = run("approximations", x.clone(), number, block=(len(x), 1, 1))
    for actual, wanted in zip(y, expected, strict=True):
        if wanted is not None:
            wanted = torch.tensor(wanted)
            torch.testing.assert_close(actual, wanted, rtol=2**-11, atol=0, equal_nan=True)
            assert actual.isnan() or actual.signbit() == wanted.signbit()


# --- cuBLAS

TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 14}
FLOAT32, TF32, FLOAT64 = 68, 77, 70


def gemm(c, a, b, alpha=1.0, beta=0.0, transposed=(False, False), compute=None, mode=0, **changed):
    """c = alpha a b + beta c, for each of a batch, by columns: tensors of shape (batch, columns, leading dimension)."""
    cublas = load("kernels")
    handle = ctypes.c_void_p()
    cublas.torch_get_current_cuda_blas_handle(ctypes.byref(handle))
    assert cublas.cublasSetMathMode(handle, mode) == 0
    compute = compute or (FLOAT64 if c.dtype == torch.float64 else FLOAT32)
    scale = ctypes.c_double if compute == FLOAT64 else ctypes.c_float
    k = a.shape[1] if not transposed[0] else changed.pop("k")
    given = {"m": c.shape[2], "n": c.shape[1], "k": k, "lda": a.shape[2], "ldb": b.shape[2], "ldc": c.shape[2]}
    given |= {"handle": handle, "alpha_at": ctypes.byref(scale(alpha)), "a_at": a.data_ptr()} | changed
    pointer, long = ctypes.c_void_p, ctypes.c_longlong
    return cublas.cublasGemmStridedBatchedEx(
        *(given["handle"], *map(int, transposed), given["m"], given["n"], given["k"], given["alpha_at"]),
        *(pointer(given["a_at"]), TYPES[a.dtype], given["lda"], long(a.stride(0))),
        *(pointer(b.data_ptr()), TYPES[b.dtype], given["ldb"], long(b.stride(0))),
        *(ctypes.byref(scale(beta)), pointer(c.data_ptr()), TYPES[c.dtype], given["ldc"], long(c.stride(0))),
        *(c.shape[0], compute, -1),
    )


@pytest.mark.parametrize("transposed", list(product([False, True], repeat=2)))
@pytest.mark.parametrize(
    "dtype, out", [*((t, t) for t in TYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str
)
def test_gemm(dtype, out, transposed):
    batch, m, n, k = 3, 5, 4, 6
    a = torch.randn((batch, m, k) if transposed[0] else (batch, k, m), dtype=torch.float64).to(dtype)
    b = torch.randn((1, k, n) if transposed[1] else (1, n, k), dtype=torch.float64).to(dtype).expand(batch, -1, -1)
    # Row-major memory is column-major to cuBLAS: c' = b' a'.
    product_ = (b.mT if transposed[1] else b).double() @ (a.mT if transposed[0] else a).double()
    tolerance = {"rtol": 2 * torch.finfo(out).eps, "atol": 8 * max(torch.finfo(out).eps, 1e-7)}
    for beta in (0.0, 0.5):
        c = torch.full((batch, n, m), torch.nan if beta == 0 else 3.0, dtype=out)
        assert gemm(c, a, b, alpha=2.0, beta=beta, transposed=transposed, k=k) == 0
        torch.testing.assert_close(c.double(), 2 * product_ + 3 * beta, **tolerance)


def test_gemm_in_tf32():
    a, b, c = torch.randn(1, 64, 32), torch.randn(1, 16, 64), torch.empty(1, 16, 32)
    exact = b.double() @ a.double()
    errors = []
    for options in ({}, {"compute": TF32}, {"mode": 1}):
        assert gemm(c, a, b, **options) == 0
        errors.append((c - exact).abs().max().item())
    assert errors[0] < 1e-5 and errors[1] == errors[2] and 1e-3 < errors[1] < 1e-1


@pytest.mark.parametrize(
    "changed", [{"lda": 31}, {"ldb": 63}, {"ldc": 31}, {"m": -1}, {"alpha_at": None}, {"a_at": None}]
)
def test_gemm_refuses_what_cublas_refuses(changed):
    a, b, c = torch.randn(1, 64, 32), torch.randn(1, 16, 64), torch.empty(1, 16, 32)
    assert gemm(c, a, b) == 0
    assert gemm(c, a, b, **changed) == 7
    assert gemm(c, a, b, handle=ctypes.c_void_p()) == 1
    assert gemm(c.half(), a, b) == gemm(c, a.half(), b) == gemm(c, a, b, compute=FLOAT64) == 15


# --- the other builds, each in a separate process

only_from_plain = pytest.mark.skipif(VARIANT != "plain", reason="one process in another is enough")
SANITIZER_CASES = [
    ("write_shared", 1, 7, {"shared_bytes": 32}, None),
    ("write_shared", 1, 8, {"shared_bytes": 32}, "heap-buffer-overflow"),
    ("read_shared", WARP, 0, {"shared_bytes": 4 * WARP}, None),
    ("read_shared", WARP, 0, {"shared_bytes": 4 * WARP - 4}, "heap-buffer-overflow"),
    ("write_global", 5, 4, {}, None),
    ("write_global", 5, 5, {}, "heap-buffer-overflow"),
    ("read_global", 5, 5, {}, "heap-buffer-overflow"),
    ("read_vector", 8, 4, {}, None),
    ("read_vector", 8, 3, {}, "misaligned address"),
]


THIS = "tests/cuda_emulation/test_emulator.py"


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=pytest.mark.beside(THIS, "-x", environment=partial(environment, variant)))
        for variant in ("ucontext", "sanitized")
    ],
)
def test_other_builds(variant, beside):
    assert beside.returncode == 0 and " passed" in beside.stdout, beside.stdout[-4000:]


def run_sanitizer_cases():
    """Run each in a child process: success, and output."""
    load("kernels")
    for kernel, size, n, options, _ in SANITIZER_CASES:
        print(f"--- {kernel}", flush=True)
        if (child := os.fork()) == 0:
            run(kernel, size, n, **options)
            os._exit(0)
        print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@only_from_plain
def test_the_sanitizers_stop_an_overrun_by_one_element():
    script = "from cuda_emulation import test_emulator; test_emulator.run_sanitizer_cases()"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=environment("sanitized") | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT / "tests",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    outputs = process.stdout.split("--- ")[1:]
    assert len(outputs) == len(SANITIZER_CASES), process.stdout
    for output, (*_, error) in zip(outputs, SANITIZER_CASES, strict=True):
        assert ("ended with 0" in output) == (error is None), output
        assert error is None or error in output, output
