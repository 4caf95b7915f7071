"""Reprogram a pretrained timm model for robustness, and learn honestly what that is worth.

>>> import timm_nrpm
>>> model = timm_nrpm.create_model("resnet18", pretrained=True, lam=0.8)
"""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from timm_nrpm import functional
from timm_nrpm.base import WeightsUnavailable, WrongBase
from timm_nrpm.browsing import inspect, list_variants, pull
from timm_nrpm.calibration import calibrate_
from timm_nrpm.certificates import CertificationReport
from timm_nrpm.certification import certify, smoothed_predict
from timm_nrpm.config import NRPMConfig, TuneConfig
from timm_nrpm.corruption_report import CorruptionReport
from timm_nrpm.corruptions import corrupt, evaluate_corruptions
from timm_nrpm.evaluation import evaluate
from timm_nrpm.history import History
from timm_nrpm.loading import from_pretrained
from timm_nrpm.pareto import Candidate, ParetoFront
from timm_nrpm.publishing import Published, push_to_hub
from timm_nrpm.registry import create_model, list_models
from timm_nrpm.report import AttackResult, RobustnessReport
from timm_nrpm.reprogramming import ReprogrammingWarning, lambdas, plain_copy, reprogram_, restore_
from timm_nrpm.saving import save_pretrained
from timm_nrpm.search import search_lambda
from timm_nrpm.threats import Threat
from timm_nrpm.transfers import HubError
from timm_nrpm.variants import BrokenVariant
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from timm_nrpm.tuning import Diverged, tune

__all__ = [
    "AttackResult",
    "BrokenVariant",
    "Candidate",
    "CertificationReport",
    "CorruptionReport",
    "Diverged",
    "History",
    "HubError",
    "NRPMConfig",
    "ParetoFront",
    "Published",
    "ReprogrammingWarning",
    "RobustnessReport",
    "Threat",
    "TuneConfig",
    "WeightsUnavailable",
    "WrongBase",
    "__version__",
    "calibrate_",
    "certify",
    "corrupt",
    "create_model",
    "evaluate",
    "evaluate_corruptions",
    "from_pretrained",
    "functional",
    "inspect",
    "lambdas",
    "list_models",
    "list_variants",
    "plain_copy",
    "pull",
    "push_to_hub",
    "reprogram_",
    "restore_",
    "save_pretrained",
    "search_lambda",
    "smoothed_predict",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Modules, and what takes a second to import, at their first use: `timm_nrpm.diagnostics`, `timm_nrpm.tune`."""
    if name in ("Diverged", "tune"):
        return getattr(import_module(f"{__name__}.tuning"), name)  # which imports accelerate
    if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in iter_modules(__path__))})
