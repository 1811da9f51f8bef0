"""Models to start from; any other `torch.nn.Module` trains as well.

All parameters live in the standard layers that own them, every layer sees the samples in its first
dimension, and nothing mixes samples (there is no batch normalisation), so every engine runs them.
`huggingface` makes models of the transformers library.
"""

from dpsgd.models.cnn import CNN
from dpsgd.models.filters import FilterBank
from dpsgd.models.hf import huggingface
from dpsgd.models.linear import Linear
from dpsgd.models.lstm import LSTM
from dpsgd.models.mlp import MLP
from dpsgd.models.transformer import Transformer
from dpsgd.models.tutorial_cnn import TutorialCNN
from dpsgd.models.wide_resnet import WideResNet

__all__ = [
    "CNN",
    "LSTM",
    "MLP",
    "FilterBank",
    "Linear",
    "Transformer",
    "TutorialCNN",
    "WideResNet",
    "huggingface",
]
