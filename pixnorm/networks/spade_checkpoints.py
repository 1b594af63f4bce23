"""Checkpoints of NVlabs/SPADE for our networks."""

import re

from torch import Tensor

from pixnorm.nn.spade import from_nvlabs_spade

_BLOCKS = ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4")
# NVlabs' path of a layer, and ours. Layers of encoder and discriminator are sequences with the convolution at 0, which
# are themselves at 0 of a sequence in the discriminator.
_PATHS = (
    (re.compile(rf"({'|'.join(_BLOCKS)})\.norm_([01])"), lambda m: f"blocks.{_block(m)}.norm{int(m[2]) + 1}"),
    (re.compile(rf"({'|'.join(_BLOCKS)})\.conv_([01])"), lambda m: f"blocks.{_block(m)}.conv{int(m[2]) + 1}"),
    (re.compile(rf"({'|'.join(_BLOCKS)})\.(norm|conv)_s"), lambda m: f"blocks.{_block(m)}.{m[2]}_shortcut"),
    (re.compile(r"(fc|conv_img|fc_mu)"), lambda m: m[1]),
    (re.compile(r"fc_var"), lambda m: "fc_logvar"),
    (re.compile(r"layer(\d)\.0"), lambda m: f"convs.{int(m[1]) - 1}"),
    (re.compile(r"discriminator_(\d)\.model(\d)\.0(?:\.0)?"), lambda m: f"scales.{m[1]}.convs.{m[2]}"),
)
# Of the older spectral norm of PyTorch (``torch.nn.utils.spectral_norm``), and of the present one.
_SPECTRAL = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
_LEAVES = (
    r"weight|bias|weight_orig|weight_u|weight_v|mlp_(?:shared\.0|gamma|beta)\.(?:weight|bias)|"
    r"param_free_norm\.(?:running_mean|running_var|num_batches_tracked)"
)
_KEY = re.compile(rf"(.+?)\.({_LEAVES})")


def _block(match: re.Match) -> int:
    return _BLOCKS.index(match[1])


def from_nvlabs(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of NVlabs/SPADE for the networks here, ready for ``load_state_dict``.

    Args:
        state_dict: of the generator (``latest_net_G.pth``, for :class:`SPADEGenerator`), the encoder (``_E``,
            :class:`SPADEEncoder`) or the discriminator (``_D``, :class:`SPADEDiscriminator`).

    Returns:
        The state dict with our keys. Tensors are the given ones, but for the filters of scale and shift of the SPADE
        layers, which are joined.

    Raises:
        ValueError: a key belongs to none of the three networks.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        path = match and _our_path(match[1])
        if path is None:
            raise ValueError(f"not a key of NVlabs/SPADE's generator, encoder or discriminator: {key!r}")
        layers.setdefault(path, {})[_SPECTRAL.get(match[2], match[2])] = value
    renamed = {}
    for path, layer in layers.items():
        renamed |= {f"{path}.{name}": value for name, value in from_nvlabs_spade(layer).items()}
    return renamed


def _our_path(path: str) -> str | None:
    for pattern, ours in _PATHS:
        if match := pattern.fullmatch(path):
            return ours(match)
    return None
