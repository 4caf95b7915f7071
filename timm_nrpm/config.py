"""Settings as frozen dataclasses, validated on construction and convertible to and from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from timm_nrpm.checks import check_choice, check_integer, check_number, shown
from timm_nrpm.choices import (
    BOUNDS,
    GRADIENTS,
    OBJECTIVES,
    OPTIMIZERS,
    PARADIGMS,
    PENALTIES,
    PRECISIONS,
    SCHEDULES,
    TUNED_NORMS,
)

if TYPE_CHECKING:
    from torch import nn

SMALLEST_EPS = 1e-15

OWN_DEFAULTS = {("srat", "beta"): 1.0, ("comp-sum", "beta"): 0.3, ("srat", "temperature"): 0.1}
"""Defaults of settings that differ from those of other objectives, by objective and setting."""

Lambdas: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""One number for all layers, a sequence with one number per layer in forward order, or ``{glob: number}``."""

LayerSelection: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Module], bool] | None"
"""``None`` (every supported layer), a glob, several globs, ``"first:N"``, or ``f(name, module) -> bool``."""


def check_lam(value: Any, where: str = "lam") -> float:
    """Return `value` as a float in [0, 1], or raise a ValueError that names `where` and its range."""
    return check_number(where, value, least=0, most=1, why=", where 0 is the robust estimate and 1 the plain layer")


@dataclass(frozen=True)
class NRPMConfig:
    """How a model is reprogrammed (NRPM, arXiv 2410.04577, Algorithm 1).

    Args:
        lam: Lambda in [0, 1], where 1 is the plain layer bit for bit and 0 the robust estimate alone: one number for
            all layers, a sequence with one number for each chosen layer in the order in which the model calls them, or
            a mapping from layer names or globs to numbers, in which a name takes precedence over a glob, and a later
            glob over an earlier one.
        iterations: Number of steps of reweighted least squares, the paper's K >= 0; 0 is the plain layer.
        eps: Number > 0 that is added to every distance before it is inverted, in units of one product `a_d * x_d`.
        penalty: Name of the penalty: ``"l1"`` (the paper's), ``"huber"``, ``"mcp"``, ``"huber-mcp"`` or ``"l2"`` (the
            plain layer).
        layers: Layers to reprogram, see :data:`LayerSelection`. Globs match the names in `model.named_modules()`;
            ``"first:4"`` takes the first four convolutional or linear layers in the order in which the model calls
            them.
        delta: Width of the quadratic zone of the Huber penalties, in the same units as `eps`.
        gamma: Distance beyond which the MCP penalties are constant, in the same units; must be above `delta` for
            `"huber-mcp"`.
        learnable: Whether lambda takes gradients (paradigms 2 and 3) or is frozen (paradigm 1).
        standardize: Whether the estimate is in standard units: of the products of inputs less the mean of their
            channel, with `eps`, `delta` and `gamma` in the mean distance of an output's products to their mean, so that
            an eps of 0.3 to 2 suits every layer. :func:`timm_nrpm.calibrate_` takes them from images, and the model
            raises without it. The paper has no such units.

    Raises:
        ValueError: A value is outside its range; the message names the range.

    Example:
        >>> NRPMConfig(lam=0.5, layers="layer1.*").iterations
        3
        >>> NRPMConfig.from_json(NRPMConfig(lam=0.5).to_json()) == NRPMConfig(lam=0.5)
        True
    """

    lam: Lambdas = 0.8
    iterations: int = 3
    eps: float = 1e-3
    penalty: str = "l1"
    layers: LayerSelection = None
    delta: float = 3.0
    gamma: float = 4.0
    learnable: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        lam: Any = self.lam
        lam = lam.tolist() if hasattr(lam, "tolist") else lam  # numbers and arrays of NumPy and torch
        # Every setting has one canonical form, so that a config equals its own JSON round trip.
        if isinstance(lam, Mapping):
            lam = {str(k): check_lam(v, f"lam[{k!r}]") for k, v in lam.items()}
        elif isinstance(lam, Sequence) and not isinstance(lam, str):
            lam = tuple(check_lam(v, f"lam[{i}]") for i, v in enumerate(lam))
        else:
            lam = check_lam(lam)
        object.__setattr__(self, "lam", lam)
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        names = self.layers if isinstance(self.layers, tuple) else ()
        if not (self.layers is None or isinstance(self.layers, (str, tuple)) or callable(self.layers)) or not all(
            isinstance(name, str) for name in names
        ):
            raise ValueError(
                f'layers={shown(self.layers)} is not understood: give a pattern like "layer1.*", several in a list, '
                '"first:4", or a function of name and module.'
            )
        if not (isinstance(self.learnable, bool) and isinstance(self.standardize, bool)):
            raise ValueError(f"learnable={self.learnable!r}, standardize={self.standardize!r}: give True or False.")
        settings = check_estimator(self.iterations, self.eps, self.penalty, self.delta, self.gamma)
        for name, value in settings._asdict().items():
            object.__setattr__(self, name, value)

    @property
    def estimator(self) -> Estimator:
        """The settings of the estimate alone, without those that say where and how it is used in a model."""
        return Estimator(self.iterations, self.eps, self.penalty, self.delta, self.gamma)

    @property
    def settings(self) -> dict[str, Any]:
        """All but lambda and layers, and `standardize` only where it is True, since earlier versions have no such."""
        return {k: v for k, v in asdict(self).items() if k not in ("lam", "layers") and (k != "standardize" or v)}

    def to_dict(self) -> dict[str, Any]:
        if callable(self.layers):
            raise ValueError(
                "layers is a function, which JSON cannot hold: give the names it selects instead, "
                "for example layers=list(timm_nrpm.lambdas(model))."
            )
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> NRPMConfig:
        return cls(**json.loads(text))


class Estimator(NamedTuple):
    """The settings of the robust estimate; :class:`NRPMConfig` explains each."""

    iterations: int
    eps: float
    penalty: str
    delta: float
    gamma: float


def check_estimator(iterations: int, eps: float, penalty: str, delta: float = 3.0, gamma: float = 4.0) -> Estimator:
    """Return the settings as plain numbers, or raise a ValueError where the estimator cannot run with them."""
    settings = Estimator(
        check_integer("iterations", iterations, least=0, why=", the paper's K (0 is the plain layer)"),
        check_number("eps", eps, least=SMALLEST_EPS, why=", since (1 / eps)^2 must fit float32"),
        check_choice("penalty", penalty, PENALTIES),
        check_number("delta", delta, above=0),
        check_number("gamma", gamma, above=0),
    )
    if settings.penalty == "huber-mcp" and settings.gamma <= settings.delta:
        raise ValueError(
            f"gamma={settings.gamma} must be larger than delta={settings.delta} for the huber-mcp penalty."
        )
    return settings


def bound_of(norm: str, eps: float | None, name: str = "eps") -> float:
    """The bound of a change: 8/255 under Linf if none is given; `name` is that of the argument.

    Raises:
        ValueError: None is given under another norm, which has no usual bound.
    """
    if eps is None and norm != "Linf":
        raise ValueError(f"{name}= is missing: under {norm} it is {BOUNDS[norm]}.")
    return 8 / 255 if eps is None else eps


@dataclass(frozen=True)
class TuneConfig:
    """How a model is tuned by adversarial training (NRPM, arXiv 2410.04577, section 4, paradigms 2 and 3).

    Args:
        paradigm: Parameters that train: with `"lambda"` one lambda per layer, while every weight is frozen (paradigm
            2); with `"all"` the lambdas and every weight that is not frozen (paradigm 3). What you froze by
            `requires_grad_(False)` stays frozen, a lambda of a model reprogrammed with `learnable=True` as well. With
            `learnable=False` every lambda starts frozen, and trains all the same.
        trainable: Globs of parameter names that replace the paradigm, such as `("*.lam", "layer4.*", "fc.*")`. Matching
            parameters train even if they were frozen. With or without it, frozen parts stay as they are: a BatchNorm
            whose weight and bias are frozen keeps its statistics, and a frozen block has no dropout.
        still: Globs of modules that stay in evaluation mode, such as `"*.bn*"`, though their weights may train.
        objective: Training loss, see :mod:`timm_nrpm.tuning.losses`: `"clean"`, `"fgsm"`, `"clean+fgsm"` (the sum of
            the two), `"pgd"`, `"trades"`, `"mart"`, `"sat"`, `"awp"`; `"weat"` (images weighted by energy), `"kl-dro"`
            (the worst images weighted most), `"srat"` (classes of unequal size reweighted and separated), `"comp-sum"`
            (smooth in the margins); or `"teacher"`, see :func:`timm_nrpm.teacher.tune_by_teacher`.
        norm: Norm of the inner attack: `"Linf"`, `"L2"` or `"L1"`, see :class:`timm_nrpm.Threat`. A change of n pixels
            (L0) lies within an L1 bound of n times the channels.
        eps: Bound of that norm, in pixel units of [0, 1]: under Linf the largest change of a pixel, by default 8/255;
            the other norms have no default. 0 attacks nothing.
        steps: Number of steps of the inner attack; FGSM always takes one.
        step_size: Its step size in pixel units: by default `eps / 4` (the paper's 2/255 at 8/255), or `eps` for one.
        gradient: Gradient that the inner attack follows: `"own"`, the model's own, as in the paper; `"bpda"`, with
            the estimate forward and the linear map backward; `"plain"`, that of the model at lambda = 1; or
            `"mixture"`, each of the three for every third image, without which a model may learn to mislead the attack.
        beta: Weight of the second term of TRADES, MART, SAT, WEAT, SRAT and comp-sum; by default 6, which is that of
            the authors of the first three; 1 for SRAT; and 0.3 for comp-sum, whose term grows with the logits.
        temperature: Temperature of KL-DRO's weights, of SRAT's similarities or of what the teacher says; by default 1,
            and 0.1 for SRAT.
        weight_perturbation: Size of AWP's adversarial step in a weight, relative to the weight's norm.
        target_momentum: Share of the previous target that SAT keeps when it mixes in the model's prediction.
        target_start: First epoch, counted from 0, in which SAT updates its targets.
        epochs: Number of passes over the loader.
        optimizer: Name of a timm optimizer whose whole state a checkpoint can hold: `"sgd"`, `"momentum"`, `"adam"`,
            `"adamw"`, `"nadamw"`, `"adafactor"`, `"adopt"`, `"lamb"`, `"lars"`, `"lion"`, `"laprop"`, `"mars"` or
            `"muon"`.
        lr: Learning rate of all parameters but lambda.
        lam_lr: Learning rate of lambda, which has no weight decay.
        weight_decay: Weight decay of all parameters with more than one dimension, lambda excepted.
        calibrate: Number of training images for :func:`timm_nrpm.calibrate_`, which runs before the first epoch and, if
            no weight trains, after every epoch, since statistics are stale once lambdas have changed; 0 for none.
        schedule: Schedule of the learning rates: `"cosine"`, `"tanh"` or `"poly"`, which decay to 0, or `"constant"`.
        warmup_epochs: Number of epochs of linear warm-up of the learning rates.
        clip: Largest norm of the gradient, of the lambdas and of all else separately; None lets any gradient pass.
        patience: Number of consecutive steps with a non-finite gradient after which
            :class:`timm_nrpm.errors.Diverged` is raised. Such a step changes nothing.
        accumulate: Number of batches whose mean gradient makes one step; the last step of an epoch takes what is left.
        precision: `"no"` for float32, or `"bf16"`, under which the estimate is still computed in float32.
        seed: Seed of the order of the images, their augmentation, the start of the attack, and dropout.
        output: Folder for checkpoints, history, plots and the tuned variant; None writes none of them.
        checkpoint_every: Number of steps between checkpoints.
        keep: Number of most recent checkpoints to keep.
        evaluate_steps: Number of steps of PGD on the validation images, before the first and after every epoch.
        evaluate_eps: Bound of the same norm for validation images; by default `eps`, or 8/255 under Linf if that is 0.
        log_every: Number of steps between two rows of the history.
        trackers: Names of trackers that accelerate knows, such as `("tensorboard",)`.
        push_to: Repository on the Hub, `owner/name`, to which the main process sends the variant with every checkpoint,
            in the background. If the Hub is down, the run goes on, and waits for it at its end, two minutes at most.
        license: Licence of the pushed variant, an id that the Hub knows; by default that of the base model.

    Raises:
        ValueError: A value is outside its range; the message names the range.

    Example:
        >>> TuneConfig(paradigm="all", objective="fgsm", eps=0.1, epochs=2).attack_step_size
        0.1
    """

    paradigm: str = "lambda"
    trainable: tuple[str, ...] | None = None
    still: tuple[str, ...] = ()
    objective: str = "pgd"
    norm: str = "Linf"
    eps: float = None  # type: ignore[assignment]  # __post_init__ puts a number in its place
    steps: int = 7
    step_size: float | None = None
    gradient: str = "own"
    beta: float = None  # type: ignore[assignment]  # as for eps
    temperature: float = None  # type: ignore[assignment]  # as for eps
    weight_perturbation: float = 0.01
    target_momentum: float = 0.9
    target_start: int = 1
    epochs: int = 5
    optimizer: str = "sgd"
    lr: float = 0.01
    lam_lr: float = 0.01
    weight_decay: float = 5e-4
    calibrate: int = 0
    schedule: str = "cosine"
    warmup_epochs: int = 0
    clip: float | None = 1.0
    patience: int = 10
    accumulate: int = 1
    precision: str = "no"
    seed: int = 0
    output: str | None = None
    checkpoint_every: int = 100
    keep: int = 3
    evaluate_steps: int = 10
    evaluate_eps: float | None = None
    log_every: int = 1
    trackers: tuple[str, ...] = ()
    push_to: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for name in ("trainable", "still", "trackers"):
            given: Any = getattr(self, name)
            if given is not None:
                given = (given,) if isinstance(given, str) else tuple(given)
                object.__setattr__(self, name, given)
        choices = {"paradigm": PARADIGMS, "objective": OBJECTIVES, "gradient": GRADIENTS, "precision": PRECISIONS}
        choices |= {"norm": TUNED_NORMS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.output is not None:
            object.__setattr__(self, "output", str(self.output))
        object.__setattr__(self, "eps", bound_of(self.norm, self.eps))
        for name, value in (("beta", 6.0), ("temperature", 1.0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, OWN_DEFAULTS.get((self.objective, name), value))
        self._check_numbers()
        if self.push_to is not None and self.output is None:
            raise ValueError(f"push_to={self.push_to!r} needs output=, the folder in which variants wait to be sent.")
        if self.evaluate_eps == 0:
            raise ValueError("evaluate_eps=0 attacks nothing: give the change of a pixel, like 8 / 255.")

    def _check_numbers(self) -> None:
        """Convert every number to a plain Python number, or raise a ValueError that names its range."""
        counts = ("steps", "epochs", "patience", "accumulate", "keep")
        least = dict.fromkeys((*counts, "checkpoint_every", "evaluate_steps", "log_every"), 1)
        least |= dict.fromkeys(("warmup_epochs", "seed", "target_start", "calibrate"), 0)
        for name, low in least.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least=low))
        bound = 1.0 if self.norm == "Linf" else math.inf
        at_most = {"eps": bound, "step_size": bound, "evaluate_eps": bound, "target_momentum": 1.0}
        at_most |= dict.fromkeys(("beta", "weight_perturbation", "lr", "lam_lr", "weight_decay"), math.inf)
        for name, high in at_most.items():
            value = getattr(self, name)
            if value is not None or name not in ("step_size", "evaluate_eps"):
                object.__setattr__(self, name, check_number(name, value, least=0, most=high))
        why = ", since logits and losses are divided by it"
        object.__setattr__(self, "temperature", check_number("temperature", self.temperature, above=0, why=why))
        if self.clip is not None:
            why = ", or None to let any gradient pass"
            object.__setattr__(self, "clip", check_number("clip", self.clip, above=0, why=why))

    @property
    def attack_steps(self) -> int:
        """Number of steps that the inner attack takes."""
        return 1 if self.objective in ("fgsm", "clean+fgsm") else self.steps

    @property
    def attack_step_size(self) -> float:
        """Length of a step of the inner attack in its norm, in pixel units."""
        if self.step_size is not None:
            return self.step_size
        return self.eps if self.attack_steps == 1 else self.eps / 4

    @property
    def validation_eps(self) -> float:
        """Bound of the change in attacks on the validation images, in pixel units."""
        return bound_of(self.norm, self.eps or None, "evaluate_eps") if self.evaluate_eps is None else self.evaluate_eps

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TuneConfig:
        return cls(**json.loads(text))
