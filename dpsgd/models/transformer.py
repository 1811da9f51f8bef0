"""A Transformer encoder for classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.models.arguments import Activation, make_activation, make_dropout, num_outputs, positive
from dpsgd.models.sequence import as_sequence, token_length, vector_sequence


class Transformer(nn.Module):
    """Pre-norm blocks, the mean of their outputs over the sequence, and a linear head.

    Vaswani et al. (2017), arXiv:1706.03762, with the normalisation before each sublayer
    (Xiong et al. (2020), arXiv:2002.04745) and learned positions.

    Args:
        input_shape: Shape of one input: [T] token ids if `vocab_size` is given; else [T, d], or
            [C, H, W], which is read as a sequence of H rows.
        num_classes: Number of outputs; None is one output, for regression.
        vocab_size: Number of different tokens; None for inputs that are not token ids.
        width: Features of each position.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        dropout: Probability of dropping each output of an embedding or sublayer.

    Raises:
        ValueError: If an argument is out of range or the heads do not divide the width.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        vocab_size: int | None = None,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        activation: Activation = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positive("width", width) % positive("heads", heads):
            raise ValueError(f"Expected heads to divide width, got {heads} and {width}.")
        self.inputs: nn.Module
        if vocab_size is None:
            length, features = vector_sequence(input_shape)
            self.inputs = nn.Linear(features, width)
        else:
            length = token_length(input_shape, vocab_size)
            self.inputs = _embedding(vocab_size, width)
        self.positions = _embedding(length, width)
        self.dropout = make_dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(width, heads, activation, dropout) for _ in range(positive("depth", depth)))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of inputs [B, *input_shape]."""
        embedded = self.inputs(as_sequence(x))
        batch, length, _ = embedded.shape
        positions = torch.arange(length, device=x.device).expand(batch, length)
        hidden = self.blocks(self.dropout(embedded + self.positions(positions)))
        return self.head(self.norm(hidden).mean(1))


class Block(nn.Module):
    """Self-attention, then a perceptron; each is normalised before and has a residual around it.

    Args:
        width: Features of each position; the perceptron is four times as wide inside.
        heads: Attention heads; they divide the width.
        activation: relu, tanh, gelu, silu, elu, or the numbers of a `TemperedSigmoid`.
        dropout: Probability of dropping each output of the two sublayers.
    """

    def __init__(self, width: int, heads: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), make_activation(activation), nn.Linear(4 * width, width)
        )
        self.dropout = make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features [B, T, width] after the block, from those before it."""
        x = x + self.dropout(self.attend(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Returns what each position of [B, T, width] gathers from its sample's positions."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, width / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        gathered = F.scaled_dot_product_attention(q, k, v)
        return self.projection(gathered.transpose(1, 2).flatten(2))


def _embedding(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding
