"""SPN's backward: reduce (the sums of each channel), finish (what follows from them), apply (the gradients of x and p).

Neither x̂, γ nor the mask are read: they come from x and p, as in forward. dβ is dy, where ReLU lets it through, and
dγ = dy x̂; the mask's gradient dm gathers both through the stencils.
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import SIZES, activation_gradient, load_columns, store_columns, to_accumulator
from pixnorm.triton_kernels.spn_rows import (
    apply_stencil,
    channel_value,
    columns_around,
    inside_sums,
    lanes_of,
    load_row,
    mask_function,
    mask_row,
    masks_from,
    planes_of,
    reciprocal_std,
    rows_around,
    stencil,
)


@triton.jit
def gradients_of_row(
    dy_ptr, x_ptr, p_ptr, plane, y_plane, p_plane, pixel, p_pixel, h, w, H, W, live, columns, slope, shift,
    rstd, centre, gamma, gamma_inverse, beta, beta_inverse, masks,
    K: tl.constexpr, U: tl.constexpr, V: tl.constexpr, REACH: tl.constexpr, AROUND: tl.constexpr, HALO: tl.constexpr,
    ACTIVATED: tl.constexpr, SLOPE: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr, P_WIDE: tl.constexpr,
):  # fmt: skip
    """x̂ and dβ ([a][column and b]) of row h, AROUND columns to either side included; dβ is 0 outside of the image.

    Args:
        masks: the 2 REACH rows up to row h + REACH, which is added to them.

    Returns:
        masks, x̂, dβ; which of the rows around are inside, whether this lane's is, and ``inside_sums`` of gamma.
    """
    row = mask_row(
        p_ptr, p_plane, p_pixel, h + REACH, w, H, W, live, columns, slope, shift, V, HALO, LANES, P_WIDE
    )  # fmt: skip
    masks = masks + (row,)
    inside = rows_around(h, H, REACH)
    here = live & inside[REACH]
    x = load_row(x_ptr, plane, (h * W + w) * pixel, pixel, here, columns, V, AROUND, HALO, 1, LANES, WIDE)
    x_hat = normalised(x, rstd, centre, V + 2 * AROUND)
    gamma_inside = inside_sums(gamma_inverse, inside, K, U, REACH)
    beta_inside = inside_sums(beta_inverse, inside, K, U, REACH)
    d_beta = ()
    for a in tl.static_range(U):
        at = ((h * U + a) * (W * U) + w * U) * pixel
        values = load_row(dy_ptr, y_plane, at, pixel, here, columns, V, AROUND, HALO, U, LANES, WIDE)
        if ACTIVATED:
            passed = ()
            for j in tl.static_range(V + 2 * AROUND):
                for b in tl.static_range(U):
                    g = apply_stencil(gamma, gamma_inside, masks, columns, a, b, j - AROUND, K, U, V, REACH, HALO)
                    y = apply_stencil(beta, beta_inside, masks, columns, a, b, j - AROUND, K, U, V, REACH, HALO)
                    y += g * x_hat[j]
                    passed = passed + (activation_gradient(y, values[j * U + b], SLOPE),)
            values = passed
        d_beta = d_beta + (values,)
    return masks, x_hat, d_beta, inside, here, gamma_inside


@triton.jit
def normalised(values, rstd, centre, COUNT: tl.constexpr):
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (values[j] * rstd + centre,)
    return found


@triton.jit
def gather_mask_gradient(
    dm, gamma, beta, d_beta, x_hat, K: tl.constexpr, U: tl.constexpr, V: tl.constexpr, REACH: tl.constexpr
):
    """What a row of dβ (and with it dγ) adds to the 2 REACH + 1 rows of dm around it."""
    R: tl.constexpr = K // 2
    rows = ()
    for i in tl.static_range(-REACH, REACH + 1):
        row = ()
        for column in tl.static_range(V):
            total = dm[i + REACH][column]
            for a in tl.static_range(U):
                if (a - R) // U <= i:
                    if i <= (a + R) // U:
                        for b in tl.static_range(U):
                            for j in tl.static_range((b - R) // U, (b + R) // U + 1):
                                of_gamma = gamma[a][b][i - (a - R) // U][j - (b - R) // U]
                                of_beta = beta[a][b][i - (a - R) // U][j - (b - R) // U]
                                tap = of_gamma * x_hat[column - j + REACH] + of_beta
                                total += tap * d_beta[a][(column - j + REACH) * U + b]
            row = row + (total,)
        rows = rows + (row,)
    return rows


@triton.jit
def add_tap_sums(
    sums, d, masks, rows, columns,
    K: tl.constexpr, U: tl.constexpr, V: tl.constexpr, REACH: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """For each tap: Σ d m and Σ d, m being the mask where the tap falls, both over the pixels where that is inside.

    Args:
        d: gradients of a row's own pixels, [a][column and b].
        rows, columns: of ``rows_around`` and ``columns_around``.
    """
    R: tl.constexpr = K // 2
    with_mask = ()
    with_inside = ()
    for ky in tl.static_range(K):
        for kx in tl.static_range(K):
            total = sums[0][ky * K + kx]
            inside = sums[1][ky * K + kx]
            for a in tl.static_range(U):
                of_row = 0.0
                for b in tl.static_range(U):
                    for column in tl.static_range(V):
                        value = d[a][column * U + b]
                        total += value * masks[(a + ky - R) // U + REACH][column + (b + kx - R) // U + HALO]
                        if column + (b + kx - R) // U < 0:
                            value = tl.where(columns[column + (b + kx - R) // U + HALO], value, 0.0)
                        if column + (b + kx - R) // U >= V:
                            value = tl.where(columns[column + (b + kx - R) // U + HALO], value, 0.0)
                        of_row += value
                inside += tl.where(rows[(a + ky - R) // U + REACH], of_row, 0.0)
            with_mask = with_mask + (total,)
            with_inside = with_inside + (inside,)
    return with_mask, with_inside


@triton.jit
def sum_of_program(value, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """Over the lanes of each channel; a scalar where there is one."""
    if CHANNELS == 1:
        return tl.sum(value, axis=0)
    else:
        return tl.sum(tl.reshape(value, [LANES // CHANNELS, CHANNELS]), axis=0)


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_reduce_kernel(
    dy_ptr, x_ptr, p_ptr, mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, sums_ptr, dm_ptr, N, C, H, W, rows, strips, parts,
    EPS: tl.constexpr, K: tl.constexpr, U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, ONE_MASK: tl.constexpr, HALVES: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums [C][part][4 K² + 2]: the gradients of the taps of gamma, gamma_inv, beta, beta_inv; Σ dq, Σ dq p̂.

    With one mask for all channels the last two are left at 0, and each channel's share of dm is written out instead.
    """
    REACH: tl.constexpr = (K // 2 + U - 1) // U
    HALO: tl.constexpr = 2 * REACH if ACTIVATED else REACH
    c, n, h, w, live = lanes_of(N, C, H, W, rows, strips, V, LANES, CHANNELS)
    plane, y_plane, p_plane, pixel, p_pixel, mask_channel = planes_of(n, c, C, H, W, U, LAST, ONE_MASK)
    slope, shift = mask_function(mask_channel, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr, EPS)
    mask_mean = channel_value(mask_mean_ptr, mask_channel)
    rstd = reciprocal_std(channel_value(var_ptr, c), EPS)
    centre = -channel_value(mean_ptr, c) * rstd
    gamma, gamma_inverse = stencil(gamma_ptr, gamma_inv_ptr, c, K, U, LANES, CHANNELS)
    beta, beta_inverse = stencil(beta_ptr, beta_inv_ptr, c, K, U, LANES, CHANNELS)
    columns = columns_around(w, W, V, HALO)

    P_WIDE: tl.constexpr = ONE_MASK or not LAST
    zero = to_accumulator(tl.zeros([LANES], dtype=tl.float32), x_ptr)
    zeros = ()
    for _ in tl.static_range(V):
        zeros = zeros + (zero,)
    # Sums for the taps of gamma, then for those of beta; with HALVES a program has those of one of them.
    sums = ()
    for _ in tl.static_range(1 if HALVES else 2):
        none = ()
        for _ in tl.static_range(K * K):
            none = none + (zero,)
        sums = sums + ((none, none),)
    of_beta = tl.program_id(1) == 1
    sum_q = zero
    sum_qp = zero
    masks = masks_from(
        p_ptr, p_plane, p_pixel, h - 2 * REACH, w, H, W, live, columns, slope, shift, zero,
        V, 2 * REACH, HALO, LANES, P_WIDE,
    )  # fmt: skip
    dm = ()
    for _ in tl.static_range(2 * REACH):
        dm = dm + (zeros,)
    h -= REACH
    for o in range(-REACH, rows + REACH):
        # Row h of y and of dβ; with it row h - REACH of dm is complete.
        found = gradients_of_row(
            dy_ptr, x_ptr, p_ptr, plane, y_plane, p_plane, pixel, p_pixel, h, w, H, W, live, columns, slope, shift,
            rstd, centre, gamma, gamma_inverse, beta, beta_inverse, masks,
            K, U, V, REACH, REACH, HALO, ACTIVATED, SLOPE, LANES, not LAST, P_WIDE,
        )  # fmt: skip
        masks, x_hat, d_beta, inside = found[:4]
        dm = gather_mask_gradient(dm + (zeros,), gamma, beta, d_beta, x_hat, K, U, V, REACH)

        d_gamma = ()
        d_own = ()
        for a in tl.static_range(U):
            gammas = ()
            betas = ()
            for j in tl.static_range(V):
                for b in tl.static_range(U):
                    d = tl.where((o >= 0) & (o < rows), d_beta[a][(j + REACH) * U + b], 0.0)
                    betas = betas + (d,)
                    if HALVES:
                        gammas = gammas + (tl.where(of_beta, d, d * x_hat[j + REACH]),)
                    else:
                        gammas = gammas + (d * x_hat[j + REACH],)
            d_gamma = d_gamma + (gammas,)
            d_own = d_own + (betas,)
        new_sums = (add_tap_sums(sums[0], d_gamma, masks, inside, columns, K, U, V, REACH, HALO),)
        if not HALVES:
            new_sums = new_sums + (add_tap_sums(sums[1], d_own, masks, inside, columns, K, U, V, REACH, HALO),)
        sums = new_sums

        above = h - REACH
        own = live & (o >= REACH) & (above < H)
        if HALVES:
            own = own & of_beta
        if ONE_MASK:
            store_columns(dm_ptr, plane, (above * W + w) * pixel, pixel, dm[0], own, V, LANES, not LAST)
        else:
            p = load_columns(p_ptr, p_plane, (above * W + w) * p_pixel, p_pixel, own, V, LANES, P_WIDE)
            for j in tl.static_range(V):
                m = masks[0][j + HALO]
                dq = tl.where(own, dm[0][j] * (m * (1.0 - m)), 0.0)
                sum_q += dq
                sum_qp += dq * (p[j] - mask_mean)
        masks = masks[1:]
        dm = dm[1:]
        h += 1
    sum_qp *= reciprocal_std(channel_value(mask_var_ptr, mask_channel), EPS)

    SUMS: tl.constexpr = 4 * K * K + 2
    groups = tl.cdiv(C, CHANNELS)
    channel = (tl.program_id(0) % groups) * CHANNELS
    if CHANNELS > 1:
        channel = channel + tl.arange(0, CHANNELS)
    exists = channel < C
    to = sums_ptr + (channel.to(tl.int64) * parts + tl.program_id(0) // groups) * SUMS
    if HALVES:
        to += tl.program_id(1) * (2 * K * K)
    for half in tl.static_range(1 if HALVES else 2):
        for tap in tl.static_range(K * K):
            with_mask = sum_of_program(sums[half][0][tap], LANES, CHANNELS)
            with_inside = sum_of_program(sums[half][1][tap], LANES, CHANNELS)
            tl.store(to + (half * 2 * K * K + tap), with_mask, mask=exists)
            tl.store(to + (half * 2 * K * K + K * K + tap), with_inside - with_mask, mask=exists)
    if HALVES:
        to += 2 * K * K - tl.program_id(1) * (2 * K * K)
        exists = exists & of_beta
    else:
        to += 2 * K * K
    tl.store(to + 2 * K * K, sum_of_program(sum_q, LANES, CHANNELS), mask=exists)
    tl.store(to + (2 * K * K + 1), sum_of_program(sum_qp, LANES, CHANNELS), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_finish_kernel(
    sums_ptr, gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr,
    d_gamma_ptr, d_gamma_inv_ptr, d_beta_ptr, d_beta_inv_ptr, d_mask_weight_ptr, d_mask_bias_ptr, means_ptr,
    parts, count, K: tl.constexpr, TRAINING: tl.constexpr, ONE_MASK: tl.constexpr,
    PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of one channel: adds the parts up; writes the gradients of its parameters, and the means
    [C][dy γ, dy γ x̂, dq, dq p̂] by which batch norm's backward centres; those are 0 where the statistics were given.

    Σ dy γ is <gamma taps, gradients of the beta taps>, and Σ dy γ x̂ <gamma taps, their gradients>.
    """
    c = tl.program_id(0)
    o_part = tl.arange(0, PARTS)
    o_sum = tl.arange(0, SUMS)
    exists = o_sum < 4 * K * K + 2
    of_channel = sums_ptr + c.to(tl.int64) * parts * (4 * K * K + 2) + o_sum[None, :]
    total = to_accumulator(tl.zeros([SUMS], dtype=tl.float32), sums_ptr)
    for first in range(0, parts, PARTS):
        part = first + o_part
        valid = (part < parts)[:, None] & exists[None, :]
        total += tl.sum(tl.load(of_channel + part[:, None] * (4 * K * K + 2), mask=valid, other=0.0), axis=0)

    which = o_sum // (K * K)
    at = c * (K * K) + o_sum % (K * K)
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
        tl.store(d_mask_weight_ptr + c, q_p.to(d_mask_weight_ptr.dtype.element_ty))
        tl.store(d_mask_bias_ptr + c, q.to(d_mask_bias_ptr.dtype.element_ty))
    if TRAINING:
        centre = 1.0 / (to_accumulator(tl.full([], 1.0, tl.float32), sums_ptr) * count)
        tl.store(means_ptr + c * 4, g * centre)
        tl.store(means_ptr + (c * 4 + 1), g_x * centre)
        tl.store(means_ptr + (c * 4 + 2), q * centre)
        tl.store(means_ptr + (c * 4 + 3), q_p * centre)
    else:  # not a product with 0, which NaN would survive
        tl.store(means_ptr + (c * 4 + tl.arange(0, 4)), tl.zeros([4], dtype=tl.float32))


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_apply_kernel(
    dy_ptr, x_ptr, p_ptr, mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, means_ptr, projection_ptr, dx_ptr, dp_ptr,
    N, C, H, W, rows, strips,
    EPS: tl.constexpr, K: tl.constexpr, U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, ONE_MASK: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of batch norm, dx = (dy γ - mean(dy γ) - x̂ mean(dy γ x̂)) rstd, and dp likewise from dq.

    With one mask for all channels dp is known already, and Wᵀ dp, an outer product, is part of this dx.
    """
    REACH: tl.constexpr = (K // 2 + U - 1) // U
    # With one mask no gradient of the mask is needed here, and so none of its neighbours.
    AROUND: tl.constexpr = 0 if ONE_MASK else REACH
    HALO: tl.constexpr = REACH + AROUND if ACTIVATED else REACH
    c, n, h, w, live = lanes_of(N, C, H, W, rows, strips, V, LANES, CHANNELS)
    plane, y_plane, p_plane, pixel, p_pixel, mask_channel = planes_of(n, c, C, H, W, U, LAST, ONE_MASK)
    slope, shift = mask_function(mask_channel, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr, EPS)
    rstd = reciprocal_std(channel_value(var_ptr, c), EPS)
    centre = -channel_value(mean_ptr, c) * rstd
    gamma, gamma_inverse = stencil(gamma_ptr, gamma_inv_ptr, c, K, U, LANES, CHANNELS)
    beta, beta_inverse = stencil(beta_ptr, beta_inv_ptr, c, K, U, LANES, CHANNELS)
    columns = columns_around(w, W, V, HALO)
    mean_g = channel_value(means_ptr, c * 4)
    mean_gx = channel_value(means_ptr, c * 4 + 1)
    mask_rstd = reciprocal_std(channel_value(mask_var_ptr, mask_channel), EPS)
    mask_mean = channel_value(mask_mean_ptr, mask_channel)
    scale = channel_value(mask_weight_ptr, mask_channel).to(mask_rstd.dtype) * mask_rstd
    mean_q = channel_value(means_ptr, c * 4 + 2)
    mean_qp = channel_value(means_ptr, c * 4 + 3)

    P_WIDE: tl.constexpr = ONE_MASK or not LAST
    zero = to_accumulator(tl.zeros([LANES], dtype=tl.float32), x_ptr)
    zeros = ()
    for _ in tl.static_range(V):
        zeros = zeros + (zero,)
    masks = masks_from(
        p_ptr, p_plane, p_pixel, h - REACH - AROUND, w, H, W, live, columns, slope, shift, zero,
        V, 2 * REACH, HALO, LANES, P_WIDE,
    )  # fmt: skip
    dm = ()
    for _ in tl.static_range(2 * REACH):
        dm = dm + (zeros,)
    h -= AROUND
    for o in range(-AROUND, rows + AROUND):
        found = gradients_of_row(
            dy_ptr, x_ptr, p_ptr, plane, y_plane, p_plane, pixel, p_pixel, h, w, H, W, live, columns, slope, shift,
            rstd, centre, gamma, gamma_inverse, beta, beta_inverse, masks,
            K, U, V, REACH, AROUND, HALO, ACTIVATED, SLOPE, LANES, not LAST, P_WIDE,
        )  # fmt: skip
        masks, x_hat, d_beta = found[:3]
        here, gamma_inside = found[4:]

        own = here & (o >= 0) & (o < rows)
        dx = ()
        for j in tl.static_range(V):
            g = 0.0
            for a in tl.static_range(U):
                for b in tl.static_range(U):
                    value = apply_stencil(gamma, gamma_inside, masks, columns, a, b, j, K, U, V, REACH, HALO)
                    g += value * d_beta[a][(j + AROUND) * U + b]
            dx = dx + ((g - mean_g - x_hat[j + AROUND] * mean_gx) * rstd,)
        if ONE_MASK:
            weight = channel_value(projection_ptr, c)
            dp = load_columns(dp_ptr, p_plane, (h * W + w), 1, own, V, LANES, True)
            with_mask = ()
            for j in tl.static_range(V):
                with_mask = with_mask + (dx[j] + weight * dp[j],)
            dx = with_mask
        store_columns(dx_ptr, plane, (h * W + w) * pixel, pixel, dx, own, V, LANES, not LAST)

        if not ONE_MASK:
            dm = gather_mask_gradient(dm + (zeros,), gamma, beta, d_beta, x_hat, K, U, V, REACH)
            above = h - REACH
            complete = live & (o >= REACH) & (above < H)
            p = load_columns(p_ptr, p_plane, (above * W + w) * pixel, pixel, complete, V, LANES, P_WIDE)
            dp = ()
            for j in tl.static_range(V):
                m = masks[0][j + HALO]
                dq = dm[0][j] * (m * (1.0 - m))
                dp = dp + ((dq - mean_q - (p[j] - mask_mean) * (mask_rstd * mean_qp)) * scale,)
            store_columns(dp_ptr, plane, (above * W + w) * pixel, pixel, dp, complete, V, LANES, P_WIDE)
            dm = dm[1:]
        masks = masks[1:]
        h += 1
