"""The words that settings allow: names of norms, suites, objectives, optimizers and the like."""

from __future__ import annotations

PENALTIES = ("l1", "huber", "mcp", "huber-mcp", "l2")

NORMS = ("Linf", "L2", "L1", "L0", "patch")
TUNED_NORMS = NORMS[:3]
"""Norms of the attacks that models are tuned under."""

BOUNDS = {
    "Linf": "the largest change of a pixel in [0, 1], like 8 / 255",
    "L2": "the length of the change in pixel units, like 0.5",
    "L1": "the sum of the changes in pixel units, like 12",
    "L0": "a whole number of pixels, like 10",
    "patch": "the side of a square, a whole number of pixels, like 5",
}
"""Meaning of the bound under each norm, for error messages."""

SUITES = ("quick", "paper", "standard", "autoattack", "adaptive")
EFFORTS = ("fast", "default", "exhaustive")
OBJECTIVES = (
    *("clean", "fgsm", "clean+fgsm", "pgd", "trades", "mart", "sat", "awp"),
    *("weat", "kl-dro", "srat", "comp-sum", "teacher"),
)
TEMPERED = ("kl-dro", "srat", "teacher")
"""Objectives that have a temperature."""

FORMATS = ("onnx", "pt2", "torchscript", "openvino")
"""Formats of exported models."""

GRADIENTS = ("own", "bpda", "plain", "mixture")
PARADIGMS = ("lambda", "all")
PRECISIONS = ("no", "bf16")
SCHEDULES = ("cosine", "tanh", "poly", "constant")
OPTIMIZERS = (
    *("sgd", "momentum", "adam", "adamw", "nadamw", "adafactor", "adopt"),
    *("lamb", "lars", "lion", "laprop", "mars", "muon"),
)
