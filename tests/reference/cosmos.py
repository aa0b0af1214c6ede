"""COSMOS, Liu et al. 2025 (arXiv:2502.17410), as its published code runs it, with every product in float64."""

import numpy as np


def newton_schulz(x, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    x = x / (np.linalg.norm(x) + 1e-7)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def trajectory(
    w,
    gradients,
    lr=2e-3,
    betas=(0.95, 0.95),
    eps=1e-8,
    rank=64,
    gamma=0.2,
    lr_ratio=0.2,
    weight_decay=0.0,
    nesterov=True,
    basis=None,
):
    """`basis` (n, r) is the one to start from; by default the leading eigenvectors of the first gᵀ g."""
    b1, b2 = betas
    w = np.array(w, dtype=np.float64)
    m, n = w.shape
    r = min(rank, m, n)
    big_m, v, u, s, path = np.zeros_like(w), np.zeros((m, r)), basis, np.zeros((r, r)), []
    for t, g in enumerate(np.asarray(gradients, dtype=np.float64), start=1):
        if u is None:
            u = np.linalg.svd(g.T @ g)[0][:, :r]
            s = (1 - b2) * u.T @ g.T @ g @ u
        else:
            before = u
            u, _ = np.linalg.qr(b2 * before @ s + (1 - b2) * g.T @ (g @ before))
            turn = before.T @ u
            s = b2 * turn.T @ s @ turn + (1 - b2) * (g @ u).T @ (g @ u)
        v = b2 * v + (1 - b2) * (g @ u) ** 2
        big_m = b1 * big_m + g
        mass = (1 - b1**t) / (1 - b1)
        d = (g + b1 * big_m) / (1 + b1 * mass) if nesterov else big_m / mass
        p = d @ u
        inside = (p / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)) @ u.T
        outside = newton_schulz(d - p @ u.T)
        outside = np.sqrt(m * n) * outside / (np.linalg.norm(outside) + eps)
        x = inside + gamma * outside
        w = w - lr * weight_decay * w
        w = w - lr * lr_ratio * np.sqrt(m * n) * x / (np.linalg.norm(x) + eps)
        path.append(w)
    return np.stack(path)
