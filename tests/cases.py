"""The table of models that every engine must agree on, or refuse by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from dpsgd import engines

ENGINES: Mapping[str, Callable[..., engines.Engine]] = {
    "ghost": engines.Ghost,
    "hooks": engines.Hooks,
    "vmap": engines.Vmap,
    "vmap-chunked": lambda model, loss: engines.Vmap(model, loss, chunk_size=2),
    "opacus-hooks": lambda model, loss: engines.Opacus(model, loss, mode="hooks"),
    "opacus-functorch": lambda model, loss: engines.Opacus(model, loss, mode="functorch"),
    "opacus-ew": lambda model, loss: engines.Opacus(model, loss, mode="ew"),
    "opacus-ghost": lambda model, loss: engines.Opacus(model, loss, mode="ghost"),
}
"""Every way of getting per-sample gradients but `Loop`, which is the reference."""


def squares(model: Any, batch: Tensor) -> Tensor:
    """A loss that weighs every output differently, so that no gradient is zero by symmetry."""
    out = model(batch).flatten(1)
    return (out.square() * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sum(1)


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and a loss.

    `inside` is the precision that the model computes a part of itself in, whatever its parameters.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: engines.LossFn = squares
    inside: torch.dtype | None = None

    def build(self, dtype: torch.dtype, size: int = 5) -> tuple[nn.Module, engines.LossFn, Any]:
        """Returns model, loss and batch in a floating dtype, always the same values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) / 10)
            model.to(dtype)
            batch = self.batch(size)
        cast = engines.batch.map_tensors(
            lambda t: t.to(dtype) if t.is_floating_point() else t, batch
        )
        return model, self.loss, cast


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape)


def ids(length: int, vocabulary: int = 7) -> Callable[[int], Tensor]:
    return lambda size: torch.randint(0, vocabulary, (size, length))


class Twice(nn.Module):
    """One layer called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)).relu() + self.layer(x))


class Tied(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(x))))


class FunctionalReuse(nn.Module):
    """An embedding's weight used again outside the module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(self.embedding(x)), self.embedding.weight)


class Scaled(nn.Module):
    """A parameter that belongs to no standard layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


class PositionsWithoutBatch(nn.Module):
    """Position ids [T]: a layer that never sees the samples."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.positions = nn.Embedding(length, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(x.shape[1]))


class TimeMajor(nn.Module):
    """Runs its layer on [T, B, d], properly transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1)


class Residual(nn.Module):
    """In-place activations, a view changed in place and a residual added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        out = self.second(self.norm(x))
        out += x
        return out.tanh_()


class Unreached(nn.Module):
    """A parameter that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x[..., :3].square())


class Bags(nn.Module):
    """Ragged bags: one row of ids with offsets, weighted."""

    def __init__(self, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, **options)
        self.weighted = weighted

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0] % 4
        keep = torch.arange(x.shape[1]) < lengths[:, None]
        offsets = lengths.cumsum(0) - lengths
        weights = x[keep].to(self.bag.weight.dtype) / 3 + 0.1 if self.weighted else None
        return self.bag(x[keep], offsets, per_sample_weights=weights)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def dict_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A loss that averages over each sample's own unmasked positions."""
    out = model(batch["x"]).square().mean(-1)
    return (out * batch["mask"]).sum(1) / batch["mask"].sum(1)


def labelled_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def conv(kind: type[nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(*args, **options), nn.Tanh())


CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), normal(4)),
    Case(
        "labels",
        lambda: nn.Linear(4, 3),
        lambda size: (torch.randn(size, 4), torch.randint(0, 3, (size,))),
        loss=labelled_loss,
    ),
    Case("linear_2d", lambda: nn.Linear(4, 3), normal(4)),
    Case("linear_3d", lambda: nn.Linear(4, 3), normal(6, 4)),
    Case("linear_5d", lambda: nn.Linear(4, 3), normal(2, 3, 2, 4)),
    Case("linear_no_bias", lambda: nn.Linear(4, 3, bias=False), normal(4)),
    Case("conv1d", conv(nn.Conv1d, 4, 6, 3, padding=1, stride=2), normal(4, 9)),
    Case("conv2d", conv(nn.Conv2d, 3, 4, (3, 2), padding=(1, 0)), normal(3, 6, 5)),
    Case("conv2d_no_bias", conv(nn.Conv2d, 3, 4, 3, bias=False), normal(3, 5, 5)),
    Case(
        "conv2d_all_options",
        conv(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        normal(4, 7, 6),
    ),
    Case("conv2d_depthwise", conv(nn.Conv2d, 4, 8, 3, groups=4), normal(4, 5, 5)),
    Case("conv2d_same_even", conv(nn.Conv2d, 2, 3, 4, padding="same"), normal(2, 5, 6)),
    Case("conv2d_valid", conv(nn.Conv2d, 2, 3, 2, padding="valid"), normal(2, 4, 4)),
    *(
        Case(
            f"conv2d_{mode}",
            conv(nn.Conv2d, 2, 3, 3, padding=(2, 1), padding_mode=mode, stride=2),
            normal(2, 5, 6),
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    Case(
        "conv1d_same_reflect",
        conv(nn.Conv1d, 2, 3, 4, padding="same", padding_mode="reflect"),
        normal(2, 7),
    ),
    Case("conv3d", conv(nn.Conv3d, 2, 4, 2, stride=2, padding=1, groups=2), normal(2, 4, 3, 5)),
    Case(
        "transposed1d",
        conv(nn.ConvTranspose1d, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        normal(4, 5),
    ),
    Case(
        "transposed2d",
        conv(nn.ConvTranspose2d, 3, 4, (3, 2), stride=(2, 3), dilation=(2, 1), padding=(1, 0)),
        normal(3, 4, 3),
    ),
    Case(
        "transposed3d", conv(nn.ConvTranspose3d, 2, 4, 2, stride=2, bias=False), normal(2, 2, 3, 2)
    ),
    Case("embedding", lambda: nn.Embedding(7, 4), ids(6)),
    Case("embedding_padding", lambda: nn.Embedding(7, 4, padding_idx=2), ids(9)),
    Case("embedding_one_id", lambda: nn.Embedding(7, 4), lambda size: torch.arange(size) % 7),
    *(
        Case(f"bag_{mode}", lambda mode=mode: nn.EmbeddingBag(7, 4, mode=mode), ids(6))
        for mode in ("sum", "mean", "max")
    ),
    Case("bag_padding_mean", lambda: nn.EmbeddingBag(7, 4, mode="mean", padding_idx=1), ids(9)),
    Case("bag_padding_max", lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), ids(9)),
    Case("bag_offsets_mean", lambda: Bags(mode="mean"), ids(6)),
    Case("bag_offsets_max", lambda: Bags(mode="max"), ids(6)),
    Case("bag_weighted", lambda: Bags(weighted=True, mode="sum"), ids(6)),
    Case("layer_norm", lambda: nn.LayerNorm((3, 4)), normal(2, 3, 4)),
    Case("layer_norm_no_bias", lambda: nn.LayerNorm(4, bias=False), normal(4)),
    Case("rms_norm", lambda: nn.RMSNorm(4), normal(3, 4)),
    Case("group_norm", lambda: nn.GroupNorm(2, 4), normal(4, 3, 3)),
    Case("group_norm_flat", lambda: nn.GroupNorm(2, 6), normal(6)),
    Case("instance_norm1d", lambda: nn.InstanceNorm1d(4, affine=True), normal(4, 6)),
    Case("instance_norm2d", lambda: nn.InstanceNorm2d(4, affine=True), normal(4, 3, 3)),
    Case("instance_norm3d", lambda: nn.InstanceNorm3d(2, affine=True), normal(2, 2, 3, 2)),
    Case("bilinear", TwoInputs, normal(4)),
    Case("bilinear_3d", TwoInputs, normal(3, 4)),
    Case("prelu", nn.PReLU, normal(4, 3)),
    Case("prelu_channels", lambda: nn.PReLU(4), normal(4, 3)),
    Case("in_place", Residual, normal(4)),
    Case("in_place_view", Residual, normal(3, 4)),
    Case(
        "in_place_conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2)
        ),
        normal(2, 5, 5),
    ),
    Case(
        "channels_last",
        conv(nn.Conv2d, 4, 6, 3, groups=2),
        lambda size: torch.randn(size, 4, 5, 5).to(memory_format=torch.channels_last),
    ),
    Case(
        "not_contiguous",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
        lambda size: torch.randn(4, 6, size).permute(2, 1, 0)[:, ::2],
    ),
    Case("called_twice", Twice, normal(4)),
    Case("called_twice_3d", Twice, normal(3, 4)),
    Case("tied", Tied, ids(6)),
    Case(
        "frozen",
        lambda: frozen(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0.weight", "1.bias"),
        normal(4),
    ),
    Case("unreached", Unreached, normal(4)),
    Case(
        "dict_batch",
        lambda: nn.Linear(4, 3),
        lambda size: {
            "x": torch.randn(size, 6, 4),
            "mask": (torch.arange(6) <= torch.arange(size)[:, None]).float(),
        },
        loss=dict_loss,
    ),
    Case("functional_reuse", FunctionalReuse, ids(6)),
    Case("direct_parameter", Scaled, normal(4)),
    Case("positions_without_batch", lambda: PositionsWithoutBatch(6), ids(6)),
    Case("positions_as_long_as_batch", lambda: PositionsWithoutBatch(5), ids(5)),
    Case("time_major", TimeMajor, normal(3, 4)),
    Case("time_major_square", TimeMajor, normal(5, 4)),
    Case("attention", Attention, normal(3, 4)),
    Case("lstm", Recurrent, normal(3, 4)),
    Case(
        "weight_norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        normal(4),
    ),
]


def decayed(model: Any, x: Tensor) -> Tensor:
    """A loss with an auxiliary term that depends on the parameters alone."""
    return squares(model, x) + 0.1 * sum(p.square().sum() for p in model.parameters())


def several_forwards(model: Any, x: Tensor) -> Tensor:
    """A loss of two forward passes."""
    return (model(x) * model(x.flip(1))).flatten(1).sum(1) + squares(model, x)


def deep(model: Any, x: Tensor) -> Tensor:
    """A loss with a term for each layer's output."""
    total = 0.0
    for layer in model:
        x = layer(x)
        total = total + x.flatten(1).square().mean(1)
    return total


def masked_language(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A loss averaged over each sample's own unmasked tokens."""
    logits = model(batch["ids"])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return (losses * batch["mask"]).sum(1) / batch["mask"].sum(1)


def teacher_and_student(model: Any, x: Tensor) -> Tensor:
    """A loss that compares a trained part with one whose output is detached."""
    return (model[0](x) - model[1](x).detach()).square().sum(1) + model[2](x).square().sum(1)


ZOO = [
    Case("self_attention", zoo.self_attention, normal(3, 4)),
    Case("self_attention_mask", lambda: zoo.self_attention(mask=True), normal(3, 4)),
    Case(
        "self_attention_all_options",
        lambda: zoo.self_attention(add_bias_kv=True, add_zero_attn=True, bias=False),
        normal(3, 4),
    ),
    Case("cross_attention", zoo.cross_attention, normal(3, 4)),
    Case("causal_attention", zoo.causal_attention, normal(3, 4)),
    Case("encoder", zoo.encoder, normal(3, 4)),
    Case("encoder_norm_first", lambda: zoo.encoder(norm_first=True, bias=False), normal(3, 4)),
    Case("padded_encoder", zoo.padded_encoder, ids(5)),
    Case("encoder_decoder", zoo.encoder_decoder, normal(3, 4)),
    Case("rotary_attention", zoo.rotary_attention, normal(4, 8)),
    Case("relative_positions", zoo.relative_positions, normal(4, 4)),
    *(
        Case(
            f"{kind.__name__.lower()}_{name}",
            lambda kind=kind, options=options: zoo.recurrent(kind, **options),
            normal(5, 4),
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in (
            ("batch_first", {"batch_first": True}),
            ("deep_bidirectional", {"num_layers": 2, "bidirectional": True}),
            ("no_bias", {"bias": False, "batch_first": True, "bidirectional": True}),
        )
    ),
    Case(
        "lstm_projection",
        lambda: zoo.recurrent(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True),
        normal(5, 4),
    ),
    Case("rnn_relu", lambda: zoo.recurrent(nn.RNN, nonlinearity="relu"), normal(5, 4)),
    Case("lstm_learned_state", zoo.stateful_lstm, normal(5, 4)),
    *(
        Case(
            f"packed_{kind.__name__.lower()}",
            lambda kind=kind: zoo.packed(kind, bidirectional=True, num_layers=2),
            ids(4),
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ),
    *(
        Case(kind.__name__.lower(), lambda kind=kind: zoo.cells(kind), normal(3, 4))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    Case("linear_recurrence", zoo.linear_recurrence, normal(4, 4)),
    Case("state_space", zoo.state_space, normal(5, 4)),
    Case("vision_transformer", zoo.vision_transformer, normal(2, 4, 4)),
    Case("conv1d_of_gpt2", zoo.conv1d_of_gpt2, normal(3, 4)),
    Case("flattened_either_way", zoo.flattened_either_way, normal(5, 4)),
    Case("frames", zoo.frames, normal(3, 2, 4, 4)),
    Case("without_batch", zoo.without_batch, normal(2, 3, 3)),
    Case("products", zoo.products, normal(3, 4)),
    Case("elementwise", zoo.elementwise, normal(3, 4)),
    Case("slices", zoo.slices, normal(4)),
    Case("tied_transposed", zoo.tied_transposed, ids(5)),
    Case("tied_convolution", zoo.tied_convolution, normal(3, 4, 4)),
    Case("standardised", lambda: nn.Sequential(zoo.StandardisedConv(2, 3, 2)), normal(2, 4, 4)),
    Case("weight_norms", zoo.weight_normed, normal(4, 5)),
    Case("weight_normed_lstm", lambda: zoo.weight_normed(True), normal(5, 4)),
    Case("spectral_norm_eval", zoo.spectral_normed, normal(4)),
    Case("low_rank", lambda: zoo.LowRank(False), normal(3, 4)),
    Case("low_rank_merged", lambda: zoo.LowRank(True), normal(3, 4)),
    Case("hyper_network", zoo.hyper_network, normal(3, 4)),
    Case("mixture_of_experts", zoo.mixture, normal(4)),
    Case("branches", zoo.branches, normal(4)),
    Case("buffers_written", zoo.buffers_written, normal(3, 4)),
    Case("checkpointed", zoo.checkpointed, normal(3, 4)),
    Case("checkpointed_nested", lambda: zoo.checkpointed(nested=True), normal(3, 4)),
    Case("spectral_filter", zoo.spectral_filter, normal(5, 4)),
    Case("rms_norm_by_hand", zoo.rms_by_hand, normal(3, 4)),
    Case("nested_transform", zoo.nested_transform, normal(3, 4)),
    Case(
        "batch_norm_eval",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).eval(),
        normal(2, 4, 4),
    ),
    Case("decayed", lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), normal(4), loss=decayed),
    Case(
        "several_forwards",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()),
        normal(3, 4),
        loss=several_forwards,
    ),
    Case(
        "deep_supervision",
        lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.ELU(), nn.Conv1d(3, 3, 2)),
        normal(4, 6),
        loss=deep,
    ),
    Case(
        "masked_language",
        zoo.tied_transposed,
        lambda size: {
            "ids": torch.randint(7, (size, 6)),
            "labels": torch.randint(7, (size, 6)),
            "mask": (torch.arange(6) <= torch.arange(size)[:, None]).float(),
        },
        loss=masked_language,
    ),
    Case(
        "teacher_and_student",
        lambda: nn.ModuleList(nn.Linear(4, 3) for _ in range(3)),
        normal(4),
        loss=teacher_and_student,
    ),
    Case("everything", zoo.everything, ids(4)),
]
"""Models that no layer-wise engine covers: the ghost engine must be exact on all of them, every
other engine exact or refuse."""


BAG = "drops repeated ids"
CANNOT = "cannot run this model"
MASK = "boolean mask"
GRAM = "Gram matrices that cancel"
NO_RULE = "No rule for these trainable parameters"
NO_SAMPLES = "no per-sample gradient"
NOT_FIRST = "in its first dimension"
OUTSIDE = "outside the forward"
PADDING = "ignores padding_idx"
WRONG = "wrong per-sample gradients"
UNSEEN = f"{NOT_FIRST}|{NO_SAMPLES}|{WRONG}"

REFUSED: Mapping[str, Mapping[str, str]] = {
    "linear_3d": {"opacus-ghost": GRAM},
    "not_contiguous": {"opacus-ghost": GRAM},
    "dict_batch": {"opacus-ghost": GRAM},
    "linear_5d": {"opacus-ghost": WRONG},
    "conv2d_reflect": {"opacus-hooks": WRONG, "opacus-ghost": WRONG},
    "conv2d_replicate": {"opacus-hooks": WRONG, "opacus-ghost": WRONG},
    "conv2d_circular": {"opacus-hooks": WRONG, "opacus-ghost": WRONG},
    "conv1d_same_reflect": {"opacus-hooks": WRONG, "opacus-ghost": WRONG},
    "transposed1d": {"opacus-ew": CANNOT},
    "transposed2d": {"opacus-ew": CANNOT},
    "transposed3d": {"opacus-ew": CANNOT},
    "embedding_padding": {"opacus-hooks": PADDING, "opacus-ew": PADDING, "opacus-ghost": PADDING},
    "embedding_one_id": {"opacus-ew": CANNOT},
    "bag_sum": {"opacus": BAG, "opacus-functorch": CANNOT},
    "bag_mean": {"opacus": BAG, "opacus-functorch": CANNOT},
    "bag_max": {"opacus": BAG, "opacus-functorch": CANNOT},
    "bag_padding_mean": {"opacus": BAG, "opacus-functorch": CANNOT},
    "bag_padding_max": {"opacus": BAG, "opacus-functorch": CANNOT},
    "bag_offsets_mean": {"ghost": MASK, "vmap": CANNOT, "opacus": BAG, "opacus-functorch": CANNOT},
    "bag_offsets_max": {"ghost": MASK, "vmap": CANNOT, "opacus": BAG, "opacus-functorch": CANNOT},
    "bag_weighted": {"ghost": MASK, "vmap": CANNOT, "opacus": BAG, "opacus-functorch": CANNOT},
    "layer_norm_no_bias": {"opacus-hooks": CANNOT, "opacus-ghost": CANNOT},
    "rms_norm": {"opacus-ew": CANNOT},
    "bilinear": {"opacus": CANNOT},
    "bilinear_3d": {"opacus": CANNOT},
    "prelu": {"opacus-ew": CANNOT},
    "prelu_channels": {"opacus-ew": CANNOT},
    "in_place": {"opacus-hooks": CANNOT, "opacus-functorch": CANNOT, "opacus-ghost": CANNOT},
    "in_place_view": {"opacus": CANNOT},
    "in_place_conv": {"opacus-hooks": CANNOT, "opacus-functorch": CANNOT, "opacus-ghost": CANNOT},
    "channels_last": {"opacus-hooks": WRONG, "opacus-ghost": WRONG},
    "called_twice": {"opacus-ghost": CANNOT},
    "called_twice_3d": {"opacus-ghost": CANNOT},
    "tied": {"opacus-ghost": CANNOT},
    "functional_reuse": {
        "hooks": OUTSIDE,
        "opacus-hooks": WRONG,
        "opacus-functorch": WRONG,
        "opacus-ghost": WRONG,
    },
    "direct_parameter": {"hooks": NO_RULE, "opacus-ew": CANNOT},
    "positions_without_batch": {
        "hooks": UNSEEN,
        "opacus-hooks": UNSEEN,
        "opacus-functorch": UNSEEN,
        "opacus-ew": CANNOT,
        "opacus-ghost": WRONG,
    },
    "positions_as_long_as_batch": {
        "hooks": UNSEEN,
        "opacus-hooks": UNSEEN,
        "opacus-functorch": UNSEEN,
        "opacus-ew": CANNOT,
        "opacus-ghost": WRONG,
    },
    "time_major": {
        "hooks": UNSEEN,
        "opacus-hooks": UNSEEN,
        "opacus-functorch": UNSEEN,
        "opacus-ew": CANNOT,
        "opacus-ghost": WRONG,
    },
    "time_major_square": {
        "hooks": UNSEEN,
        "opacus-hooks": UNSEEN,
        "opacus-functorch": UNSEEN,
        "opacus-ew": CANNOT,
        "opacus-ghost": WRONG,
    },
    "attention": {"hooks": NO_RULE, "opacus": CANNOT},
    "lstm/float64": {
        "hooks": NO_RULE,
        "vmap": CANNOT,
        "opacus-hooks": CANNOT,
        "opacus-functorch": CANNOT,
        "opacus-ghost": CANNOT,
    },
    "lstm/float32": {"hooks": NO_RULE, "opacus": CANNOT},
    "weight_norm": {"hooks": NO_RULE, "opacus-ew": CANNOT},
}
"""What an engine cannot do, by case and engine (or its family), with the words of its error."""


def refusal(case: str, engine: str, dtype: torch.dtype) -> str | None:
    """Returns the words with which an engine must refuse a case, None if it must agree.

    PyTorch runs a float32 LSTM and a float64 one by different kernels, which vmap tells apart.
    """
    precision = str(dtype).removeprefix("torch.")
    words = REFUSED.get(case) or REFUSED.get(f"{case}/{precision}", {})
    return words.get(engine) or words.get(engine.split("-")[0])


VOCABULARY = 19
TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
NONE = {"bos_token_id": None, "eos_token_id": None}
LIKE_LLAMA = {**WIDE, **TOKENS, "num_key_value_heads": 1}
LIKE_VIT = {**WIDE, "image_size": 8, "patch_size": 4}


def tokens(size: int) -> dict[str, Tensor]:
    """Ids with a padding mask of several lengths, and labels for the sequences."""
    lengths = torch.arange(size) % 4 + 3
    return {
        "input_ids": torch.randint(2, VOCABULARY, (size, 6)),
        "attention_mask": (torch.arange(6) < lengths[:, None]).long(),
        "labels": torch.randint(2, (size,)),
    }


def images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, 8, 8), "labels": torch.randint(2, (size,))}


def next_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Causal language modelling, averaged over each sample's own tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def same_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """An encoder and a decoder that copies."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)


def classes(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def hugging_face(model: str, **config: Any) -> Callable[[], nn.Module]:
    """A tiny model with random weights; its configuration class is named like it."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        values = {k: 0.0 if "dropout" in k or "pdrop" in k else v for k, v in config.items()}
        return kind(kind.config_class(**values)).train()

    return build


def adapted(base: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """A model with adapters from peft."""

    def build() -> nn.Module:
        import peft

        return peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=3, **options))

    return build


gpt2 = hugging_face("GPT2LMHeadModel", **GPT2, **NONE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
BERT = {**WIDE, **TOKENS, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
llama = hugging_face("LlamaForCausalLM", **LIKE_LLAMA)

HUGGING_FACE = [
    Case("gpt2", gpt2, tokens, next_tokens),
    Case("bert", hugging_face("BertForSequenceClassification", **BERT), tokens, classes),
    Case("bert_tied_head", hugging_face("BertForMaskedLM", **BERT), tokens, next_tokens),
    Case(
        "roberta",
        hugging_face("RobertaForSequenceClassification", **{**BERT, "max_position_embeddings": 20}),
        tokens,
        classes,
    ),
    Case(
        "albert_shared_layers",
        hugging_face(
            "AlbertForSequenceClassification", **BERT, embedding_size=8, classifier_dropout_prob=0
        ),
        tokens,
        classes,
    ),
    Case("llama", llama, tokens, next_tokens),
    Case(
        "llama_eager",
        hugging_face("LlamaForCausalLM", **LIKE_LLAMA, attn_implementation="eager"),
        tokens,
        next_tokens,
    ),
    Case(
        "mistral",
        hugging_face("MistralForCausalLM", **LIKE_LLAMA, sliding_window=4),
        tokens,
        next_tokens,
    ),
    Case(
        "qwen2_tied",
        hugging_face("Qwen2ForCausalLM", **LIKE_LLAMA, tie_word_embeddings=True),
        tokens,
        next_tokens,
    ),
    Case("gemma", hugging_face("GemmaForCausalLM", **LIKE_LLAMA, head_dim=8), tokens, next_tokens),
    Case("gpt_neox", hugging_face("GPTNeoXForCausalLM", **WIDE, **TOKENS), tokens, next_tokens),
    Case(
        "t5",
        hugging_face("T5ForConditionalGeneration", **T5, vocab_size=VOCABULARY, dropout_rate=0),
        tokens,
        same_tokens,
    ),
    Case(
        "vit",
        hugging_face(
            "ViTForImageClassification",
            **LIKE_VIT,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        ),
        images,
        classes,
    ),
    Case(
        "convnext",
        hugging_face(
            "ConvNextForImageClassification",
            hidden_sizes=[8, 12],
            depths=[1, 1],
            num_stages=2,
            image_size=8,
            patch_size=2,
        ),
        images,
        classes,
    ),
    Case(
        "mamba",
        hugging_face(
            "MambaForCausalLM",
            hidden_size=16,
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            state_size=4,
            intermediate_size=24,
            time_step_rank=2,
        ),
        tokens,
        next_tokens,
        inside=torch.float32,
    ),
    Case(
        "lora_gpt2",
        adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
        tokens,
        next_tokens,
    ),
    Case("lora_llama", adapted(llama, target_modules=["q_proj", "v_proj"]), tokens, next_tokens),
    Case(
        "dora_llama",
        adapted(llama, target_modules=["q_proj"], use_dora=True),
        tokens,
        next_tokens,
    ),
]
"""Architectures of transformers and peft as they come, tiny and with random weights."""
