"""GPUs, and the times that no kernel can beat on them: of bytes, of instructions, of matrix products."""

from math import ceil
from typing import NamedTuple

KB, MB = 1 << 10, 1 << 20
WARP = 32


class GPU(NamedTuple):
    """Sizes and rates are per multiprocessor (SM), unless they say otherwise."""

    capability: tuple[int, int]  # of CUDA
    copy: float  # bytes per second of a large copy, read and written, of the whole GPU
    sms: int
    clock: float  # cycles per second
    fma: int  # float32 multiply-adds per cycle
    warps: int  # most resident
    blocks: int  # most resident
    registers: int  # bytes
    shared: int  # bytes of shared memory
    shared_per_block: int  # most bytes of it for one block
    tensor: dict[int, float]  # operations per second of large GEMMs, of the whole GPU, by itemsize: 4 is TF32

    @property
    def arch(self) -> str:
        return "sm_{}{}".format(*self.capability)

    @property
    def issue(self) -> float:
        """Thread instructions per second: each of four schedulers per SM issues one warp instruction per cycle."""
        return self.sms * self.clock * 4 * WARP

    def product_time(self, products: int, itemsize: int, tensor_cores: bool = True) -> float:
        """Seconds of a GEMM of so many multiply-adds."""
        return 2 * products / (self.tensor[itemsize] if tensor_cores else 2 * self.fma * self.sms * self.clock)

    def occupancy(self, threads: int, registers: int, shared: int) -> int:
        """The warps of a kernel that an SM holds, by threads and shared bytes per block and registers per thread.

        Registers are allocated to warps by 256, from four files; shared memory by 128 bytes, and the system reserves
        1 KB per block.
        """
        warps = ceil(threads / WARP)
        by_registers = 4 * (self.registers // 4 // (4 * _round_up(WARP * registers, 256)))
        by_shared = self.shared // _round_up(shared + KB, 128)
        return warps * min(self.blocks, self.warps // warps, by_registers // warps, by_shared)


def _round_up(count: int, unit: int) -> int:
    return ceil(count / unit) * unit


# By torch.cuda.get_device_name(). CUDA C++ is compiled for these:
GPUS = {
    "NVIDIA GeForce RTX 3090": GPU(
        (8, 6), 840e9, 82, 1.695e9, 128, 48, 16, 256 * KB, 100 * KB, 99 * KB, {4: 31e12, 2: 62e12}
    ),
    "NVIDIA H200": GPU((9, 0), 4.3e12, 132, 1.98e9, 128, 64, 32, 256 * KB, 228 * KB, 227 * KB, {4: 395e12, 2: 790e12}),
}
# Triton kernels also for these. Copies and GEMMs are assumed to reach the same share of the data sheet as above.
OTHER_GPUS = {
    "NVIDIA A100-SXM4-80GB": GPU(
        (8, 0), 1.83e12, 108, 1.41e9, 64, 64, 32, 256 * KB, 164 * KB, 163 * KB, {4: 125e12, 2: 250e12}
    ),
    "NVIDIA GeForce RTX 5090": GPU(
        (12, 0), 1.61e12, 170, 2.41e9, 128, 48, 24, 256 * KB, 100 * KB, 99 * KB, {4: 91e12, 2: 182e12}
    ),
}
# These run the code of another; copies as measured.
SAME_CODE = {"NVIDIA H100 80GB HBM3": GPUS["NVIDIA H200"]._replace(copy=3.0e12)}


def gpu_named(name: str) -> GPU | None:
    """By ``torch.cuda.get_device_name()``; None for an unknown one."""
    return (GPUS | OTHER_GPUS | SAME_CODE).get(name)
