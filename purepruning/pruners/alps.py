"""ALPS: the best weights of a sparsity by ADMM, which moves the support as it goes."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace
from purepruning.config.config import Config
from purepruning.linear_algebra import matmul, repeat
from purepruning.pruners.reconstruction import Pattern, reconstruct
from purepruning.stats.inputs import InputStats
from purepruning.types import Masks, Params

#: Rounds at most, the iterations between changes of the penalty, and steps of conjugate gradients.
ROUNDS, EVERY, STEPS = 100, 3, 10


def alps(
    params: Params, stats: InputStats, config: Config, *, damping: Any = 0.01
) -> tuple[Params, Masks]:
    r"""Returns parameters and masks by which the outputs of every layer change little.

    With $H$ scaled to a diagonal of ones, and weights to match, ADMM divides the problem into one
    without zeros and one without data:

    $$B \leftarrow (H + \rho I)^{-1} (H W - V + \rho D), \qquad
      D \leftarrow \Pi_k (B + V / \rho), \qquad V \leftarrow V + \rho (B - D),$$

    where $\Pi_k$ keeps the largest (of N:M in every group; of blocks by their sums of squares).
    Every 3 iterations the penalty $\rho$, 0.1 at first, grows by 1.3, 1.2 or 1.1 where the support
    has changed by more than a tenth, more than a two-hundredth, or at all; where it has not, or
    after 300 iterations, it stays. The weights on it are then improved by 10 steps of conjugate
    gradients. The eigenvalues of $H$ are found once, and serve every $\rho$.

    Meng et al. 2024, arXiv:2406.07831 (without its restarts from a lower penalty).

    Args:
        params, stats, config: see :func:`purepruning.pruners.reconstruction.reconstruct`, for
            errors too.
        damping: how much of the mean of its diagonal is added to that of $H$.
    """
    return reconstruct("alps", _solve, params, stats, config, damping)


def _solve(w: Any, h: Any, counts: Any, pattern: Pattern) -> tuple[Any, Any]:
    """Returns weights and what stays of them, ``(members, columns, out)``."""
    xp = namespace(w)
    scale = xp.sqrt(xp.linalg.diagonal(h))
    h = h / (scale[:, :, None] * scale[:, None, :])
    w = w * scale[..., None]
    values, vectors = xp.linalg.eigh(h)
    target = matmul(xp, h, w)

    def project(x: Any) -> Any:
        return pattern.keep(x * x, counts)

    def rounds(i: Any, state: Any) -> Any:
        d, v, rho, before, _ = state
        for _ in range(EVERY):
            turned = matmul(xp, xp.matrix_transpose(vectors), target - v + rho * d)
            b = matmul(xp, vectors, turned / (values[..., None] + rho))
            keep = project(b + v / rho)
            d = xp.where(keep, b + v / rho, 0.0)
            v = v + rho * (b - d)
        changed = xp.mean(xp.astype(keep != before, xp.float32))
        factor = xp.where(changed > 0.1, 1.3, xp.where(changed > 0.005, 1.2, 1.1))
        return d, v, rho * xp.astype(factor, xp.float32), keep, changed == 0

    keep = project(w)
    rho = xp.zeros_like(w[:1, :1, :1]) + 0.1
    state = (xp.where(keep, w, 0.0), w * 0, rho, keep, keep[0, 0, 0] & False)
    d, _, _, keep, _ = repeat(w, ROUNDS, rounds, state, done=lambda state: state[-1])
    new = _improved(h, target, xp.where(keep, d, 0.0), keep)
    return new / scale[..., None], keep


def _improved(h: Any, target: Any, d: Any, keep: Any) -> Any:
    """Returns weights closer to least squares on their support, all outputs at once."""
    xp = namespace(d)

    def step(i: Any, state: Any) -> Any:
        d, rest, direction, norm = state
        through = xp.where(keep, matmul(xp, h, direction), 0.0)
        down = xp.sum(direction * through, axis=1, keepdims=True)
        length = norm / xp.where(down > 0, down, 1.0)
        d, rest = d + length * direction, rest - length * through
        new = xp.sum(rest * rest, axis=1, keepdims=True)
        direction = rest + new / xp.where(norm > 0, norm, 1.0) * direction
        return d, rest, direction, new

    rest = xp.where(keep, target - matmul(xp, h, d), 0.0)
    norm = xp.sum(rest * rest, axis=1, keepdims=True)
    return repeat(d, STEPS, step, (d, rest, rest, norm))[0]
