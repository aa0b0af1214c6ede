"""SM3-II, Anil et al. 2019 (arXiv:1901.11150): on a matrix, and on some entries of one."""

import numpy as np


def trajectory(w, gradients, lr=1e-2, eps=1e-30, momentum=0.0):
    w = np.array(w, dtype=np.float64)
    row, col, average, path = np.zeros((w.shape[0], 1)), np.zeros((1, w.shape[1])), np.zeros_like(w), []
    for g in np.asarray(gradients, dtype=np.float64):
        nu = np.minimum(row, col) + g**2
        row, col = nu.max(axis=1, keepdims=True), nu.max(axis=0, keepdims=True)
        average = momentum * average + (1 - momentum) * g / np.sqrt(nu + eps)
        w = w - lr * average
        path.append(w)
    return np.stack(path)


def entries_trajectory(w, gradients, index, shape, lr=1e-2, eps=1e-30):
    """(k,) entries at flat positions `index`: the weights after every step, and both accumulators at the end."""
    w = np.array(w, dtype=np.float64)
    rows, cols = np.divmod(np.asarray(index), shape[1])
    row, col, path = np.zeros(shape[0]), np.zeros(shape[1]), []
    for g in np.asarray(gradients, dtype=np.float64):
        nu = np.minimum(row[rows], col[cols]) + g**2
        np.maximum.at(row, rows, nu)
        np.maximum.at(col, cols, nu)
        w = w - lr * g / np.sqrt(nu + eps)
        path.append(w)
    return np.stack(path), row, col
