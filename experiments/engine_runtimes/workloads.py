"""The models of the study, as their users would write them: plain PyTorch, nothing replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MNISTCNN(nn.Sequential):
    """The CNN of Opacus's MNIST example, for [1, 28, 28]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 8, 2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, num_classes),
        )


class CIFARCNN(nn.Sequential):
    """3x3 convolutions 32-64-64-128 with average pooling, for [3, 32, 32]."""

    def __init__(self, num_classes: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)]
            channels = width
        layers += [nn.Conv2d(channels, 128, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(128, num_classes))


class Block(nn.Module):
    """A pre-norm block of a decoder, q, k and v being one linear map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv: nn.Module = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, T, width]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(gathered.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model on [T] token ids, with learned positions."""

    def __init__(
        self,
        input_shape: Sequence[int],
        vocab_size: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(input_shape[0], width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if lora_rank:
            self.requires_grad_(False)
            for block in self.blocks:
                block.qkv = LoRA(block.qkv, lora_rank)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits [B, T, vocab_size]."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.tokens(ids) + self.positions(places)
        return self.head(self.norm(self.blocks(x)))


class LoRA(nn.Module):
    """A frozen map to q, k and v, with trained factors of low rank added to q and v."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        width = frozen.in_features
        self.down_q, self.down_v = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.up_q, self.up_v = (nn.Linear(rank, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, T, 3 width]."""
        q, k, v = self.frozen(x).chunk(3, -1)
        q, v = q + self.up_q(self.down_q(x)), v + self.up_v(self.down_v(x))
        return torch.cat([q, k, v], -1)


class CharLSTM(nn.Module):
    """An embedding, one LSTM layer and a linear head on its last output."""

    def __init__(self, vocab_size: int, num_classes: int, lstm: str = "torch") -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 64)
        self.lstm = _lstm(lstm)(64, 128, batch_first=True)
        self.head = nn.Linear(128, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns scores [B, num_classes]."""
        return self.head(self.lstm(self.tokens(ids))[0][:, -1])


def _lstm(name: str) -> Any:
    if name == "torch":
        return nn.LSTM
    from opacus.layers import DPLSTM

    return DPLSTM


class Bag(nn.Module):
    """The mean of token embeddings, and a linear head."""

    def __init__(self, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns scores [B, num_classes]."""
        return self.head(self.tokens(ids).mean(1))


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean cross entropy of each sample's next tokens, [B]."""
    ids = batch[0]
    logits, targets = model(ids)[:, :-1], ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)
