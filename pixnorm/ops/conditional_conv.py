r"""Conditional convolution (cConv, "Filter-wise scaling and channel-wise shifting", arXiv 1906.00709):

    W_y[o, i] = scale[y, o] · W[o, i] + shift[y, i]          the shift is added to all taps

so that each sample is convolved with the kernels of its class. They are never formed, as convolution is linear:

    conv(x, W_y)[o] = scale[y, o] · conv(x, W)[o] + box(Σ_i shift[y, i] x[i])

where box is the convolution of one channel with a kernel of ones. The cost is that of one convolution with W for the
whole batch, of one pass over x and of two over the output; all of it is PyTorch's, on every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnorm.ops.checks import check_classes, check_device, check_image, check_shape
from pixnorm.ops.common import public, rows_of_classes


@public
def conditional_conv2d(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Conditional convolution (arXiv 1906.00709): ``F.conv2d`` in which the class of a sample scales each kernel, and
    adds a number to the taps of each input channel. Equal to convolution with kernels
    ``scale[y, o] * weight[o, i] + shift[y, i]``, which are not formed.

    Args:
        x: (N, Ci, H, W).
        y: (N,) of int64 in [0, K); or one-hot (N, K), also soft.
        weight: (Co, Ci / groups, kh, kw).
        scale: (K, Co).
        shift: (K, Ci).
        bias: (Co,) or None, added at the end, the same for all classes.
        stride, padding, dilation, groups: as in ``F.conv2d``.

    Returns:
        (N, Co, H', W') as ``F.conv2d``, whose dtypes and autocast it follows.

    Raises:
        ValueError: a shape does not fit, or a class is out of range (on the CPU; on a GPU looking would wait for it).
        RuntimeError: tensors on several devices, or of several dtypes outside autocast.
    """
    check_image(x)
    channels, features = x.shape[1], weight.shape[0]
    classes = scale.shape[0]
    check_classes(y, x.shape[0], classes)
    check_shape("weight", weight, (features, channels // groups, *weight.shape[2:]), x)
    check_shape("scale", scale, (classes, features), x)
    check_shape("shift", shift, (classes, channels), x)
    for name, tensor in (("y", y), ("weight", weight), ("scale", scale), ("shift", shift)):
        check_device(name, tensor, x)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    plain = F.conv2d(x, weight, None, **geometry)
    of_group = rows_of_classes(y, shift).to(plain.dtype).unflatten(1, (groups, -1))
    summed = torch.einsum("ngi,ngihw->nghw", of_group, x.to(plain.dtype).unflatten(1, (groups, -1)))
    box = F.conv2d(summed, summed.new_ones(groups, 1, *weight.shape[2:]), None, **geometry)
    if groups > 1:
        box = box.repeat_interleave(features // groups, dim=1)
    rows = rows_of_classes(y, scale).to(plain.dtype)[:, :, None, None]
    scaled = rows * plain if bias is None else torch.addcmul(bias.to(plain.dtype)[:, None, None], rows, plain)
    return scaled + box
