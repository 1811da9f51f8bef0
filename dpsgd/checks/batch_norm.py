"""Group normalisation in the place of batch normalisation."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_MOST = 32


def replace_batch_norm(model: nn.Module) -> list[str]:
    """Replaces every batch normalisation of a model, in place, by group normalisation.

    Batch statistics mix the samples of a batch, which no per-sample gradient can undo; statistics
    within a sample do not. Scale and shift are kept as the same parameters, running statistics are
    dropped. The groups are as many as divide the channels, at most 32 and of two channels at least
    (Wu & He 2018, arXiv:1803.08494). Do it before the optimizer is built and train from there:
    the function that the model computes is another one.

    Args:
        model: The model.

    Returns:
        The paths of what was replaced.

    Raises:
        ValueError: If the model itself is a batch normalisation: there is nothing to put it into.
    """
    if isinstance(model, _BatchNorm):
        raise ValueError("Expected a model that contains batch normalisation, got one itself.")
    replaced: list[str] = []
    made: dict[_BatchNorm, nn.GroupNorm] = {}
    for path, parent in list(model.named_modules(remove_duplicate=False)):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = _group_norm(child)
                setattr(parent, name, made[child])
                replaced.append(f"{path}.{name}" if path else name)
    return replaced


def _group_norm(norm: _BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    most = min(_MOST, max(1, channels // 2))
    groups = max(n for n in range(1, most + 1) if channels % n == 0)
    group_norm = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm.train(norm.training)
