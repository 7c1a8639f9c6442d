"""Compute what the method must beat: logistic regression on tables that know no cells."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CORNER_PX = (24, 40)


def histogram_features(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the features of the baseline: 6x6x6 colour histogram, channel means and deviations, float32 [222]."""
    histogram = cv2.calcHist([rgb], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel() / (rgb.shape[0] * rgb.shape[1])
    mean, std = (part.ravel() / 255 for part in cv2.meanStdDev(rgb))
    out: NDArray[np.float32] = np.concatenate([histogram, mean, std]).astype(np.float32)
    return out


def corner_features(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Cut out the bottom right corner, where a scale bar may be burned in, at half size: float32 [720]."""
    height, width = CORNER_PX
    corner = cv2.resize(rgb[-height:, -width:], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    out: NDArray[np.float32] = np.asarray(corner, np.float32).ravel() / np.float32(255)
    return out


def linear_baseline(
    train: NDArray[np.float32], y_train: NDArray[np.int64], test: NDArray[np.float32], classes: int
) -> NDArray[np.float64]:
    """Return probabilities [n, classes] of logistic regression on standardised columns; 0 for untrained classes."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, y_train)
    out = np.zeros((len(test), classes))
    out[:, model.classes_] = model.predict_proba(test)
    return out
