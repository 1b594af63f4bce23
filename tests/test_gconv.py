"""GConv: the identities of its definition, for every impl; both layers through autograd, the compiler and autocast."""

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_ops import HALF, layout_of, name_of

from pixnorm.functional import gconv2d, gconv_mix, glinear
from pixnorm.ops import gconv
from pixnorm.testing import (
    DENSE_LAYOUTS,
    GCONV_MIX,
    LAYOUTS,
    Case,
    assert_close_as_eager,
    evaluate,
    random,
    saved_bytes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
PARAMETERS = ("x", "z", "weight", "scale_weight", "mix_weight", "bias")


def layer(shape=(2, 3, 5, 6), n=4, k=3, dz=2, bias=True, dtype=torch.float64, layout="contiguous", seed=0):
    """Arguments of gconv2d; of glinear if the shape has no pixels."""
    generator = torch.Generator().manual_seed(seed)
    m = shape[1]
    taps = (k, k) if len(shape) == 4 else ()
    tensors = {
        "x": random(shape, generator) + 0.5,
        "z": random((shape[0], dz), generator),
        "weight": random((n, m, *taps), generator) / m,
        "scale_weight": random((n, m + dz), generator),
        "mix_weight": random((n, n), generator) * n**-0.5,
    }
    if bias:
        tensors["bias"] = random((n,), generator)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors | ({"x": LAYOUTS[layout](tensors["x"])} if taps else {})


def layers(**fixed):
    """Arguments and options of gconv2d, of many sizes."""
    sizes = st.integers(1, 6)

    @st.composite
    def draw(draw):
        k, dilation = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
        least = dilation * (k - 1) + 1
        shape = draw(st.integers(1, 3)), draw(sizes), least + draw(sizes), least + draw(sizes)
        options = {"stride": draw(st.sampled_from([1, 2, (2, 1)])), "padding": draw(st.sampled_from([0, 1, (1, 2)]))}
        tensors = layer(
            shape,
            draw(st.sampled_from([1, 2, 7, 40])),
            k,
            draw(sizes),
            fixed.get("bias", draw(st.booleans())),
            layout=draw(st.sampled_from(DENSE_LAYOUTS)),
            seed=draw(st.integers(0, 2**31)),
        )
        return tensors, options | {"dilation": dilation}

    return draw()


def scales(tensors):
    """S by eq. 5."""
    features = tensors["x"].flatten(2).mean(2)
    return torch.sigmoid(torch.cat([features, tensors["z"]], 1) @ tensors["scale_weight"].T)


# --- identities


@given(layers())
def test_each_sample_has_kernels_of_its_own(impl, drawn):
    """Eq. 7: convolution with K (I + diag(S) W_L); W_L is the transpose of mix_weight."""
    tensors, options = drawn
    y = gconv2d(**tensors, **options, impl=impl)
    w, n = tensors["weight"], len(tensors["weight"])
    for i, s in enumerate(scales(tensors)):
        mixing = torch.eye(n, dtype=s.dtype) + s[:, None] * tensors["mix_weight"].T
        kernels = (w.flatten(1).T @ mixing).T.view_as(w)
        expected = F.conv2d(tensors["x"][i : i + 1], kernels, tensors.get("bias"), **options)
        torch.testing.assert_close(y[i : i + 1], expected, **CLOSE)


@given(layers(), st.sampled_from(["no mixing", "no scaling", "both", "saturated"]))
def test_special_weights(impl, drawn, which):
    """W_L = 0: convolution. W_s = 0: scales are 1/2. Then W_L = I: 1.5 convolutions. Saturated: scales are 1."""
    tensors, options = drawn
    n, w = len(tensors["weight"]), tensors["mix_weight"]
    if which == "no mixing":
        tensors["mix_weight"] = torch.zeros_like(w)
        factor = torch.eye(n, dtype=w.dtype)
    elif which == "saturated":
        tensors["scale_weight"] = torch.full_like(tensors["scale_weight"], 1e4)
        tensors["x"], tensors["z"] = tensors["x"].abs() + 0.1, tensors["z"].abs() + 0.1
        factor = torch.eye(n, dtype=w.dtype) + w
    else:
        tensors["scale_weight"] = torch.zeros_like(tensors["scale_weight"])
        if which == "both":
            tensors["mix_weight"] = w = torch.eye(n, dtype=w.dtype)
        factor = torch.eye(n, dtype=w.dtype) + w / 2
    plain = F.conv2d(tensors["x"], tensors["weight"], **options)
    expected = torch.einsum("ji,bihw->bjhw", factor, plain)
    if "bias" in tensors:
        expected = expected + tensors["bias"].view(-1, 1, 1)
    torch.testing.assert_close(gconv2d(**tensors, **options, impl=impl), expected, **CLOSE)


@given(layers(bias=False))
def test_which_way_the_channels_mix(impl, drawn):
    """mix_weight[1, 0] = 1 adds S_0 U_0 to channel 1, and to no other."""
    tensors, options = drawn
    n = len(tensors["weight"])
    if n < 2:
        return
    tensors["mix_weight"] = torch.zeros_like(tensors["mix_weight"])
    tensors["mix_weight"][1, 0] = 1
    expected = F.conv2d(tensors["x"], tensors["weight"], **options)
    expected[:, 1] += scales(tensors)[:, 0, None, None] * expected[:, 0]
    torch.testing.assert_close(gconv2d(**tensors, **options, impl=impl), expected, **CLOSE)


@given(layers())
def test_stride_takes_every_second_pixel(impl, drawn):
    tensors, options = drawn
    every = gconv2d(**tensors, **(options | {"stride": 1}), impl=impl)
    torch.testing.assert_close(
        gconv2d(**tensors, **(options | {"stride": 2}), impl=impl), every[..., ::2, ::2], **CLOSE
    )


@given(layers(), st.integers(0, 2**31))
def test_scales_do_not_see_where_pixels_are(impl, drawn, seed):
    """With 1x1 kernels, shuffling the pixels shuffles the output; so does repeating each of them."""
    tensors, _ = drawn
    tensors["weight"] = tensors["weight"][..., :1, :1]
    y = gconv2d(**tensors, impl=impl)
    x = tensors["x"]
    order = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(seed))
    shuffled = tensors | {"x": x.flatten(2)[..., order].view(x.shape)}
    torch.testing.assert_close(gconv2d(**shuffled, impl=impl).flatten(2), y.flatten(2)[..., order], **CLOSE)
    large = tensors | {"x": F.interpolate(x, scale_factor=2)}
    torch.testing.assert_close(gconv2d(**large, impl=impl), F.interpolate(y, scale_factor=2), **CLOSE)


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 3, 20]), st.booleans(), st.integers(0, 2**31))
def test_linear_is_convolution_of_one_pixel(impl, samples, m, n, bias, seed):
    tensors = layer((samples, m), n, bias=bias, seed=seed)
    pixel = tensors | {name: tensors[name][..., None, None] for name in ("x", "weight")}
    expected = gconv2d(**pixel, impl=impl).flatten(1)
    torch.testing.assert_close(glinear(**tensors, impl=impl), expected, **CLOSE)


@pytest.mark.parametrize(
    "mixing, expected", [([[1, 0], [0, 1]], [6, 9]), ([[0, 1], [0, 0]], [4, 8]), ([[0, 0], [0, 0]], [4, 6])], ids=str
)
def test_numbers_by_hand(impl, mixing, expected):
    """x = [1, 1], K = [[1, 2], [3, 4]] and W_L in the paper's convention, x K: the layers hold the transposes."""
    x, z = torch.ones(1, 2), torch.ones(1, 1)
    weights = [torch.tensor(w, dtype=torch.float32).T for w in ([[1, 2], [3, 4]], [[0, 0]] * 3, mixing)]
    assert glinear(x, z, *weights, impl=impl).tolist() == [expected]


@given(layers())
def test_gradients_by_their_formulas(impl, drawn):
    """dW_L = Σ (S U)ᵀ g; dW_s = [mean, z]ᵀ (dS S (1 - S)) with dS = Σ U (g W_Lᵀ); and of the bias Σ g."""
    tensors, options = drawn
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = gconv2d(**leaves, **options, impl=impl)
    g = random(y.shape, torch.Generator().manual_seed(1))
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))
    u, s = F.conv2d(tensors["x"], tensors["weight"], **options), scales(tensors)
    expected = torch.einsum("bjhw,bihw,bi->ji", g, u, s)
    torch.testing.assert_close(grads["mix_weight"], expected, **CLOSE)
    d_scales = torch.einsum("bihw,bjhw,ji->bi", u, g, tensors["mix_weight"]) * s * (1 - s)
    inputs = torch.cat([tensors["x"].mean((2, 3)), tensors["z"]], 1)
    torch.testing.assert_close(grads["scale_weight"], d_scales.T @ inputs, **CLOSE)
    if "bias" in tensors:
        torch.testing.assert_close(grads["bias"], g.sum((0, 2, 3)), **CLOSE)


def test_without_mixing_the_scales_have_no_gradient(impl):
    tensors = layer()
    tensors["mix_weight"] = torch.zeros_like(tensors["mix_weight"])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    gconv2d(**leaves, padding=1, impl=impl).sin().sum().backward()
    plain = {name: tensors[name].detach().clone().requires_grad_() for name in ("x", "weight", "bias")}
    F.conv2d(
        **{"input": plain["x"], "weight": plain["weight"], "bias": plain["bias"]}, padding=1
    ).sin().sum().backward()
    for name, tensor in plain.items():
        torch.testing.assert_close(leaves[name].grad, tensor.grad, **CLOSE)
    assert not leaves["scale_weight"].grad.any() and not leaves["z"].grad.any()
    assert leaves["mix_weight"].grad.abs().max() > 0.01


@pytest.mark.parametrize("shape", [(2, 3, 1, 2), (3, 5, 2, 1), (2, 2, 3, 2)], ids=str)
def test_gradcheck_of_both_forms(kernel, shape):
    """With fewer pixels than channels, and with more: the two forms."""
    tensors = GCONV_MIX.inputs(Case(shape, ""), torch.float64, layout=DENSE_LAYOUTS[shape[0] % 2])
    leaves = [tensors[name].requires_grad_() for name in GCONV_MIX.differentiable]
    assert torch.autograd.gradcheck(lambda *t: gconv_mix(*t, impl=kernel), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: gconv_mix(*t, impl=kernel), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (3, 24, 3, 4), (0, 3, 2, 2)], ids=str)
def test_products_of_the_library(shape, layout, dtype):
    """The "native" of devices without a kernel: as accurate as plain PyTorch, and with its strides."""

    def draw(seed):
        tensors = GCONV_MIX.inputs(Case(shape, ""), dtype, layout=layout, seed=seed)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        grad_y = random(shape, torch.Generator().manual_seed(seed + 1)).to(dtype)
        eager, exact = (evaluate(GCONV_MIX, GCONV_MIX.reference, t, {}, grad_y) for t in (tensors, exact))
        u, s, w, b = tensors.values()
        y, grads = gconv.products_fwd(u, s, w, b, True), gconv.products_bwd(grad_y, u, s, w, True, True)
        assert y.stride() == grads[0].stride() == gconv.dense_like(u).stride()
        for (name, a), (_, e), actual in zip(eager.named(), exact.named(), (y, *grads), strict=True):
            yield name, actual, [a], e

    before = torch.backends.cuda.matmul.fp32_precision
    assert_close_as_eager(draw, dtype)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_products_of_the_library_do_not_overflow():
    """Sums over pixels may overflow float16 before they are scaled."""
    generator = torch.Generator().manual_seed(0)
    u, noise, w = (random(shape, generator) for shape in ((2, 16, 64, 64), (2, 16, 64, 64), (16, 16)))
    u, dy, s, w = (t.half() for t in (8 * u, 8 * noise + 8 * u, torch.full((2, 16), 0.02), 0.005 * w))
    _, grad_s, grad_w, _ = gconv.products_bwd(dy, u, s, w, False, True)
    sums = torch.einsum("bjhw,bihw->bji", dy.double(), u.double())
    assert sums.abs().max() > 65504
    torch.testing.assert_close(grad_w.double(), (sums * s.double()[:, None]).sum(0), rtol=0.01, atol=100)
    torch.testing.assert_close(grad_s.double(), (sums * w.double()).sum(1), rtol=0.01, atol=100)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_sums_over_many_pixels(kernel, layout):
    """65536 of them in float32, of non-zero mean: as accurate as plain PyTorch, which sums pairwise."""

    def draw(seed):
        tensors = GCONV_MIX.inputs(Case((2, 8, 256, 256), "", sizes={"bias": 0}), layout=layout, seed=seed)
        tensors["u"] = tensors["u"] + 1
        grad_y = 1 + random((2, 8, 256, 256), torch.Generator().manual_seed(seed + 1)).float()
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        results = [evaluate(GCONV_MIX, GCONV_MIX.call(kernel), tensors, {}, grad_y)]
        results += [evaluate(GCONV_MIX, GCONV_MIX.reference, t, {}, grad_y) for t in (tensors, exact)]
        for (name, a), (_, b), (_, e) in zip(*(result.named() for result in results), strict=True):
            yield name, a, [b], e

    assert_close_as_eager(draw, torch.float32)


def test_the_table_of_what_is_faster():
    """On a GPU: the fused kernel for few pixels per sample, or if memory-bound; else PyTorch's product."""

    def chosen(shape, dtype=torch.float32, allow_tf32=True, device="cuda"):
        u = types.SimpleNamespace(device=torch.device(device), shape=torch.Size(shape), dtype=dtype)
        return gconv.preferred(u, allow_tf32)

    assert chosen((64, 256, 32, 32)) == chosen((64, 256, 8, 8)) == "triton"
    assert chosen((64, 128, 64, 64), allow_tf32=False) == chosen((64, 128, 64, 64), torch.float64) == "native"
    assert chosen((64, 128, 1, 1), allow_tf32=False) == "triton"
    assert chosen((8, 1024, 128, 128), torch.bfloat16) == "native"
    assert chosen((64, 256, 32, 32), device="cpu") == "native"


# --- both layers

LAYERS = {
    "gconv2d": (gconv2d, lambda **options: layer(**options), {"stride": 2, "padding": 1, "dilation": 2}),
    "glinear": (glinear, lambda **options: layer((4, 3), **options), {}),
}
both = pytest.mark.parametrize("which", LAYERS)


def leaves_of(tensors):
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


@both
@pytest.mark.parametrize("bias", [True, False])
def test_layer_gradcheck(impl, which, bias):
    function, make, options = LAYERS[which]
    leaves = leaves_of(make(bias=bias))

    def run(*values):
        return function(**dict(zip(leaves, values, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(run, list(leaves.values()))
    assert torch.autograd.gradgradcheck(run, list(leaves.values()))


@both
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name_of)
def test_layer_is_as_close_as_plain_pytorch(kernel, which, dtype):
    function, make, options = LAYERS[which]

    def draw(seed):
        tensors = make(dtype=dtype, seed=seed)
        found = []
        for impl, of in (("reference", torch.float64), ("reference", dtype), (kernel, dtype)):
            leaves = leaves_of({name: tensor.to(of) for name, tensor in tensors.items()})
            y = function(**leaves, **options, impl=impl)
            g = random(y.shape, torch.Generator().manual_seed(1)).to(dtype)
            found.append((y.detach(), *torch.autograd.grad(y, list(leaves.values()), g.to(of))))
        for name, exact, eager, actual in zip(("y", *tensors), *found, strict=True):
            yield name, actual, [eager], exact

    assert_close_as_eager(draw, dtype)


@both
def test_layer_compiles(impl, which):
    torch.compiler.reset()
    function, make, options = LAYERS[which]
    compiled = torch.compile(lambda **t: function(**t, **options, impl=impl), fullgraph=True, backend="aot_eager")
    for bias in (True, False):
        tensors = make(bias=bias)
        results = []
        for run in (compiled, lambda **t: function(**t, **options, impl=impl)):
            leaves = leaves_of(tensors)
            y = run(**leaves)
            results.append((y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_layer_under_autocast(impl, which, dtype):
    """As in F.conv2d: computes and returns half precision, whatever the arguments; gradients keep their dtype."""
    function, make, options = LAYERS[which]
    for of_x in (torch.float32, dtype):
        tensors = make(dtype=torch.float32)
        leaves = leaves_of(tensors | {"x": tensors["x"].to(of_x)})
        with torch.autocast(leaves["x"].device.type, dtype=dtype):
            y = function(**leaves, **options, impl=impl)
        assert y.dtype == dtype
        y.float().sum().backward()
        exact = function(**{name: tensor.double() for name, tensor in tensors.items()}, **options)
        assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert all(leaf.grad.dtype == leaf.dtype and leaf.grad.isfinite().all() for leaf in leaves.values())


@both
def test_layer_of_an_empty_batch(impl, which):
    function, make, options = LAYERS[which]
    tensors = make()
    leaves = leaves_of(tensors | {name: tensors[name][:0] for name in ("x", "z")})
    y = function(**leaves, **options, impl=impl)
    assert y.shape[:2] == (0, 4)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_layout_is_that_of_the_convolution(impl, layout):
    tensors = layer((2, 3, 6, 7), layout=layout)
    y = gconv2d(**tensors, padding="same", impl=impl)
    assert layout_of(y) == layout_of(F.conv2d(tensors["x"], tensors["weight"], padding="same"))


@both
def test_only_the_input_and_the_convolution_are_saved(kernel, which):
    """U, and tensors of size (N, n) or (n, n); the reference also saves S · U."""
    function, make, options = LAYERS[which]
    leaves = leaves_of(make())
    kept = saved_bytes(lambda: function(**leaves, **options, impl=kernel), leaves.values())
    y = function(**leaves, **options, impl=kernel)
    samples, dz = leaves["z"].shape
    small = 8 * samples * (2 * len(leaves["weight"]) + leaves["x"].shape[1] + dz)
    assert y.nbytes <= kept <= y.nbytes + small


# --- bad input

MIX_ERRORS = {
    "three dimensions": ({"u": torch.ones(2, 4, 3)}, ValueError, r"\(N, n, H, W\), or \(N, n\), .* got \(2, 4, 3\)"),
    "no pixels": ({"u": torch.ones(2, 4, 0, 3)}, ValueError, r"with pixels, got \(2, 4, 0, 3\)"),
    "s of features": (
        {"u": torch.ones(2, 4), "s": torch.ones(2, 3)},
        ValueError,
        r"for u of shape \(2, 4\), got \(2, 3",
    ),
    "s": ({"s": torch.ones(2, 3)}, ValueError, r"s must have shape \(2, 4\).*\(2, 4, 5, 6\), got \(2, 3\)"),
    "mix_weight": ({"mix_weight": torch.ones(4, 3)}, ValueError, r"mix_weight must have shape \(4, 4\).*got \(4, 3\)"),
    "bias": ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \(4,\).*got \(1,\)"),
    "integers": ({"u": torch.ones(2, 4, 5, 6, dtype=torch.int64)}, TypeError, "floating point input, got torch.int64"),
    "dtypes": ({"s": torch.ones(2, 4, dtype=torch.float64)}, TypeError, "one dtype, got u of torch.float32 and s of"),
    "devices": ({"s": torch.ones(2, 4, device="meta")}, RuntimeError, "one device, got u on .* and s on meta"),
}


@pytest.mark.parametrize("which", MIX_ERRORS)
def test_mixing_refuses(impl, which):
    wrong, error, message = MIX_ERRORS[which]
    with pytest.raises(error, match=message):
        gconv_mix(**(GCONV_MIX.inputs(Case((2, 4, 5, 6), "")) | wrong), impl=impl)


def test_mixing_under_autocast_refuses_what_it_cannot_cast(impl):
    tensors = GCONV_MIX.inputs(Case((2, 4, 5, 6), ""))
    with torch.autocast(tensors["u"].device.type, torch.bfloat16):
        assert gconv_mix(**tensors, impl=impl).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="one dtype"):
            gconv_mix(**(tensors | {"u": tensors["u"].double()}), impl=impl)


LAYER_ERRORS = {
    "rank of x": (
        {"x": torch.ones(3, 5)},
        ValueError,
        r"expected 3D \(unbatched\) or 4D \(batched\) input, got 2D input",
    ),
    "one sample, many z": ({"x": torch.ones(3, 5, 6)}, ValueError, r"z must have shape \(1, dz\).*got \(2, 2\)"),
    "padding mode": ({"padding_mode": "wrap"}, ValueError, "padding_mode must be one of 'zeros', .*, got 'wrap'"),
    "channels": (
        {"x": torch.ones(2, 4, 5, 6)},
        ValueError,
        r"weight must have shape \(n, 4, kh, kw\).*got \(4, 3, 3, 3\)",
    ),
    "batch of z": ({"z": torch.ones(3, 2)}, ValueError, r"z must have shape \(2, dz\).*got \(3, 2\)"),
    "rank of z": ({"z": torch.ones(2)}, ValueError, r"z must have shape \(2, dz\).*got \(2,\)"),
    "length of z": (
        {"z": torch.ones(2, 3)},
        ValueError,
        r"z must have shape \(2, 2\).*\(4, 5\), got \(2, 3\)",
    ),
    "scale_weight": (
        {"scale_weight": torch.ones(3, 5)},
        ValueError,
        r"scale_weight must have shape \(4, 5\).*\(3, 5\)",
    ),
    "mix_weight": ({"mix_weight": torch.ones(4, 3)}, ValueError, r"mix_weight must have shape \(4, 4\).*got \(4, 3\)"),
    "bias": ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(4,\).*got \(3,\)"),
    "integers": ({"x": torch.ones(2, 3, 5, 6, dtype=torch.int32)}, TypeError, "floating point input, got torch.int32"),
    "dtypes": ({"z": torch.ones(2, 2, dtype=torch.float64)}, TypeError, "one dtype, got x of torch.float32 and z of"),
    "impl": ({"impl": "fast"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize("which", LAYER_ERRORS)
def test_layer_refuses(impl, which):
    wrong, error, message = LAYER_ERRORS[which]
    with pytest.raises(error, match=message):
        gconv2d(**({"impl": impl} | layer(dtype=torch.float32) | wrong))


def test_linear_refuses(impl):
    with pytest.raises(ValueError, match=r"expected 2D input \(got 4D input\)"):
        glinear(**layer(), impl=impl)
    with pytest.raises(ValueError, match=r"weight must have shape \(n, 3\).*got \(4, 2\)"):
        glinear(**(layer((2, 3)) | {"weight": torch.ones(4, 2)}), impl=impl)
