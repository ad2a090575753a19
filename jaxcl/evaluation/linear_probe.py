"""Linear probe: logistic regression on frozen embeddings, fitted by L-BFGS.

When not to trust it: a probe on many dimensions fits a small training part well, however poor the
embeddings are, and wider embeddings have an advantage.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from jaxcl.evaluation.finite import check_finite
from jaxcl.typing import Float, Int

__all__ = ["STRENGTHS", "LinearProbe", "check_labels", "choose_strength", "fit_probe"]

STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""The inverse regularisation strengths that are tried on the validation part."""


class LinearProbe(NamedTuple):
    """A linear classifier on standardised features.

    Attributes:
      mean: the mean of each feature, which is subtracted.
      scale: the divisor of each centred feature.
      weights: the weights of the standardised features.
      bias: the bias of each class.
      objective: the minimum that `fit_probe` found, in nats.
    """

    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    weights: Float[np.ndarray, "d classes"]
    bias: Float[np.ndarray, " classes"]
    objective: float

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """The logits of each class, in float32, from sums in float64."""
        logits = (features.astype(np.float64) - self.mean) / self.scale @ self.weights + self.bias
        return logits.astype(np.float32)


def fit_probe(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    strength: float,
    standardise: bool = True,
    start: LinearProbe | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
) -> LinearProbe:
    r"""Minimise the cross entropy of a linear classifier, with a penalty on its weights.

    $$\frac{1}{n} \sum_i -\log \mathrm{softmax}(W^\top x_i + b)_{y_i}
    + \frac{1}{2 C n} \lVert W \rVert^2$$

    This is `LogisticRegression(C=strength)` of scikit-learn, on the same features. All sums are in
    float64.

    Args:
      features: x, one row per example.
      labels: y, in [0, num_classes).
      num_classes: number of classes.
      strength: C, the inverse strength of the regularisation.
      standardise: whether to give each feature mean 0 and variance 1. Without it, the weights of
        unit vectors, whose features are small, are penalised more strongly.
      start: a probe of the same features to start from, such as one with another strength.
      max_steps: the maximum number of L-BFGS steps.
      tolerance: stop when no entry of the gradient has a larger absolute value.

    Raises:
      ValueError: if there are no rows, a feature is not finite, or a label or option is out of
        range.
    """
    _check(features, labels, num_classes, strength)
    wide = features.astype(np.float64)
    mean, scale = np.zeros(wide.shape[1]), np.ones(wide.shape[1])
    if standardise:
        mean, scale = wide.mean(0), wide.std(0)
        scale[scale <= 1e-6 * np.abs(wide).max(0)] = 1  # constant features
    wide = (wide - mean) / scale
    own = np.arange(len(labels)), labels
    penalty = 1 / (strength * len(labels))
    shape = wide.shape[1] + 1, num_classes

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = np.split(flat.reshape(shape), [-1])
        log_shares = log_softmax(wide @ weights + bias, axis=1)
        value = -log_shares[own].mean() + penalty / 2 * np.square(weights).sum()
        errors = np.exp(log_shares)
        errors[own] -= 1
        errors /= len(labels)
        gradient = np.concatenate([wide.T @ errors + penalty * weights, errors.sum(0)[None]])
        return value, gradient.ravel()

    first = np.zeros(shape) if start is None else np.vstack([start.weights, start.bias])
    options = {"maxiter": max_steps, "gtol": tolerance, "ftol": 64 * np.finfo(np.float64).eps}
    result = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    weights, bias = np.split(result.x.reshape(shape), [-1])
    return LinearProbe(mean, scale, weights, bias[0], float(result.fun))


def choose_strength(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    validation: Float[np.ndarray, "v d"],
    validation_labels: Int[np.ndarray, " v"],
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> float:
    """The strength with the highest accuracy on a validation part; the smallest in case of ties.

    Args:
      features, labels: the training part.
      validation, validation_labels: the validation part.
      num_classes: number of classes.
      strengths: the values to try.
    """
    best, highest = 0.0, -1.0
    probe: LinearProbe | None = None
    for strength in sorted(strengths):
        probe = fit_probe(features, labels, num_classes=num_classes, strength=strength, start=probe)
        accuracy = float((probe.scores(validation).argmax(1) == validation_labels).mean())
        if accuracy > highest:
            best, highest = strength, accuracy
    return best


def check_labels(labels: Int[np.ndarray, " n"], num_classes: int) -> None:
    """Raise a `ValueError` if there are no labelled rows, or a label is out of range."""
    if not len(labels):
        raise ValueError("there are no labelled rows; give at least one")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the labels are from {labels.min()} to {labels.max()}, but there are {num_classes} "
            f"classes; give labels from 0 to {num_classes - 1}"
        )


def _check(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    strength: float,
) -> None:
    check_labels(labels, num_classes)
    if not 0 < strength < np.inf:
        raise ValueError(f"strength={strength} must be positive and finite")
    check_finite(features, "rows of features")
