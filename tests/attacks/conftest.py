"""What the tests of attacks share."""

import pytest
import torch
from small_models import SHAPE, bowl


@pytest.fixture
def batch():
    """Ten images and the classes that the bowl gives them."""
    pixels = torch.rand(10, *SHAPE)
    return pixels, bowl()(pixels).argmax(1)
