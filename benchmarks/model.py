"""What a GPU cannot do faster: the bytes that each kernel moves, and the machines that move them.

Times that follow from it are predictions: a kernel takes as long as its bytes, or as its instructions.
"""

from math import ceil, prod
from typing import NamedTuple

KB, MB = 1 << 10, 1 << 20
WARP = 32


class GPU(NamedTuple):
    """A machine; sizes are those of one multiprocessor (SM), unless they say otherwise.

    Attributes:
        capability: of CUDA.
        copy: bytes per second of a large copy, read and written.
        sms: multiprocessors.
        clock: cycles per second.
        fma: float32 multiply-adds per cycle.
        mufu: special functions (tanh, exponential, reciprocal) per cycle.
        warps: most at once.
        blocks: most at once.
        registers: bytes.
        shared: bytes of shared memory.
        shared_per_block: bytes of it that one block can have.
        cluster: most blocks in a cluster; 1 where there are none.
        l2: bytes, of the whole GPU.
        tensor: multiplications and additions per second that large GEMMs reach, by bytes per element: 4 is TF32.
    """

    capability: tuple[int, int]
    copy: float
    sms: int
    clock: float
    fma: int
    mufu: int
    warps: int
    blocks: int
    registers: int
    shared: int
    shared_per_block: int
    cluster: int
    l2: int
    tensor: dict[int, float]

    @property
    def arch(self) -> str:
        return "sm_{}{}".format(*self.capability)

    @property
    def issue(self) -> float:
        """Instructions per second, counted by thread: each of an SM's four schedulers issues one of a warp a cycle."""
        return self.sms * self.clock * 4 * WARP

    @property
    def without_tensor(self) -> float:
        """Multiplications and additions of float32 per second, without tensor cores."""
        return 2 * self.fma * self.sms * self.clock

    def occupancy(self, threads: int, registers: int, shared: int) -> int:
        """The warps that an SM holds of a kernel, by a block's threads and shared bytes, and a thread's registers.

        Registers are given out to warps by 256, from four files; shared memory by 128 bytes, and the system takes 1 KB
        of every block.
        """
        warps = ceil(threads / WARP)
        by_registers = 4 * (self.registers // 4 // (4 * _round_up(WARP * registers, 256)))
        by_shared = self.shared // _round_up(shared + KB, 128)
        return warps * min(self.blocks, self.warps // warps, by_registers // warps, by_shared)


def _round_up(count: int, unit: int) -> int:
    return ceil(count / unit) * unit


GPUS = {  # by their names in torch.cuda.get_device_name()
    "NVIDIA GeForce RTX 3090": GPU(
        (8, 6), 840e9, 82, 1.695e9, 128, 16, 48, 16, 256 * KB, 100 * KB, 99 * KB, 1, 6 * MB, {4: 31e12, 2: 62e12}
    ),
    "NVIDIA H200": GPU(
        (9, 0), 4.3e12, 132, 1.98e9, 128, 16, 64, 32, 256 * KB, 228 * KB, 227 * KB, 8, 50 * MB, {4: 395e12, 2: 790e12}
    ),
}
# Triton's kernels are compiled for these as well. Copies and products reach as large a share of what the data sheet
# has as above.
OTHER_GPUS = {
    "NVIDIA A100-SXM4-80GB": GPU(
        (8, 0), 1.83e12, 108, 1.41e9, 64, 16, 64, 32, 256 * KB, 164 * KB, 163 * KB, 1, 40 * MB, {4: 125e12, 2: 250e12}
    ),
    "NVIDIA GeForce RTX 5090": GPU(
        (12, 0), 1.61e12, 170, 2.41e9, 128, 16, 48, 24, 256 * KB, 100 * KB, 99 * KB, 8, 96 * MB, {4: 91e12, 2: 182e12}
    ),
}

# What runs here is the code of another one above; copies and products as measured on one.
SAME_CODE = {
    "NVIDIA H100 80GB HBM3": GPUS["NVIDIA H200"]._replace(copy=3.0e12),
}


def gpu_named(name: str) -> GPU | None:
    """As ``torch.cuda.get_device_name()`` says it; None for one that is not known."""
    return (GPUS | OTHER_GPUS | SAME_CODE).get(name)


def kernel_passes(upsample: int, channels_last: bool) -> dict[str, tuple[int, int]]:
    """How often each kernel must read and write as many elements as x has, by its name; for GConv, as u has."""
    large = upsample**2
    return {
        "spn_statistics_kernel": (2, 0),  # x and p
        "statistics_kernel": (2, 0),  # the same in Triton
        "spn_fwd_modulate_kernel": (2, large),  # x and p; y
        "spn_bwd_reduce_kernel": (2 + large, 0),  # x, p and dy
        # x, p and dy; dx and dp, and in NCHW x anew, for the GEMM of the weight's gradient
        "spn_bwd_apply_kernel": (2 + large, 2 + (not channels_last)),
        # Of Triton alone; the first sums up the statistics as well.
        "spn_projection_kernel, forward": (1, 1),  # x; p
        "spn_projection_kernel, backward": (2, 1),  # dp and dx; dx
        "gconv_mix_fwd_kernel": (1, 1),  # u; y
        "gconv_mix_bwd_input_kernel": (2, 1),  # dy and u; du
        "gconv_mix_bwd_weight_kernel": (2, 0),  # dy and u
    }


def kernel_bytes(shape: tuple[int, ...], itemsize: int, upsample: int, channels_last: bool) -> dict[str, int]:
    """The bytes that each kernel must read and write, by its name.

    Args:
        shape: of x or u; SPN's y and its gradient have ``upsample``² times as many pixels.
        itemsize: bytes per element of it.
        upsample: 1 or 2.
        channels_last: the layout.
    """
    passes = kernel_passes(upsample, channels_last)
    return {name: (reads + writes) * itemsize * prod(shape) for name, (reads, writes) in passes.items()}


def spn_times(gpu: GPU, shape: tuple[int, ...], itemsize: int, upsample: int) -> tuple[float, float]:
    """Predicted seconds of SPN, forward and backward, by its bytes and its products; ``shape`` is that of x."""
    moved = kernel_bytes(shape, itemsize, upsample, channels_last=True)
    forward = moved["spn_statistics_kernel"] + moved["spn_fwd_modulate_kernel"]
    backward = moved["spn_bwd_reduce_kernel"] + moved["spn_bwd_apply_kernel"]
    products = gemm_times(gpu, shape, itemsize)
    return products[0] + forward / gpu.copy, products[1] + backward / gpu.copy


def gemm_times(gpu: GPU, shape: tuple[int, ...], itemsize: int) -> tuple[float, float]:
    """Predicted seconds of the projection's GEMMs, forward and backward; ``shape`` is that of x.

    Forward reads x and writes p; backward reads dp and adds to dx, then reads dp and x.
    """
    pixels, tensor = prod(shape) // shape[1], itemsize * prod(shape)
    multiplying = 2 * pixels * shape[1] ** 2 / gpu.tensor[itemsize]
    forward, grad_input, grad_weight = (max(passes * tensor / gpu.copy, multiplying) for passes in (2, 3, 2))
    return forward, grad_input + grad_weight
