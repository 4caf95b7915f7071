"""The training losses in NumPy and float64, image by image where that reads like the paper."""

import math

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.log(softmax(z)[np.arange(len(y)), y])


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(1)


def mart_of(z: np.ndarray, moved: np.ndarray, y: np.ndarray, beta: float) -> float:
    """Image by image, as equation 11 reads."""
    total = 0.0
    for row, other, label in zip(softmax(z), softmax(moved), y, strict=True):
        boosted = -math.log(other[label]) - math.log(1 - max(np.delete(other, label)))
        total += boosted + beta * sum(row * np.log(row / other)) * (1 - row[label])
    return total / len(y)


def energy_weights(z: np.ndarray) -> np.ndarray:
    """`1 / log(1 + exp(|E|))` of WEAT."""
    energies = [-math.log(sum(math.exp(each) for each in row)) for row in z]
    return np.array([1 / math.log(1 + math.exp(abs(energy))) for energy in energies])


def weat_of(z: np.ndarray, moved: np.ndarray, y: np.ndarray, beta: float) -> float:
    each = cross_entropy(moved, y) + beta * divergence(softmax(z), softmax(moved))
    return float((energy_weights(z) * each).mean())


def kl_dro_of(moved: np.ndarray, y: np.ndarray, temperature: float) -> float:
    return float(temperature * np.log(np.mean(np.exp(cross_entropy(moved, y) / temperature))))


def margins(z: np.ndarray, label: int) -> np.ndarray:
    """The label's logit less each other one."""
    return np.array([z[label] - other for k, other in enumerate(z) if k != label])


def comp_sum_of(z: np.ndarray, moved: np.ndarray, y: np.ndarray, beta: float) -> float:
    """The logistic member `log(1 + sum exp(-margin))` at rho = 1, and the change of the margins."""
    total = 0.0
    for row, other, label in zip(z, moved, y, strict=True):
        total += math.log(1 + sum(math.exp(-each) for each in margins(row, label)))
        total += beta * math.sqrt(sum((margins(other, label) - margins(row, label)) ** 2))
    return total / len(y)


def separation_of(features: np.ndarray, y: np.ndarray, temperature: float) -> float:
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(y)):
        rest = [k for k in range(len(y)) if k != i]
        positive = [k for k in rest if y[k] == y[i]]
        below = sum(math.exp(z[i] @ z[k] / temperature) for k in rest)
        logs = [-math.log(math.exp(z[i] @ z[j] / temperature) / below) for j in positive]
        total += sum(logs) / len(positive) if positive else 0.0
    return total / len(y)


def taught_of(theirs: list[np.ndarray], ours: list[np.ndarray], y: np.ndarray, temperature: float) -> float:
    """The sum over the clean and the attacked images."""
    total = 0.0
    for teacher, student in zip(theirs, ours, strict=True):
        p = softmax(teacher)
        certain = 1 + (p * np.log(p)).sum(1) / math.log(p.shape[1])
        apart = divergence(softmax(teacher / temperature), softmax(student / temperature))
        total += (certain * temperature**2 * apart + (1 - certain) * cross_entropy(student, y)).mean()
    return float(total)
