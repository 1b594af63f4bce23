"""Between the two walks of SPN's backward: what follows from the sums of reduce, for parameters, rows and apply."""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import SIZES, to_accumulator
from pixnorm.triton_kernels.spn_rows import group_at


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_finish_kernel(
    sums_ptr, gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, mask_weight_ptr, index_ptr,
    d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr, d_mask_weight_ptr, d_mask_bias_ptr, means_ptr,
    N, C, G, parts, count, K: tl.constexpr, TRAINING: tl.constexpr, ONE_MASK: tl.constexpr, GROUPED: tl.constexpr,
    PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One channel per program: adds its parts up; writes the gradients of its parameters, and the means
    [C][dy γ, dy γ x̂, dq, dq p̂] that batch norm's backward subtracts (0 if the statistics were given).

    Σ dy γ = <gamma taps, gradients of the beta taps>, and Σ dy γ x̂ = <gamma taps, their gradients>.

    If GROUPED, one channel of one group: its parts, gradients, and terms [C][G] of the means, without those of the rows
    and with w dq in place of dq (see spn_bwd_apply_kernel).
    """
    c = tl.program_id(0)
    of_group = c  # the channel in tables of parameters, [G][C]
    to = means_ptr + c * 4
    if GROUPED:
        group = tl.program_id(1)
        of_group = group.to(tl.int64) * C + c
        to = means_ptr + (c.to(tl.int64) * G + group) * 4
    o_part = tl.arange(0, PARTS)
    o_sum = tl.arange(0, SUMS)
    exists = o_sum < 4 * K * K + 2
    of_channel = sums_ptr + c.to(tl.int64) * parts * (4 * K * K + 2) + o_sum[None, :]
    total = to_accumulator(tl.zeros([SUMS], dtype=tl.float32), sums_ptr)
    present = 0  # parts of the group
    for first in range(0, parts, PARTS):
        part = first + o_part
        valid = (part < parts)[:, None] & exists[None, :]
        if GROUPED:
            own = group_at(index_ptr, tl.minimum(part, parts - 1) // (parts // N), G) == group
            valid = valid & own[:, None]
            present += tl.sum(own.to(tl.int32), axis=0)
        total += tl.sum(tl.load(of_channel + part[:, None] * (4 * K * K + 2), mask=valid, other=0.0), axis=0)

    which = o_sum // (K * K)
    at = of_group * (K * K) + o_sum % (K * K)
    weight = to_accumulator(tl.load(gamma_ptr + at, mask=which == 0, other=0.0), sums_ptr)
    weight += to_accumulator(tl.load(gamma_inv_ptr + at, mask=which == 1, other=0.0), sums_ptr)
    g_x = tl.sum(weight * total, axis=0)
    weight = to_accumulator(tl.load(gamma_ptr + at, mask=which == 2, other=0.0), sums_ptr)
    weight += to_accumulator(tl.load(gamma_inv_ptr + at, mask=which == 3, other=0.0), sums_ptr)
    g = tl.sum(weight * total, axis=0)
    q = tl.sum(tl.where(o_sum == 4 * K * K, total, 0.0), axis=0)
    q_p = tl.sum(tl.where(o_sum == 4 * K * K + 1, total, 0.0), axis=0)

    tl.store(d_gamma_ptr + at, total.to(d_gamma_ptr.dtype.element_ty), mask=which == 0)
    tl.store(d_gamma_inv_ptr + at, total.to(d_gamma_ptr.dtype.element_ty), mask=which == 1)
    tl.store(d_beta_ptr + at, total.to(d_gamma_ptr.dtype.element_ty), mask=which == 2)
    tl.store(d_beta_inv_ptr + at, total.to(d_gamma_ptr.dtype.element_ty), mask=which == 3)
    if not ONE_MASK:
        tl.store(d_mask_weight_ptr + of_group, q_p.to(d_mask_weight_ptr.dtype.element_ty))
        tl.store(d_mask_bias_ptr + of_group, q.to(d_mask_bias_ptr.dtype.element_ty))
        if GROUPED:
            scale = to_accumulator(tl.load(mask_weight_ptr + of_group), sums_ptr)
            q *= scale
            q_p *= scale
    if GROUPED:
        # Not 0 times NaN or infinity in the parameters of a group without samples.
        g = tl.where(present > 0, g, 0.0)
        g_x = tl.where(present > 0, g_x, 0.0)
        q = tl.where(present > 0, q, 0.0)
        q_p = tl.where(present > 0, q_p, 0.0)
    if TRAINING:
        centre = 1.0 / (to_accumulator(tl.full([], 1.0, tl.float32), sums_ptr) * count)
        tl.store(to, g * centre)
        tl.store(to + 1, g_x * centre)
        tl.store(to + 2, q * centre)
        tl.store(to + 3, q_p * centre)
    else:  # not means * 0, which would keep NaN
        tl.store(to + tl.arange(0, 4), tl.zeros([4], dtype=tl.float32))


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_finish_rows_kernel(
    sums_ptr, of_groups_ptr, gamma_bias_ptr, d_gamma_bias_ptr, d_beta_bias_ptr, means_ptr, N, C, G, parts, count,
    K: tl.constexpr, TRAINING: tl.constexpr, GAMMA_BIAS: tl.constexpr, BETA_BIAS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One channel per program: the gradients of its rows, and its means, of the groups' terms and those of the rows.

    The gradients are Σ dγ and Σ dβ of a sample. They are the sums of the middle tap, which is always inside the image:
    with m plus with 1 - m.
    """
    c = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, AT_ONCE)
    o_mean = tl.arange(0, 4)
    each = 1.0 / (to_accumulator(tl.full([], 1.0, tl.float32), sums_ptr) * count)
    total = to_accumulator(tl.zeros([4], dtype=tl.float32), sums_ptr)
    for first in range(0, G, AT_ONCE):
        group = first + o
        at = of_groups_ptr + (c * G + group)[:, None] * 4 + o_mean[None, :]
        total += tl.sum(tl.load(at, mask=(group < G)[:, None], other=0.0), axis=0)
    if GAMMA_BIAS | BETA_BIAS:
        zero = to_accumulator(tl.zeros([AT_ONCE], dtype=tl.float32), sums_ptr)
        g = zero
        g_x = zero
        for first in range(0, N, AT_ONCE):
            n = first + o
            exists = n < N
            d_gamma = zero
            d_beta = zero
            for part in range(0, parts // N):
                middle = sums_ptr + (c * parts + n * (parts // N) + part) * (4 * K * K + 2) + (K * K) // 2
                d_gamma += tl.load(middle, mask=exists, other=0.0)
                d_gamma += tl.load(middle + K * K, mask=exists, other=0.0)
                d_beta += tl.load(middle + 2 * K * K, mask=exists, other=0.0)
                d_beta += tl.load(middle + 3 * K * K, mask=exists, other=0.0)
            row = n * C + c
            if GAMMA_BIAS:
                tl.store(d_gamma_bias_ptr + row, d_gamma.to(d_gamma_bias_ptr.dtype.element_ty), mask=exists)
                bias = tl.load(gamma_bias_ptr + row, mask=exists, other=0.0).to(zero.dtype)
                g += bias * d_beta
                g_x += bias * d_gamma
            if BETA_BIAS:
                tl.store(d_beta_bias_ptr + row, d_beta.to(d_beta_bias_ptr.dtype.element_ty), mask=exists)
        if TRAINING:
            total += tl.where(o_mean == 0, tl.sum(g, axis=0) * each, 0.0)
            total += tl.where(o_mean == 1, tl.sum(g_x, axis=0) * each, 0.0)
    tl.store(means_ptr + c * 4 + o_mean, total)
