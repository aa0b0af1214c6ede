"""SWAN, Ma et al. 2024 (arXiv:2412.13148): standardised rows, then the polar factor, scaled to root mean square 1."""

import numpy as np


def standardise_rows(g, center=True):
    g = np.asarray(g, dtype=np.float64)
    x = g - g.mean(axis=1, keepdims=True) if center else g.copy()
    spread = np.sqrt((x**2).mean(axis=1, keepdims=True))
    dead = spread <= 1e-6 * np.maximum(np.sqrt((g**2).mean(axis=1, keepdims=True)), spread.max())
    return np.where(dead, 0.0, x / np.where(dead, 1.0, spread))


def polar_factor(x, threshold=1e-5):
    """U Vᵀ over the singular values above `threshold` of the largest one; the others have no direction of their own."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    keep = s > threshold * s[0]
    return u[:, keep] @ vh[keep]


def direction(g, center=True):
    d = polar_factor(standardise_rows(g, center))
    norm = np.linalg.norm(d)
    return d * np.sqrt(d.size) / norm if norm > 0 else d


def trajectory(w, gradients, lr=1e-3, lr_ratio=1.0, center=True, weight_decay=0.0):
    w = np.array(w, dtype=np.float64)
    path = []
    for g in gradients:
        w = w - lr * weight_decay * w
        w = w - lr * lr_ratio * direction(g, center)
        path.append(w)
    return np.stack(path)
