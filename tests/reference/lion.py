"""Lion, Chen et al. 2023 (arXiv:2302.06675)."""

import numpy as np


def trajectory(w, gradients, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
    b1, b2 = betas
    w = np.array(w, dtype=np.float64)
    m, path = np.zeros_like(w), []
    for g in np.asarray(gradients, dtype=np.float64):
        w = w - lr * weight_decay * w
        w = w - lr * np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        path.append(w)
    return np.stack(path)
