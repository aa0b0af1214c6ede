"""Running averages of gradients and the direction made of them."""

from torch import Tensor


def factor(value: float | Tensor, x: Tensor) -> float | Tensor:
    """`value` as it multiplies x: several, one for each matrix of a batch, in x's dtype; one counts as a number."""
    return value.to(x.dtype) if isinstance(value, Tensor) and value.ndim else value


def adam_direction(
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """(...) -> (...): Adam's direction; changes both averages in place.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    `step` is t, counted from 1. Kingma and Ba 2015, arXiv:1412.6980.
    """
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().div_(factor((1 - betas[1] ** step) ** 0.5, g)).add_(eps)
    return denominator.reciprocal_().mul_(exp_avg).div_(factor(1 - betas[0] ** step, g))
