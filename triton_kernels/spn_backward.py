"""SPN's backward: reduce (the sums of each channel), finish (what follows from them), apply (the gradients of x and p).

x̂, γ and the mask are recomputed from x and p, as in forward. dβ is dy where the activation lets it through, and dγ is
dβ x̂; the mask's gradient dm gathers both through the stencils. See spn_rows.py for the arguments META, size, lane, ...
"""

import triton
import triton.language as tl

from pixnorm.triton_kernels.common import (
    SIZES,
    activation_gradient,
    load_columns,
    record,
    store_columns,
)
from pixnorm.triton_kernels.spn_rows import (
    META_FIELDS,
    PARAMETER_FIELDS,
    SIZE_FIELDS,
    apply_stencil,
    channel_value,
    functions_of,
    inside_sums,
    lane_of,
    load_row,
    mask_row,
    masks_from,
    parameters_of_sample,
    planes_of,
    reciprocal_std,
    rows_around,
    zeros_of,
)


@triton.jit
def gradients_of_row(
    x_ptr, x_plane, dy_ptr, y_plane, mask, norm, taps, masks, h, lane, size, META: tl.constexpr
):  # fmt: skip
    """x̂ and dβ ([a][column and b]) of row h, with AROUND columns to either side; dβ is 0 outside the image.

    Args:
        masks: 2 REACH rows of the mask, the last of them row h + REACH - 1.

    Returns:
        masks: with row h + REACH.
        x_hat, d_beta.
        rows: of ``rows_around``.
        here: whether the lane has this row.
        gamma_inside: ``inside_sums`` of gamma.
    """
    V: tl.constexpr = META.V
    U: tl.constexpr = META.U
    AROUND: tl.constexpr = META.AROUND
    row = mask_row(mask, h + META.REACH, lane, size, META)
    masks = masks + (row,)
    rows = rows_around(h, size.H, META)
    here = lane.live & rows[META.REACH]
    values = load_row(x_ptr, x_plane, h * size.W + lane.w, here, lane.columns, AROUND, 1, META.WIDE, META)
    x_hat = ()
    for j in tl.static_range(V + 2 * AROUND):
        x_hat = x_hat + (values[j] * norm.rstd + norm.centre,)
    gamma_inside = inside_sums(taps.gamma_inverse, taps.gamma_bias, rows, META)
    beta_inside = inside_sums(taps.beta_inverse, taps.beta_bias, rows, META)
    d_beta = ()
    for a in tl.static_range(U):
        at = (h * U + a) * (size.W * U) + lane.w * U
        values = load_row(dy_ptr, y_plane, at, here, lane.columns, AROUND, U, META.WIDE, META)
        if META.ACTIVATED:
            passed = ()
            for j in tl.static_range(V + 2 * AROUND):
                for b in tl.static_range(U):
                    g = apply_stencil(taps.gamma, gamma_inside, masks, lane.columns, a, b, j - AROUND, META)
                    y = apply_stencil(taps.beta, beta_inside, masks, lane.columns, a, b, j - AROUND, META)
                    y += g * x_hat[j]
                    passed = passed + (activation_gradient(y, values[j * U + b], META.SLOPE),)
            values = passed
        d_beta = d_beta + (values,)
    return record("masks x_hat d_beta rows here gamma_inside")(masks, x_hat, d_beta, rows, here, gamma_inside)


@triton.jit
def gather_mask_gradient(dm, taps, d_beta, x_hat, META: tl.constexpr):
    """Adds what a row of dβ (and with it dγ) contributes to the 2 REACH + 1 rows of dm around it."""
    U: tl.constexpr = META.U
    REACH: tl.constexpr = META.REACH
    R: tl.constexpr = META.K // 2
    rows = ()
    for i in tl.static_range(-REACH, REACH + 1):
        row = ()
        for column in tl.static_range(META.V):
            total = dm[i + REACH][column]
            for a in tl.static_range(U):
                if (a - R) // U <= i:
                    if i <= (a + R) // U:
                        for b in tl.static_range(U):
                            for j in tl.static_range((b - R) // U, (b + R) // U + 1):
                                of_gamma = taps.gamma[a][b][i - (a - R) // U][j - (b - R) // U]
                                of_beta = taps.beta[a][b][i - (a - R) // U][j - (b - R) // U]
                                tap = of_gamma * x_hat[column - j + REACH] + of_beta
                                total += tap * d_beta[a][(column - j + REACH) * U + b]
            row = row + (total,)
        rows = rows + (row,)
    return rows


@triton.jit
def add_tap_sums(sums, d, masks, rows, columns, META: tl.constexpr):
    """Adds a row to the sums of each tap, over the pixels where the tap falls inside the image: of d m, and of d.

    Args:
        d: gradients of the lane's own pixels in this row, [a][column and b].
        masks: m, where the tap falls, is in these rows.
        rows: of ``rows_around``.
        columns: of the lane.
    """
    K: tl.constexpr = META.K
    U: tl.constexpr = META.U
    V: tl.constexpr = META.V
    REACH: tl.constexpr = META.REACH
    HALO: tl.constexpr = META.HALO
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
    """Sums over the lanes of each channel; a scalar where there is one channel."""
    if CHANNELS == 1:
        return tl.sum(value, axis=0)
    else:
        return tl.sum(tl.reshape(value, [LANES // CHANNELS, CHANNELS]), axis=0)


@triton.jit(do_not_specialize=SIZES)
def spn_bwd_reduce_kernel(
    dy_ptr, x_ptr, p_ptr, mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr, sums_ptr, dm_ptr,
    N, C, H, W, G, rows, strips, parts,
    EPS: tl.constexpr, K: tl.constexpr, U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, ONE_MASK: tl.constexpr, GROUPED: tl.constexpr, GAMMA_BIAS: tl.constexpr,
    BETA_BIAS: tl.constexpr, HALVES: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Partial sums [C][part][4 K² + 2]: the gradients of the taps of gamma, gamma_inv, beta, beta_inv; Σ dq, Σ dq p̂.

    If GROUPED, a sample has the same number of parts as any other, one after the other.

    With one mask for all channels the last two are 0, and each channel's share of dm is written out instead.
    """
    REACH: tl.constexpr = (K // 2 + U - 1) // U
    HALO: tl.constexpr = 2 * REACH if ACTIVATED else REACH
    META: tl.constexpr = record(META_FIELDS)(
        K=K, U=U, V=V, REACH=REACH, AROUND=REACH, HALO=HALO, LANES=LANES, CHANNELS=CHANNELS, LAST=LAST,
        ONE_MASK=ONE_MASK, WIDE=not LAST, P_WIDE=ONE_MASK or not LAST, ACTIVATED=ACTIVATED, SLOPE=SLOPE, EPS=EPS,
        GROUPED=GROUPED, GAMMA_BIAS=GAMMA_BIAS, BETA_BIAS=BETA_BIAS,
    )  # fmt: skip
    size = record(SIZE_FIELDS)(N, C, H, W, G, rows, strips)
    parameters = record(PARAMETER_FIELDS)(
        mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
        gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr,
    )  # fmt: skip
    lane = lane_of(size, META)
    parameters = parameters_of_sample(parameters, lane, size, META)
    x_plane, y_plane, p_plane = planes_of(lane, size, META)
    mask, norm, taps = functions_of(p_ptr, p_plane, parameters, lane, META)
    mask_mean = channel_value(mask_mean_ptr, lane.mask_channel)

    zero = zeros_of(x_ptr, META)
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
    h = lane.h
    masks = masks_from(mask, h - 2 * REACH, lane, size, META)
    dm = ()
    for _ in tl.static_range(2 * REACH):
        dm = dm + (zeros,)
    h -= REACH
    for o in range(-REACH, rows + REACH):
        # Row h of y and of dβ completes row h - REACH of dm.
        row = gradients_of_row(x_ptr, x_plane, dy_ptr, y_plane, mask, norm, taps, masks, h, lane, size, META)
        masks = row.masks
        dm = gather_mask_gradient(dm + (zeros,), taps, row.d_beta, row.x_hat, META)

        d_gamma = ()
        d_own = ()
        for a in tl.static_range(U):
            gammas = ()
            betas = ()
            for j in tl.static_range(V):
                for b in tl.static_range(U):
                    d = tl.where((o >= 0) & (o < rows), row.d_beta[a][(j + REACH) * U + b], 0.0)
                    betas = betas + (d,)
                    if HALVES:
                        gammas = gammas + (tl.where(of_beta, d, d * row.x_hat[j + REACH]),)
                    else:
                        gammas = gammas + (d * row.x_hat[j + REACH],)
            d_gamma = d_gamma + (gammas,)
            d_own = d_own + (betas,)
        new_sums = (add_tap_sums(sums[0], d_gamma, masks, row.rows, lane.columns, META),)
        if not HALVES:
            new_sums = new_sums + (add_tap_sums(sums[1], d_own, masks, row.rows, lane.columns, META),)
        sums = new_sums

        above = h - REACH
        own = lane.live & (o >= REACH) & (above < H)
        if HALVES:
            own = own & of_beta
        if ONE_MASK:
            store_columns(dm_ptr, x_plane, above * W + lane.w, dm[0], own, V, LANES, not LAST)
        else:
            p = load_columns(p_ptr, p_plane, above * W + lane.w, own, V, LANES, not LAST)
            for j in tl.static_range(V):
                m = masks[0][j + HALO]
                dq = tl.where(own, dm[0][j] * (m * (1.0 - m)), 0.0)
                sum_q += dq
                sum_qp += dq * (p[j] - mask_mean)
        masks = masks[1:]
        dm = dm[1:]
        h += 1
    sum_qp *= reciprocal_std(channel_value(mask_var_ptr, lane.mask_channel), META)

    SUMS: tl.constexpr = 4 * K * K + 2
    blocks = tl.cdiv(C, CHANNELS)
    channel = (tl.program_id(0) % blocks) * CHANNELS
    if CHANNELS > 1:
        channel = channel + tl.arange(0, CHANNELS)
    exists = channel < C
    to = sums_ptr + (channel.to(tl.int64) * parts + tl.program_id(0) // blocks) * SUMS
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
def spn_bwd_apply_kernel(
    dy_ptr, x_ptr, p_ptr, mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
    gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr,
    means_ptr, projection_ptr, dx_ptr, dp_ptr, N, C, H, W, G, rows, strips,
    EPS: tl.constexpr, K: tl.constexpr, U: tl.constexpr, ACTIVATED: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, ONE_MASK: tl.constexpr, GROUPED: tl.constexpr, GAMMA_BIAS: tl.constexpr,
    BETA_BIAS: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of batch norm, dx = (dy γ - mean(dy γ) - x̂ mean(dy γ x̂)) rstd, and dp likewise from w dq.

    Here w is the mask's scale. Groups have their own, so the means are of w dq; else w is a factor of all of it.

    With one mask for all channels dp is known already, and Wᵀ dp, an outer product, is added to dx here.
    """
    REACH: tl.constexpr = (K // 2 + U - 1) // U
    # With one mask the gradient of the mask is not needed here, so neither are the gradients of neighbours.
    AROUND: tl.constexpr = 0 if ONE_MASK else REACH
    HALO: tl.constexpr = REACH + AROUND if ACTIVATED else REACH
    META: tl.constexpr = record(META_FIELDS)(
        K=K, U=U, V=V, REACH=REACH, AROUND=AROUND, HALO=HALO, LANES=LANES, CHANNELS=CHANNELS, LAST=LAST,
        ONE_MASK=ONE_MASK, WIDE=not LAST, P_WIDE=ONE_MASK or not LAST, ACTIVATED=ACTIVATED, SLOPE=SLOPE, EPS=EPS,
        GROUPED=GROUPED, GAMMA_BIAS=GAMMA_BIAS, BETA_BIAS=BETA_BIAS,
    )  # fmt: skip
    size = record(SIZE_FIELDS)(N, C, H, W, G, rows, strips)
    parameters = record(PARAMETER_FIELDS)(
        mean_ptr, var_ptr, mask_mean_ptr, mask_var_ptr, mask_weight_ptr, mask_bias_ptr,
        gamma_ptr, gamma_inv_ptr, beta_ptr, beta_inv_ptr, gamma_bias_ptr, beta_bias_ptr, index_ptr,
    )  # fmt: skip
    lane = lane_of(size, META)
    parameters = parameters_of_sample(parameters, lane, size, META)
    x_plane, y_plane, p_plane = planes_of(lane, size, META)
    mask, norm, taps = functions_of(p_ptr, p_plane, parameters, lane, META)
    mean_g = channel_value(means_ptr, lane.c * 4)
    mean_gx = channel_value(means_ptr, lane.c * 4 + 1)
    mask_rstd = reciprocal_std(channel_value(mask_var_ptr, lane.mask_channel), META)
    mask_mean = channel_value(mask_mean_ptr, lane.mask_channel)
    weight = channel_value(parameters.mask_weight, lane.mask_channel).to(mask_rstd.dtype)
    scale = mask_rstd if GROUPED else weight * mask_rstd
    mean_q = channel_value(means_ptr, lane.c * 4 + 2)
    mean_qp = channel_value(means_ptr, lane.c * 4 + 3)

    zero = zeros_of(x_ptr, META)
    zeros = ()
    for _ in tl.static_range(V):
        zeros = zeros + (zero,)
    h = lane.h
    masks = masks_from(mask, h - REACH - AROUND, lane, size, META)
    dm = ()
    for _ in tl.static_range(2 * REACH):
        dm = dm + (zeros,)
    h -= AROUND
    for o in range(-AROUND, rows + AROUND):
        row = gradients_of_row(x_ptr, x_plane, dy_ptr, y_plane, mask, norm, taps, masks, h, lane, size, META)
        masks = row.masks
        own = row.here & (o >= 0) & (o < rows)
        dx = ()
        for j in tl.static_range(V):
            g = 0.0
            for a in tl.static_range(U):
                for b in tl.static_range(U):
                    value = apply_stencil(taps.gamma, row.gamma_inside, masks, lane.columns, a, b, j, META)
                    g += value * row.d_beta[a][(j + AROUND) * U + b]
            dx = dx + ((g - mean_g - row.x_hat[j + AROUND] * mean_gx) * norm.rstd,)
        if ONE_MASK:
            projection = channel_value(projection_ptr, lane.c)
            dp = load_columns(dp_ptr, p_plane, h * W + lane.w, own, V, LANES, True)
            with_mask = ()
            for j in tl.static_range(V):
                with_mask = with_mask + (dx[j] + projection * dp[j],)
            dx = with_mask
        store_columns(dx_ptr, x_plane, h * W + lane.w, dx, own, V, LANES, not LAST)

        if not ONE_MASK:
            dm = gather_mask_gradient(dm + (zeros,), taps, row.d_beta, row.x_hat, META)
            above = h - REACH
            complete = lane.live & (o >= REACH) & (above < H)
            p = load_columns(p_ptr, p_plane, above * W + lane.w, complete, V, LANES, not LAST)
            dp = ()
            for j in tl.static_range(V):
                m = masks[0][j + HALO]
                dq = dm[0][j] * (m * (1.0 - m))
                if GROUPED:
                    dq *= weight
                dp = dp + ((dq - mean_q - (p[j] - mask_mean) * (mask_rstd * mean_qp)) * scale,)
            store_columns(dp_ptr, p_plane, above * W + lane.w, dp, complete, V, LANES, not LAST)
            dm = dm[1:]
        masks = masks[1:]
        h += 1
