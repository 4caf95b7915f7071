"""Reprogram a pretrained timm model for robustness, and measure honestly what that is worth.

>>> import timm_nrpm
>>> model = timm_nrpm.create_model("resnet18", pretrained=True, lam=0.8)

The import adds the `nrpm_*` models and this package's own backbones to timm's registry, and has timm trace a
reprogrammed layer as one operation. It changes no other state.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_nrpm import errors as errors
from timm_nrpm.lazy import is_command, modules_of
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from timm_nrpm.advice.advise import advise
    from timm_nrpm.attacks.threats import Threat
    from timm_nrpm.config import NRPMConfig, TuneConfig
    from timm_nrpm.deployment.export import export
    from timm_nrpm.ensembles.folders import from_pretrained, save_pretrained
    from timm_nrpm.evaluation.certification import certify
    from timm_nrpm.evaluation.corruptions import evaluate_corruptions
    from timm_nrpm.evaluation.cost import cost
    from timm_nrpm.evaluation.evaluate import evaluate
    from timm_nrpm.evaluation.report import RobustnessReport
    from timm_nrpm.evaluation.search import search_lambda
    from timm_nrpm.evaluation.shifts import Shift
    from timm_nrpm.figures.plot import plot
    from timm_nrpm.hub.browsing import inspect, list_variants, pull
    from timm_nrpm.hub.publishing import push_to_hub
    from timm_nrpm.models.adaptation import adapt_
    from timm_nrpm.models.calibration import calibrate_
    from timm_nrpm.models.registry import create_model, is_supported, list_models
    from timm_nrpm.models.reprogramming import lambdas, plain_copy, reprogram_, restore_
    from timm_nrpm.tuning.tune import tune

__all__ = [
    "NRPMConfig",
    "RobustnessReport",
    "Shift",
    "Threat",
    "TuneConfig",
    "__version__",
    "adapt_",
    "advise",
    "calibrate_",
    "certify",
    "cost",
    "create_model",
    "evaluate",
    "evaluate_corruptions",
    "export",
    "from_pretrained",
    "inspect",
    "is_supported",
    "lambdas",
    "list_models",
    "list_variants",
    "plain_copy",
    "plot",
    "pull",
    "push_to_hub",
    "reprogram_",
    "restore_",
    "save_pretrained",
    "search_lambda",
    "tune",
]

_HOMES = {
    "NRPMConfig": "config",
    "RobustnessReport": "evaluation.report",
    "Shift": "evaluation.shifts",
    "Threat": "attacks.threats",
    "TuneConfig": "config",
    "adapt_": "models.adaptation",
    "advise": "advice.advise",
    "calibrate_": "models.calibration",
    "certify": "evaluation.certification",
    "cost": "evaluation.cost",
    "create_model": "models.registry",
    "evaluate": "evaluation.evaluate",
    "evaluate_corruptions": "evaluation.corruptions",
    "export": "deployment.export",
    "from_pretrained": "ensembles.folders",
    "inspect": "hub.browsing",
    "is_supported": "models.registry",
    "lambdas": "models.reprogramming",
    "list_models": "models.registry",
    "list_variants": "hub.browsing",
    "plain_copy": "models.reprogramming",
    "plot": "figures.plot",
    "pull": "hub.browsing",
    "push_to_hub": "hub.publishing",
    "reprogram_": "models.reprogramming",
    "restore_": "models.reprogramming",
    "save_pretrained": "ensembles.folders",
    "search_lambda": "evaluation.search",
    "tune": "tuning.tune",
}
"""The module that defines each public name; it is imported when the name is first used."""

_SUBPACKAGES = (
    *("nn", "data", "models", "attacks", "evaluation", "tuning", "subnetworks", "advice", "ensembles", "deployment"),
    *("figures", "hub", "jobs", "cli"),
)
"""The subpackages, in the order in which a name without its subpackage, such as `timm_nrpm.flags`, is looked up."""


_module = modules_of(__name__, *(f"{__name__}.{name}" for name in _SUBPACKAGES))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return _module(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


if not is_command():  # the command's help needs neither torch nor timm, and its subcommands import what they use
    import_module(f"{__name__}.models.registry")
