"""FRUGAL, Zmushko et al. 2024 (arXiv:2411.07837): a rule with state in a subspace, a rule without state in the rest."""

import numpy as np


def trajectory(
    w,
    gradients,
    projection,
    index=None,
    basis=None,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    density=0.25,
    update_gap=200,
    state_full="adamw",
    state_free="sign",
    state_free_lr_scale=1.0,
):
    """`index[t]` holds the columns, rows or flat entries in force at step t; `basis[t]` the basis of "random".

    The basis of "svd" is found here, from the gradient of each period's first step.
    """
    w = np.array(w, dtype=np.float64)
    path = []
    for t, g in enumerate(np.asarray(gradients, dtype=np.float64)):
        if t % update_gap == 0:
            down, up = _maps(
                projection, w.shape, None if index is None else index[t], _basis(projection, basis, t, g, density)
            )
            state, tau = {}, 0
        tau += 1
        w = w - lr * weight_decay * w
        low = down(g)
        rest = g - up(low)
        if projection in ("svd", "random"):
            noise = 4 * np.sqrt(max(1, np.floor(density * min(w.shape)))) * np.finfo(np.float64).eps * np.abs(g).max()
            rest[np.abs(rest) < noise] = 0
        full = FULL[state_full](low, state, tau, betas, eps)
        free = {"sign": np.sign(rest), "sgd": rest, "none": np.zeros_like(rest)}[state_free]
        w = w - lr * up(full) - lr * state_free_lr_scale * free
        path.append(w)
    return np.stack(path)


def _basis(projection, given, t, g, density):
    if projection == "svd":
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        r = max(1, int(density * min(g.shape) + 1e-6))
        return vh[:r].T if g.shape[0] >= g.shape[1] else u[:, :r]
    return None if given is None else np.asarray(given[t], dtype=np.float64)


def _maps(projection, shape, index, basis):
    """(down, up): into the subspace, and back with zeros elsewhere."""
    if projection in ("svd", "random"):
        if shape[0] >= shape[1]:
            return lambda g: g @ basis, lambda low: low @ basis.T
        return lambda g: basis.T @ g, lambda low: basis @ low
    mask = np.zeros(shape, dtype=bool)
    if projection == "columns":
        mask[:, index] = True
    elif projection == "rows":
        mask[index] = True
    else:
        mask.reshape(-1)[index] = True
    return lambda g: g * mask, lambda low: low * mask


def _adamw(g, state, tau, betas, eps):
    b1, b2 = betas
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    return (state["m"] / (1 - b1**tau)) / (np.sqrt(state["v"]) / np.sqrt(1 - b2**tau) + eps)


def _lion(g, state, tau, betas, eps):
    b1, b2 = betas
    step = np.sign(b1 * state.get("m", 0) + (1 - b1) * g)
    state["m"] = b2 * state.get("m", 0) + (1 - b2) * g
    return step


def _sgdm(g, state, tau, betas, eps):
    state["m"] = betas[0] * state.get("m", 0) + g
    return state["m"]


FULL = {"adamw": _adamw, "lion": _lion, "sgdm": _sgdm}
