"""Algorithm 2: linear combinations of what early layers give, on the images they were solved on and on others."""

import pytest
import timm
import torch
from torch import nn

from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.linear import linear_readout
from timm_nrpm.subnetworks.splitting import split


def batches(count, size):
    pixels, labels = (part[:count] for part in digits("test"))
    return list(zip(pixels.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="module")
def net():
    return PixelModel(timm.create_model("resnet8_digits", pretrained=True)).eval()


def test_it_is_better_on_the_images_it_was_solved_on(net):
    found = linear_readout(net, batches(200, 50), split(net.model, 2))
    assert found.solved > found.held_out > found.random
    assert found.network > 0.9
    assert found.random < 0.4
    assert found.layers == 6


def test_weights_are_those_of_least_squares_in_the_mean(net):
    """The same by NumPy's least squares, from outputs that are computed by hand."""
    images = batches(120, 40)
    found = linear_readout(net, images, split(net.model, 7))
    with torch.no_grad():
        outputs = [
            net.model.maxpool(net.model.act1(net.model.bn1(net.model.conv1((pixels - 0.5) / 0.5)))).flatten(1)
            for pixels, _ in images
        ]
        solved = [
            torch.linalg.lstsq(x.double(), net(p).double(), driver="gelsd")[0]
            for x, (p, _) in zip(outputs, images, strict=True)
        ]
    mean = torch.stack(solved).mean(0)
    right = [(x.double() @ mean).argmax(1).eq(labels) for x, (_, labels) in zip(outputs, images, strict=True)]
    assert found.solved == pytest.approx(torch.cat(right).double().mean().item(), abs=0.02)
    even = torch.stack(solved[::2]).mean(0)
    held = [(outputs[1].double() @ even).argmax(1).eq(images[1][1])]
    held += [(outputs[i].double() @ solved[1]).argmax(1).eq(images[i][1]) for i in (0, 2)]
    assert found.held_out == pytest.approx(torch.cat(held).double().mean().item(), abs=0.02)


class Linear(nn.Module):
    """Whose logits are a linear combination of its first layer (Theorem 3), at fewer values than images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 12, bias=False), nn.Linear(12, 10, bias=False)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


def test_a_linear_network_is_reproduced_on_other_images_as_well():
    net = PixelModel(Linear(), mean=(0.0,), std=(1.0,)).eval()
    found = linear_readout(net, batches(200, 50), split(net.model, 1, example=torch.zeros(1, 1, 8, 8)))
    assert found.values == 12
    assert found.solved == found.held_out == found.network


def test_one_batch_is_refused(net):
    with pytest.raises(ValueError, match=r"1 batches were given.*give two or more"):
        linear_readout(net, batches(40, 40), split(net.model, 2))
