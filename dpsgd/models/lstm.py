"""A recurrent classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpsgd.models.arguments import make_dropout, num_outputs, positive
from dpsgd.models.sequence import as_sequence, token_length, vector_sequence


class LSTM(nn.Module):
    """`nn.LSTM`, the mean of its outputs over time, and a linear head.

    Args:
        input_shape: Shape of one input: [T] token ids if `vocab_size` is given; else [T, d], or
            [C, H, W], which is read as a sequence of H rows.
        num_classes: Number of outputs; None is one output, for regression.
        vocab_size: Number of different tokens; None for inputs that are not token ids.
        embedding_size: Width of the token embedding; unused without a vocabulary.
        hidden_size: Width of the hidden state.
        num_layers: Number of stacked layers.
        dropout: Probability of dropping each feature before the head.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        vocab_size: int | None = None,
        embedding_size: int = 64,
        hidden_size: int = 64,
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        positive("hidden_size", hidden_size)
        positive("num_layers", num_layers)
        self.embedding: nn.Embedding | None = None
        if vocab_size is None:
            _, features = vector_sequence(input_shape)
        else:
            token_length(input_shape, vocab_size)
            features = positive("embedding_size", embedding_size)
            self.embedding = nn.Embedding(vocab_size, features)
        self.lstm = nn.LSTM(features, hidden_size, num_layers, batch_first=True)
        self.dropout = make_dropout(dropout)
        self.head = nn.Linear(hidden_size, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of inputs [B, *input_shape]."""
        sequence = as_sequence(x) if self.embedding is None else self.embedding(x)
        # Made from the sequence: under vmap each sample then has its own state from the start.
        start = sequence.new_zeros(self.lstm.num_layers, len(sequence), self.lstm.hidden_size)
        outputs, _ = self.lstm(sequence, (start, start))
        return self.head(self.dropout(outputs.mean(1)))
