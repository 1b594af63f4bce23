"""``make masks``: the picture of a generator's masks, from a checkpoint."""

import json

import pytest
import torch

from benchmarks.paper import masks
from pixnorm.networks import Generator

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore:pixnorm.spn runs on the reference")]


@pytest.mark.parametrize("norm", [{"norm": "spn"}, {"norm": "cspn", "num_classes": 3}])
def test_a_checkpoint(tmp_path, norm):
    options = masks.OPTIONS | {"channels": 4} | norm
    torch.save({"options": options, "model": Generator(**options).state_dict()}, tmp_path / "g.pt")
    masks.main(["--checkpoint", str(tmp_path / "g.pt"), "--results", str(tmp_path)])
    assert (tmp_path / "masks.png").stat().st_size > 10_000
    assert "masks.png" in (tmp_path / "masks.md").read_text()
    assert [of["channel"] for of in json.loads((tmp_path / "masks.json").read_text())["channels"]] == [0, 1, 2, 3]


def test_masks_are_those_of_the_layer_and_leave_the_generator_as_it_is():
    generator = Generator(**masks.OPTIONS | {"channels": 4}).eval()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    latents = torch.randn(3, 32)
    images, found = masks.images_and_masks(generator, latents)
    assert found.shape == (3, 4, 32, 32) and 0 < found.min() < found.max() < 1
    torch.testing.assert_close(images, generator(latents))
    assert not generator.get_submodule(masks.LAYER)._forward_pre_hooks
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_channels_of_greatest_contrast():
    constant_channels = torch.zeros(2, 6, 4, 4)
    constant_channels[:, 4, :2] = 1
    constant_channels[:, 1, :1] = 1
    constant_channels[:, 3, 0, 0] = 1
    assert masks.of_greatest_contrast(constant_channels) == [4, 1, 3]
