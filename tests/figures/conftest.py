import pytest

from timm_nrpm import Threat, create_model, evaluate
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import DIGITS


@pytest.fixture(scope="session")
def real():
    """Reports on the bundled model under two bounds."""
    pixels, labels = (t[:40] for t in digits("test"))
    model = create_model(DIGITS, pretrained=True, lam=0.6).eval()
    threats = (Threat("Linf", 0.1), Threat("Linf", 0.2))
    return [evaluate(model, [(pixels, labels)], threat, "quick", steps=3) for threat in threats]
