"""What the mathematics promises of each op, in float64, on every impl, for shapes and strides that hypothesis draws.

These need no second implementation (but `test_any_shape`, which is about kernels); so they also check the reference.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from pixnorm.functional import spn
from pixnorm.ops.spn import spn_reference
from pixnorm.testing import LAYOUTS, SPN, Case, evaluate, random

pytestmark = pytest.mark.usefixtures("one_thread")

NO_EPS = 1e-30  # negligible next to any variance; PyTorch's batch norm rejects 0
TAPS = ("gamma_weight", "gamma_weight_inv", "beta_weight", "beta_weight_inv")


@st.composite
def spn_inputs(draw, layouts=tuple(LAYOUTS), upsample=(1, 2), activation=(None,), training=(True,), min_values=3):
    """SPN's tensors and options: planes from one pixel to a few vectors, channels from one to more than a block.

    ``min_values``: least number of values per channel; two are always x̂ = ±1, whatever they are.
    """
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 7), st.integers(1, 20))
    shape = draw(sizes.filter(lambda s: s[0] * s[2] * s[3] >= min_values))
    layout = draw(st.sampled_from(layouts))
    assume(layout != "expanded" or shape[2] * shape[3] >= min_values)
    options = {
        "upsample": draw(st.sampled_from(upsample)),
        "activation": draw(st.sampled_from(activation)),
        "training": draw(st.sampled_from(training)),
    }
    tensors = SPN.inputs(Case(shape, "drawn", options), torch.float64, layout=layout, seed=draw(st.integers(0, 2**31)))
    return tensors, options


def forward(impl, tensors, options):
    """The output; buffers are copied, and passed only if used."""
    given_buffers = {} if options.get("training", True) else {name: tensors[name].clone() for name in SPN.buffers}
    inputs = {name: tensors[name] for name in SPN.differentiable}
    return spn(**inputs, **given_buffers, **options, impl=impl)


def gradients(impl, tensors, options, grad_y=None):
    return evaluate(SPN, SPN.call(impl), tensors, options, grad_y).grads


def assert_equal(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * (1 + expected.abs().amax().item()))


def upsampled(x, upsample):
    return F.interpolate(x, scale_factor=upsample, mode="nearest") if upsample == 2 else x


def normalised(x, eps=1e-5):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def interior(tensor):
    return tensor[..., 1:-1, 1:-1]


def centre_only(tensors):
    """Kernels that are zero except for the middle tap: k = 1 for impls that need k = 3."""
    return tensors | {name: F.pad(tensors[name][..., 1:2, 1:2], (1, 1, 1, 1)) for name in TAPS}


# --- the equations by other means


@given(spn_inputs(activation=(None, "relu"), training=(True, False)))
def test_spn_is_its_equation(impl, drawn):
    """Equations 1-4 pixel by pixel: explicit neighbours, and no convolution, batch norm or interpolation of PyTorch."""
    tensors, options = drawn
    u = options["upsample"]
    x = tensors["x"].repeat_interleave(u, 2).repeat_interleave(u, 3)

    def batch_norm(t, prefix):
        if options["training"]:
            return normalised(t)
        mean, var = (tensors[f"{prefix}running_{which}"][:, None, None] for which in ("mean", "var"))
        return (t - mean) / torch.sqrt(var + 1e-5)

    p = torch.einsum("oi,nihw->nohw", tensors["mask_projection"][:, :, 0, 0], x)
    q = tensors["mask_weight"][:, None, None] * batch_norm(p, "mask_") + tensors["mask_bias"][:, None, None]
    m = 1 / (1 + torch.exp(-q))
    height, width = x.shape[2:]

    def neighbourhood_sum(mask, weight):
        padded = x.new_zeros(x.shape[0], x.shape[1], height + 2, width + 2)
        padded[..., 1:-1, 1:-1] = mask
        total = 0
        for row in range(3):
            for column in range(3):
                window = padded[..., row : row + height, column : column + width]
                total = total + weight[:, 0, row, column, None, None] * window
        return total

    gamma = neighbourhood_sum(m, tensors["gamma_weight"]) + neighbourhood_sum(1 - m, tensors["gamma_weight_inv"])
    beta = neighbourhood_sum(m, tensors["beta_weight"]) + neighbourhood_sum(1 - m, tensors["beta_weight_inv"])
    y = gamma * batch_norm(x, "") + beta
    assert_equal(forward(impl, tensors, options), y.clamp(min=0) if options["activation"] else y)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("mask_channels", [1, 4])
def test_spn_variants_are_their_equation(k, mask_channels):
    """All kernel sizes and mask widths, on the impl that auto chooses, against dense convolutions."""
    tensors = SPN.inputs(Case((2, 4, 6, 7), ""), torch.float64)
    x = tensors["x"]
    projection = tensors["mask_projection"][:mask_channels]
    weight, bias = tensors["mask_weight"][:mask_channels], tensors["mask_bias"][:mask_channels]
    taps = [torch.randn(4, 1, k, k, dtype=torch.float64) for _ in TAPS]
    m = torch.sigmoid(weight[:, None, None] * normalised(F.conv2d(x, projection)) + bias[:, None, None])
    m = m.expand(-1, 4, -1, -1)

    def dense(mask, depthwise):
        return F.conv2d(mask, torch.diag_embed(depthwise[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1), padding=k // 2)

    gamma = dense(m, taps[0]) + dense(1 - m, taps[1])
    beta = dense(m, taps[2]) + dense(1 - m, taps[3])
    actual = spn(x, projection, weight, bias, *taps, impl="auto" if (k, mask_channels) == (3, 4) else "reference")
    assert_equal(actual, gamma * normalised(x) + beta)


# --- identity 1: a constant mask


@given(spn_inputs())
def test_constant_mask_is_batch_norm_inside(impl, drawn):
    """mask_weight = 0: batch norm with the sums of the kernels, except on the border."""
    tensors, options = drawn
    tensors["mask_weight"] = torch.zeros_like(tensors["mask_weight"])
    m = torch.sigmoid(tensors["mask_bias"])
    sums = [tensors[name].sum((1, 2, 3)) for name in TAPS]
    gamma, beta = m * sums[0] + (1 - m) * sums[1], m * sums[2] + (1 - m) * sums[3]
    x = upsampled(tensors["x"], options["upsample"])
    expected = F.batch_norm(x, None, None, gamma, beta, training=True)
    actual = forward(impl, tensors, options)
    if interior(expected).numel():
        assert_equal(interior(actual), interior(expected))
    assert (actual - expected).abs().max() > 1e-6
    # With only the middle tap there is no border.
    tensors = centre_only(tensors)
    sums = [tensors[name].sum((1, 2, 3)) for name in TAPS]
    gamma, beta = m * sums[0] + (1 - m) * sums[1], m * sums[2] + (1 - m) * sums[3]
    assert_equal(forward(impl, tensors, options), F.batch_norm(x, None, None, gamma, beta, training=True))


# --- identity 2: equal delta kernels


@given(spn_inputs(training=(True, False)))
def test_equal_delta_kernels_are_batch_norm_for_any_mask(impl, drawn):
    tensors, options = drawn
    tensors = centre_only(tensors)
    tensors["gamma_weight_inv"], tensors["beta_weight_inv"] = tensors["gamma_weight"], tensors["beta_weight"]
    gamma, beta = (tensors[name][:, 0, 1, 1] for name in ("gamma_weight", "beta_weight"))
    x = upsampled(tensors["x"], options["upsample"])
    statistics = (None, None) if options["training"] else (tensors["running_mean"], tensors["running_var"])
    expected = F.batch_norm(x, *statistics, gamma, beta, training=options["training"])
    assert_equal(forward(impl, tensors, options), expected)


# --- identities 3 and 5: γ of two kernels is that of their difference


@given(spn_inputs())
def test_the_inverted_mask_is_a_constant_less_the_mask(impl, drawn):
    """γ = m ⊛ (w1 - w2) + 1 ⊛ w2, and β likewise; so (w1 - w2, 0) and a mask of one with w2 add up to y."""
    tensors, options = drawn
    first, zero = dict(tensors), torch.zeros_like(tensors["gamma_weight"])
    for name in ("gamma_weight", "beta_weight"):
        first[name] = tensors[name] - tensors[f"{name}_inv"]
        first[f"{name}_inv"] = zero
    one = dict(tensors) | {"gamma_weight": tensors["gamma_weight_inv"], "beta_weight": tensors["beta_weight_inv"]}
    # A mask of one half everywhere with w2 for both kernels: 1/2 w2 + 1/2 w2.
    one["mask_weight"] = one["mask_bias"] = torch.zeros_like(tensors["mask_bias"])
    assert_equal(forward(impl, tensors, options), forward(impl, first, options) + forward(impl, one, options))


# --- identity 4: swap the mask and its inverse


@given(spn_inputs(training=(True, False), activation=(None, "relu")))
def test_swapping_the_mask_and_its_inverse_changes_nothing(impl, drawn):
    tensors, options = drawn
    swapped = dict(tensors)
    for name in ("mask_weight", "mask_bias"):
        swapped[name] = -tensors[name]
    for name in ("gamma_weight", "beta_weight"):
        swapped[name], swapped[f"{name}_inv"] = tensors[f"{name}_inv"], tensors[name]
    assert_equal(forward(impl, swapped, options), forward(impl, tensors, options))


# --- identity 6: invariances


@given(spn_inputs(activation=(None, "relu")), st.integers(0, 2**31))
def test_a_shift_of_each_channel_changes_nothing(impl, drawn, seed):
    tensors, options = drawn
    shift = random((tensors["x"].shape[1], 1, 1), torch.Generator().manual_seed(seed))
    shifted = tensors | {"x": tensors["x"] + shift}
    assert_equal(forward(impl, shifted, options), forward(impl, tensors, options), 1e-7)


@given(spn_inputs(min_values=8), st.floats(0.1, 10))
def test_without_eps_a_common_scale_changes_nothing(impl, drawn, scale):
    tensors, options = drawn
    options["eps"] = NO_EPS
    scaled = tensors | {"x": tensors["x"] * scale}
    assert_equal(forward(impl, scaled, options), forward(impl, tensors, options), 1e-7)


def test_a_scale_of_each_channel_changes_the_output(impl):
    """The projection acts on x, not on x normalised: otherwise this would be an invariance too."""
    tensors = SPN.inputs(Case((2, 4, 5, 6), ""), torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    scaled = tensors | {"x": tensors["x"] * scale[:, None, None]}
    options = {"eps": NO_EPS}
    assert (forward(impl, scaled, options) - forward(impl, tensors, options)).abs().max() > 1e-2


# --- identity 7: one mask for all channels


@given(spn_inputs(training=(True, False)))
def test_a_mask_of_one_channel_is_a_repeated_mask(impl, drawn):
    """Cm = 1 on the reference equals C equal rows on any impl."""
    tensors, options = drawn
    one = {name: tensor[:1] if name.startswith("mask_") else tensor for name, tensor in tensors.items()}
    repeated = {
        name: tensor[:1].expand_as(tensor) if name.startswith("mask_") else tensor for name, tensor in tensors.items()
    }
    assert_equal(forward(impl, repeated, options), forward("reference", one, options))


# --- identity 8: upsampling


@given(spn_inputs(upsample=(2,), activation=(None, "relu"), training=(True, False)))
def test_fused_upsampling_is_upsampling_first(impl, drawn):
    """Output, gradients and buffers; mask and statistics commute with nearest upsampling, so it can be fused."""
    tensors, options = drawn
    fused = evaluate(SPN, SPN.call(impl), tensors, options)

    def plain(x, *args, **kwargs):
        return SPN.call(impl)(upsampled(x, 2), *args, **(kwargs | {"upsample": 1}))

    for (name, a), (_, b) in zip(fused.named(), evaluate(SPN, plain, tensors, options).named(), strict=True):
        if b.numel():
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@given(spn_inputs(upsample=(2,)))
def test_upsampling_afterwards_is_another_function_but_for_one_tap(impl, drawn):
    tensors, options = drawn
    before = options | {"upsample": 1}
    assert (forward(impl, tensors, options) - upsampled(forward(impl, tensors, before), 2)).abs().max() > 1e-3
    tensors = centre_only(tensors)
    assert_equal(forward(impl, tensors, options), upsampled(forward(impl, tensors, before), 2))


# --- identity 9: numbers by hand


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("which", TAPS)
def test_numbers_by_hand(impl, which, upsample, layout):
    """m = m* = 1/2 and a kernel of ones count half the pixels in reach: 4.5 inside, 3 at an edge, 2 in a corner.

    The inverted mask is no more there outside the image than the mask.
    """
    tensors = SPN.inputs(Case((2, 3, 4, 5), ""), torch.float64, layout=layout)
    for name in ("mask_weight", "mask_bias", *TAPS):
        tensors[name] = torch.zeros_like(tensors[name])
    tensors[which] = torch.ones_like(tensors[which])
    y = forward(impl, tensors, {"upsample": upsample})
    expected = torch.full(y.shape[2:], 4.5, dtype=torch.float64)
    expected[[0, -1], :] = expected[:, [0, -1]] = 3
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 2
    if which.startswith("gamma"):
        expected = expected * upsampled(normalised(tensors["x"]), upsample)
    assert_equal(y, expected.expand_as(y))


def test_numbers_by_hand_of_five_taps():
    tensors = SPN.inputs(Case((2, 3, 6, 6), ""), torch.float64)
    inputs = {name: torch.zeros_like(tensors[name]) for name in ("mask_weight", "mask_bias")}
    inputs |= {name: torch.zeros(3, 1, 5, 5, dtype=torch.float64) for name in TAPS}
    inputs["beta_weight_inv"] += 1
    y = spn_reference(tensors["x"], tensors["mask_projection"], **inputs)
    for pixel, expected in {(2, 3): 12.5, (0, 3): 7.5, (1, 3): 10.0, (0, 0): 4.5}.items():
        assert_equal(y[0, 0][pixel], torch.tensor(expected, dtype=torch.float64))


# --- identity 10: gradients


@given(spn_inputs(activation=(None, "relu")))
def test_the_gradient_of_x_sums_to_zero_in_each_channel(impl, drawn):
    tensors, options = drawn
    grad = gradients(impl, tensors, options)["x"]
    assert (grad.sum((0, 2, 3)).abs() <= 1e-8 * (1 + grad.abs().sum())).all()


@given(spn_inputs(min_values=8))
def test_without_eps_the_gradient_of_x_is_orthogonal_to_x(impl, drawn):
    """Since y does not change with the scale of x."""
    tensors, options = drawn
    grad = gradients(impl, tensors, options | {"eps": NO_EPS})["x"]
    inner = (grad * tensors["x"]).sum()
    assert inner.abs() <= 1e-7 * (1 + (grad * tensors["x"]).abs().sum())


@given(spn_inputs())
def test_middle_taps_have_the_gradients_of_batch_norm(impl, drawn):
    """m + m* = 1 at the pixel itself: the two middle taps add up to batch norm's scale and shift."""
    tensors, options = drawn
    grad_y = torch.randn(upsampled(tensors["x"], options["upsample"]).shape, dtype=torch.float64)
    grads = gradients(impl, tensors, options, grad_y)
    x_hat = upsampled(normalised(tensors["x"]), options["upsample"])
    for name, expected in (("gamma", grad_y * x_hat), ("beta", grad_y)):
        actual = grads[f"{name}_weight"] + grads[f"{name}_weight_inv"]
        assert_equal(actual[:, 0, 1, 1], expected.sum((0, 2, 3)))


@given(spn_inputs(training=(True, False), activation=(None, "relu")))
def test_equal_kernels_leave_the_mask_without_a_gradient(impl, drawn):
    tensors, options = drawn
    tensors["gamma_weight_inv"], tensors["beta_weight_inv"] = tensors["gamma_weight"], tensors["beta_weight"]
    grads = gradients(impl, tensors, options)
    for name in ("mask_projection", "mask_weight", "mask_bias"):
        assert grads[name].abs().max() <= 1e-9 * (1 + grads["gamma_weight"].abs().max()), name


@given(spn_inputs())
def test_the_mean_of_the_projection_is_the_projection_of_the_mean(impl, drawn):
    tensors, options = drawn
    options["momentum"] = 1.0
    buffers = {name: tensors[name].clone() for name in SPN.buffers}
    spn(**{name: tensors[name] for name in SPN.differentiable}, **buffers, **options, impl=impl)
    assert_equal(buffers["running_mean"], tensors["x"].mean((0, 2, 3)))
    assert_equal(buffers["mask_running_mean"], tensors["mask_projection"][:, :, 0, 0] @ tensors["x"].mean((0, 2, 3)))


# --- identity 11: inference


@given(spn_inputs(activation=(None, "relu")))
def test_inference_with_the_statistics_of_the_batch_is_training(impl, drawn):
    """momentum = 1 leaves them in the buffers: unbiased, over the upsampled pixels."""
    tensors, options = drawn
    options["momentum"] = 1.0
    buffers = {name: torch.full_like(tensors[name], 7.0) for name in SPN.buffers}
    inputs = {name: tensors[name] for name in SPN.differentiable}
    trained = spn(**inputs, **buffers, **options, impl=impl)
    count = trained.numel() // trained.shape[1]
    for name in ("running_var", "mask_running_var"):
        buffers[name] *= (count - 1) / count
    inferred = spn(**inputs, **buffers, **(options | {"training": False}), impl=impl)
    assert_equal(inferred, trained)


@given(spn_inputs(), st.floats(0, 1))
def test_running_statistics_follow_those_of_batch_norm(impl, drawn, momentum):
    tensors, options = drawn
    options["momentum"] = momentum
    buffers = {name: tensors[name].clone() for name in SPN.buffers}
    spn(**{name: tensors[name] for name in SPN.differentiable}, **buffers, **options, impl=impl)
    x = upsampled(tensors["x"], options["upsample"])
    for prefix, t in (("", x), ("mask_", F.conv2d(x, tensors["mask_projection"]))):
        mean, var = tensors[f"{prefix}running_mean"].clone(), tensors[f"{prefix}running_var"].clone()
        F.batch_norm(t, mean, var, training=True, momentum=momentum)
        assert_equal(buffers[f"{prefix}running_mean"], mean)
        assert_equal(buffers[f"{prefix}running_var"], var)


# --- any shape


@pytest.mark.emulated
@given(
    # Around the borders of a thread's, warp's and block's columns, and of the windows of wide rows.
    shape=st.tuples(
        st.integers(1, 3),
        st.sampled_from([2, 3, 8, 31, 33, 40]),
        st.integers(2, 40),
        st.sampled_from([2, 3, 4, 8, 16, 31, 33, 64, 66, 68, 72, 128, 130, 132, 136, 260]),
    ),
    layout=st.sampled_from(sorted(LAYOUTS)),
    upsample=st.sampled_from([1, 2]),
    activation=st.sampled_from([None, "relu"]),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(kernel, shape, layout, upsample, activation, training, seed):
    options = {"upsample": upsample, "activation": activation, "training": training}
    tensors = SPN.inputs(Case(shape, "drawn", options), torch.float64, layout=layout, seed=seed)
    actual, exact = (evaluate(SPN, f, tensors, options) for f in (SPN.call(kernel), SPN.reference))
    for (name, a), (_, b) in zip(actual.named(), exact.named(), strict=True):
        atol = 1e-8 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- structure


@given(spn_inputs(training=(False,), activation=(None, "relu")))
def test_inference_treats_samples_alone(impl, drawn):
    tensors, options = drawn
    alone = [forward(impl, tensors | {"x": tensors["x"][n : n + 1]}, options) for n in range(len(tensors["x"]))]
    assert_equal(forward(impl, tensors, options), torch.cat(alone))


@given(spn_inputs(activation=(None, "relu"), training=(True, False)), st.sampled_from([(2,), (3,), (2, 3)]))
def test_flipping_the_image_and_the_kernels_flips_the_output(impl, drawn, axes):
    """Every corner, edge and phase of the upsampling is treated like its mirror image."""
    tensors, options = drawn
    flipped = {name: t.flip(axes) if name in ("x", *TAPS) else t for name, t in tensors.items()}
    assert_equal(forward(impl, flipped, options), forward(impl, tensors, options).flip(axes))


@given(spn_inputs(activation=(None, "relu"), training=(True, False)))
def test_permuting_channels_permutes_the_output(impl, drawn):
    tensors, options = drawn
    order = torch.randperm(tensors["x"].shape[1])
    permuted = {name: t[:, order] if name == "x" else t[order] for name, t in tensors.items()}
    permuted["mask_projection"] = permuted["mask_projection"][:, order]
    assert_equal(forward(impl, permuted, options), forward(impl, tensors, options)[:, order])


def test_two_values_per_channel_are_the_least(impl):
    """Two values normalise to ±1; one, upsampled to four, to 0. Its gradient is rounding, and finite."""
    for shape, upsample in [((2, 3, 1, 1), 1), ((1, 3, 1, 2), 1), ((1, 3, 1, 1), 2)]:
        tensors = SPN.inputs(Case(shape, ""), torch.float64)
        result = evaluate(SPN, SPN.call(impl), tensors, {"upsample": upsample})
        expected = evaluate(SPN, spn_reference, tensors, {"upsample": upsample})
        for (name, a), (_, b) in zip(result.named(), expected.named(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
