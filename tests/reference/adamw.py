"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), and the variant that sparse fine-tuning applies per entry."""

import numpy as np


def trajectory(w, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    b1, b2 = betas
    w = np.array(w, dtype=np.float64)
    m, v, path = np.zeros_like(w), np.zeros_like(w), []
    for t, g in enumerate(np.asarray(gradients, dtype=np.float64), start=1):
        w = w - lr * weight_decay * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        path.append(w)
    return np.stack(path)


def per_entry_trajectory(w, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    """Ansell et al. 2024 (arXiv:2401.16405): eps joins the root before its bias correction, and decay comes last."""
    b1, b2 = betas
    w = np.array(w, dtype=np.float64)
    m, v, path = np.zeros_like(w), np.zeros_like(w), []
    for age, g in enumerate(np.asarray(gradients, dtype=np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = w - lr * (m / (1 - b1**age)) / ((np.sqrt(v) + eps) / np.sqrt(1 - b2**age))
        w = w - lr * weight_decay * w
        path.append(w)
    return np.stack(path)
