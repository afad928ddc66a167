"""The losses of DPO, ORPO and KTO from log-probabilities of answers, as trl 1.16 computes them.

Shapes: P pairs, A answers. All log-probabilities are natural logarithms, of whole answers unless a name says mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_losses(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return DPO's loss of each pair [P]: trl's loss_type ``sigmoid`` (Rafailov et al. 2023, eq. 7).

    Args:
        chosen, rejected: log-probabilities of the answers [P].
        reference: those under the reference model, chosen and rejected [P, 2].
        beta: weight of the distance from the reference.
    """
    return -logsigmoid(beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1])))


def orpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the odds-ratio term of ORPO's loss for each pair [P] (Hong et al. 2024, eq. 7).

    Args:
        chosen, rejected: mean log-probability of the answers' tokens [P].
        beta: weight of the term.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, by whichever form is accurate there (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # Each branch sees only values for which it and its gradient are finite.
    near = x > -0.6931472
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def kto_losses(
    answers: Tensor, reference: Tensor, divergence: Tensor, desirable: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return KTO's loss of each answer [A] (Ethayarajh et al. 2024, eq. 7).

    Args:
        answers: log-probabilities of the answers [A].
        reference: those under the reference model [A].
        divergence: estimate of the KL divergence from the reference, at least 0; a scalar without gradient.
        desirable: True for a good answer [A].
        beta: weight of the distance from the reference.
        weights: factors of good and of bad answers.
    """
    distance = (answers - reference) - divergence
    sign = torch.where(desirable, 1.0, -1.0)
    factor = torch.where(desirable, weights[0], weights[1])
    return factor * (1 - torch.sigmoid(beta * sign * distance))
