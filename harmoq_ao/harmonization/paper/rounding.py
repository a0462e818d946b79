"""Rounding a weight for least output error instead of to the nearest level: GPTQ in closed form, AdaRound by gradients.

Both work on the grid the weight's quantizer has, ``lower + code * step`` per row with fixed bounds, and return a weight
on that grid, which the quantizer then reproduces. With a joint scale `s`, give ``W * s`` and divide the result by `s`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.quant.quantizer import quantize

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal."""

_STRETCH = (-0.1, 1.1)  # gamma and zeta of AdaRound: the rectified sigmoid reaches 0 and 1 at finite logits


# --- Hessians ---------------------------------------------------------------------------------------------------------


def token_hessian(tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """``E[(w(p) x(p)) (w(p) x(p))^T]`` over tokens: the Hessian, up to a factor, of the output error of each row.

    Args:
        tokens: `[..., K]`, the operand as the layer will see it (quantized, divided by any joint scale).
        weights: Weight `w(p)` of each token, the shape of `tokens` without its last axis; None for all ones.

    Returns:
        `[K, K]`, float64.

    Raises:
        ConfigError: The weights do not belong to the tokens.
        CalibrationError: There is no token.
    """
    rows = tokens.detach().flatten(0, -2).double()
    if rows.numel() == 0:
        raise CalibrationError("A Hessian was asked for no tokens", found=tuple(tokens.shape), expected="[..., K]")
    if weights is not None:
        if weights.shape != tokens.shape[:-1]:
            raise ConfigError(
                "The weights of a Hessian do not belong to its tokens",
                found=tuple(weights.shape),
                expected=tuple(tokens.shape[:-1]),
            )
        rows = rows * weights.detach().double().reshape(-1, 1)
    return rows.T @ rows / len(rows)


def edge_magnitude(grid: Tensor) -> Tensor:
    """How much each token differs from its neighbours: root mean square over channels of the 3x3 Laplacian.

    Args:
        grid: Tokens in their places, `[B, H, W, C]`; the border is repeated.

    Returns:
        `[B, H, W]`, not negative.

    Raises:
        ConfigError: Not a grid of tokens.
    """
    if grid.dim() != 4:
        raise ConfigError("Edges are those of a grid of tokens", found=tuple(grid.shape), expected="[B, H, W, C]")
    x = grid.detach().movedim(-1, 1)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    neighbours = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return (neighbours - 4 * x).square().mean(1).sqrt()


def edge_weights(magnitude: Tensor, strength: float = 1.0) -> Tensor:
    """Token weights ``1 + strength * magnitude / mean``, divided so that their mean square is one.

    Args:
        magnitude: What makes a token important, not negative: :func:`edge_magnitude`, or the norm of the gradient of
            the network's error with respect to the token's output. Any shape.
        strength: 0 gives all ones.

    Returns:
        The shape of `magnitude`.

    Raises:
        ConfigError: A negative strength or magnitude.
    """
    if strength < 0 or bool((magnitude < 0).any()):
        raise ConfigError(
            "Token weights grow with a magnitude",
            found=f"strength {strength}, smallest magnitude {float(magnitude.min()):g}",
            expected="neither negative",
        )
    mean = magnitude.mean()
    weights = torch.ones_like(magnitude) if float(mean) == 0.0 else 1.0 + strength * magnitude / mean
    return weights / weights.square().mean().sqrt()


def hessian_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row `d` of a weight difference `[m, K]`: `[m]`, float64."""
    d = difference.double()
    return ((d @ hessian.double()) * d).sum(1)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def gptq_round(
    weight: Tensor,
    lower: Tensor,
    step: Tensor,
    bits: int,
    hessian: Tensor,
    *,
    damping: float = DAMPING,
    by_activation: bool = True,
    sweeps: int = 0,
) -> Tensor:
    """The weight on its grid that (nearly) minimises ``(Q - W) H (Q - W)^T`` row by row.

    GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate post-training quantization for generative pre-trained
    transformers", ICLR 2023): columns are rounded one after the other, and what rounding one of them did to the output
    is taken out with the columns still to come, through the Cholesky factor of the inverse Hessian. Here the grid of
    each row is fixed beforehand, and a row that rounding to the nearest level serves better is rounded that way.

    Args:
        weight: `[m, K]`, with any joint scale.
        lower: Value of code 0 of each row, `[m]` or `[m, 1]`.
        step: Distance of levels of each row, likewise.
        bits: 2 to 8.
        hessian: `[K, K]`, symmetric and positive semi-definite, such as :func:`token_hessian`.
        damping: Share of its mean diagonal added to the diagonal, positive.
        by_activation: Round columns in descending order of the diagonal, the ones that matter most first.
        sweeps: Passes of coordinate descent afterwards: every column in turn takes its best level given the others.

    Returns:
        ``lower + code * step``, `[m, K]`, in the type of `weight`. Its error in the norm of `hessian` is for no row
        above that of rounding to the nearest level.

    Raises:
        ConfigError: Shapes or settings do not fit.
        CalibrationError: The Hessian is not finite, or not positive semi-definite.
    """
    codes = gptq_codes(weight, lower, step, bits, hessian, damping=damping, by_activation=by_activation, sweeps=sweeps)
    grid_lower, grid_step = lower.detach().reshape(-1, 1).float(), step.detach().reshape(-1, 1).float()
    return (codes.float() * grid_step + grid_lower).to(weight.dtype)


def gptq_codes(
    weight: Tensor,
    lower: Tensor,
    step: Tensor,
    bits: int,
    hessian: Tensor,
    *,
    damping: float = DAMPING,
    by_activation: bool = True,
    sweeps: int = 0,
) -> Tensor:
    """Codes of :func:`gptq_round`, uint8 `[m, K]` in ``0 .. 2**bits - 1``; same arguments and errors."""
    _check_rounding(weight, lower, step, hessian, damping, sweeps)
    grid = _Grid(lower, step, bits)
    w, h = weight.detach().double(), hessian.detach().to(weight.device).double()
    nearest = grid.nearest(w)
    rounded = _successively(w, h, grid, damping, by_activation)
    better = hessian_error(rounded - w, h) < hessian_error(nearest - w, h)
    rounded = torch.where(better[:, None], rounded, nearest)
    for _ in range(sweeps):
        rounded = _descended(w, rounded, h, grid)
    return grid.codes(rounded)


class _Grid:
    """Levels ``lower + code * step`` of each row; computes codes by the library's one rounding rule, in float32."""

    def __init__(self, lower: Tensor, step: Tensor, bits: int) -> None:
        self.bits = bits
        self.lower = lower.detach().reshape(-1, 1).float()
        self.step = step.detach().reshape(-1, 1).float()
        self.upper = self.lower + self.step * (2**bits - 1)

    def codes(self, w: Tensor) -> Tensor:
        return quantize(w.float(), self.lower, self.upper, self.bits)

    def nearest(self, w: Tensor) -> Tensor:
        """Nearest levels of `w` `[m, n]`, float64."""
        return self.codes(w).double() * self.step.double() + self.lower.double()


def _successively(w: Tensor, h: Tensor, grid: _Grid, damping: float, by_activation: bool) -> Tensor:
    """Column after column, each passing its output error on to those behind it."""
    order = h.diagonal().argsort(descending=True, stable=True) if by_activation else torch.arange(len(h))
    factor = _inverse_factor(h[order][:, order], damping)
    rest, rounded = w[:, order].clone(), torch.empty_like(w)
    for j in range(len(h)):
        column = rest[:, j : j + 1]
        level = grid.nearest(column)
        rounded[:, order[j]] = level[:, 0]
        rest[:, j + 1 :] -= (column - level) / factor[j, j] * factor[j, j + 1 :]
    return rounded


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of ``(H + damping * mean(diag H) I)^-1``."""
    mean = float(h.diagonal().mean())
    damped = h + (damping * mean if mean > 0 else 1.0) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise CalibrationError(
            "The Hessian is not positive semi-definite",
            found=f"smallest eigenvalue {float(torch.linalg.eigvalsh(h)[0]):g}, mean diagonal {mean:g}",
            expected="a second moment of activations",
            remedy="raise the damping, or collect more tokens in float64",
        )
    inverse = torch.cholesky_inverse(root)
    return torch.linalg.cholesky(inverse, upper=True)


def _descended(w: Tensor, rounded: Tensor, h: Tensor, grid: _Grid) -> Tensor:
    """One pass of coordinate descent. The error is a parabola in each column, so its nearest level is its best one."""
    rounded = rounded.clone()
    gradient = (w - rounded) @ h
    for j in range(len(h)):
        if float(h[j, j]) <= 0.0:
            continue
        old = rounded[:, j : j + 1]
        new = grid.nearest(old + gradient[:, j : j + 1] / h[j, j])
        gradient -= (new - old) * h[j]
        rounded[:, j : j + 1] = new
    return rounded


def _check_rounding(weight: Tensor, lower: Tensor, step: Tensor, hessian: Tensor, damping: float, sweeps: int) -> None:
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    if rows == 0 or hessian.shape != (columns, columns) or lower.numel() != rows or step.numel() != rows:
        raise ConfigError(
            "Weight, grid and Hessian do not belong together",
            found=f"{tuple(weight.shape)}, {tuple(lower.shape)} and {tuple(step.shape)}, {tuple(hessian.shape)}",
            expected="a weight [m, K], m lower values and steps, and a Hessian [K, K]",
        )
    if not damping > 0 or sweeps < 0:
        raise ConfigError(
            "Bad settings of GPTQ", found=f"damping {damping}, {sweeps} sweeps", expected="positive, and 0 or more"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError("The Hessian is not finite", remedy="check the activations for NaN or infinity")


# --- AdaRound ---------------------------------------------------------------------------------------------------------


class LearnedRounding(nn.Module):
    """A weight whose every entry learns whether to be rounded down or up.

    AdaRound (Nagel, Amjad, van Baalen, Louizos, Blankevoort: "Up or down? Adaptive rounding for post-training
    quantization", ICML 2020)::

        W~ = lower + step * clamp(floor((W - lower) / step) + h(V), 0, 2**bits - 1)
        h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

    It starts at the weight itself: `h` is the part behind the comma.

    Args:
        weight: Any shape.
        lower: Value of code 0, broadcastable to `weight`.
        step: Distance of levels, broadcastable to `weight`.
        bits: 2 to 8.

    Attributes:
        logits: `V`, the shape of `weight`: what is learned.
    """

    def __init__(self, weight: Tensor, lower: Tensor, step: Tensor, bits: int) -> None:
        super().__init__()
        self.qmax = 2**bits - 1
        position = (weight.detach().float() - lower.detach()) / step.detach()
        self.floor: Tensor
        self.lower: Tensor
        self.step: Tensor
        self.register_buffer("floor", position.floor())
        self.register_buffer("lower", lower.detach().clone())
        self.register_buffer("step", step.detach().clone())
        low, high = _STRETCH
        share = (position - self.floor - low) / (high - low)
        self.logits = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """``h(V)`` in [0, 1], differentiable: how far each entry is rounded up."""
        low, high = _STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        """The weight between its two levels, differentiable in the logits; clipped entries stay at their bound."""
        return self._at(self.floor + self.share())

    def hard(self) -> Tensor:
        """The weight on its grid: every entry one of its two neighbouring levels, no gradient."""
        return self._at(self.floor + (self.share().detach() >= 0.5))

    def regularizer(self, beta: float) -> Tensor:
        """Mean of ``1 - |2 h - 1|**beta``: zero where every entry has decided. A falling beta lets go, then presses.

        Args:
            beta: Exponent, above 1: large values act only close to 0 and 1, small ones everywhere.
        """
        return (1.0 - (2.0 * self.share() - 1.0).abs().pow(beta)).mean()

    def _at(self, position: Tensor) -> Tensor:
        return position.clamp(0.0, float(self.qmax)) * self.step + self.lower
