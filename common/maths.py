"""symlog and symexp, which squash numbers of unknown size (DreamerV3, arXiv 2301.04104v1)."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """symlog(x) = sign(x) ln(|x| + 1), always in float32 (arXiv 2301.04104v1, Eq. 2).

    The derivative is 1 / (|x| + 1), except that at x = 0 exactly autograd gives 0, not 1: sign(0)
    and the gradient of |x| at 0 are both 0. The authors' code does the same, so it stays.
    Deviation: they take ln(|x| + 1), which loses every digit of an |x| below 6e-8; log1p does not.
    """
    x32 = x.float()
    return torch.sign(x32) * torch.log1p(torch.abs(x32))


def symexp(x: Tensor) -> Tensor:
    """symexp(x) = sign(x) (exp(|x|) - 1), the inverse of symlog, in float32 (same paper, Eq. 2).

    The derivative is exp(|x|); at x = 0 exactly autograd gives 0, as in the authors' code.
    """
    x32 = x.float()
    return torch.sign(x32) * torch.expm1(torch.abs(x32))
