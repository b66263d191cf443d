"""From scores to probabilities that can be believed: Platt scaling, and how far off the probabilities are.

Pure functions of numpy arrays, fitted on users that the reward model was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scion_trainer.reward.figures import Bools, Floats, Judged

NUM_BINS = 10
NUM_FOLDS = 5
_MAX_STEPS = 100
_RIDGE = 1e-3  # keeps the fit finite where scores separate the votes perfectly


@dataclass(frozen=True, slots=True)
class Platt:
    """P(liked) = sigmoid(slope * score + intercept)."""

    slope: float = 1.0
    intercept: float = 0.0

    def probabilities(self, scores: Floats) -> Floats:
        return sigmoid(self.slope * scores + self.intercept)


def sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -values)).astype(np.float64)


def fit_platt(scores: Floats, liked: Bools) -> Platt:
    """Maximum likelihood with Platt's smoothed targets, by Newton's method with halved steps.

    Platt, "Probabilistic outputs for support vector machines", 1999; Lin, Lin and Weng, "A note on Platt's
    probabilistic outputs", Machine Learning, 2007. The identity when only one kind of vote is there.
    """
    num_liked = int(liked.sum())
    num_disliked = len(liked) - num_liked
    if not num_liked or not num_disliked:
        return Platt()
    targets = np.where(liked, (num_liked + 1) / (num_liked + 2), 1 / (num_disliked + 2))
    features = np.stack([scores, np.ones_like(scores)], axis=1)

    def loss(weights: Floats) -> float:
        logits = features @ weights
        return float(np.sum(np.logaddexp(0.0, logits) - targets * logits) + _RIDGE / 2 * weights @ weights)

    weights = np.array([0.0, np.log((num_liked + 1) / (num_disliked + 1))])
    for _ in range(_MAX_STEPS):
        probabilities = sigmoid(features @ weights)
        gradient = features.T @ (probabilities - targets) + _RIDGE * weights
        if np.abs(gradient).max() < 1e-8:
            break
        curvature = (features.T * (probabilities * (1 - probabilities))) @ features + _RIDGE * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
    return Platt(float(weights[0]), float(weights[1]))


def calibration_error(probabilities: Floats, liked: Bools, *, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: the mean over answers of |mean probability - share liked| of the answer's bin.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015; with bins of equal size
    (Nguyen and O'Connor, 2015, arXiv 1508.05154), because scores crowd. NaN without answers.
    """
    if not len(probabilities):
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    bins = [each for each in np.array_split(order, min(num_bins, len(order))) if len(each)]
    gaps = [len(each) * abs(float(probabilities[each].mean() - liked[each].mean())) for each in bins]
    return sum(gaps) / len(probabilities)


def cross_fitted(judged: Judged, *, seed: int) -> Floats:
    """The probability of each answer by a scaling that was fitted without that answer's user.

    An error measured on the very votes that the scaling was fitted to would look too small.
    """
    names, codes = np.unique(np.asarray(judged.users, dtype=str), return_inverse=True)
    fold_of_user = np.random.default_rng(seed).permutation(len(names)) % min(NUM_FOLDS, len(names))
    folds = fold_of_user[codes]
    probabilities = np.empty(len(judged))
    for fold in np.unique(folds):
        inside = folds == fold
        fitted = fit_platt(judged.scores[~inside], judged.liked[~inside])
        probabilities[inside] = fitted.probabilities(judged.scores[inside])
    return probabilities
