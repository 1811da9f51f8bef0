"""What models of transformers attend to: classifiers no padding, language models no future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROUNDINGS = 256  # how many of them may lie between two ways to compute the same scores


@dataclass(frozen=True)
class AttentionMask:
    """Gives a model of transformers the attention mask that follows from its token ids.

    A forward pre-hook: training, checks, evaluation and people who call the model all get the same
    scores. The first position is always attended to, so that no sample is without any.

    Attributes:
        padding: The token id that is not attended to.
        boolean: Whether the mask is [B, 1, 1, T], True where attended: the model passes such a one
            on as it is. Of masks [B, T] it looks at the values to see whether it needs them, which
            makes its control flow depend on the data.
    """

    padding: int
    boolean: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with a mask, unless there is one, or there are no token ids."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or len(args) > 1 or kwargs.get("attention_mask") is not None:
            return args, kwargs
        return args, {**kwargs, "attention_mask": self.of(ids)}

    def of(self, ids: Tensor) -> Tensor:
        """Returns the mask of token ids [B, T]."""
        first = torch.arange(ids.shape[-1], device=ids.device) == 0
        attended = (ids != self.padding) | first
        return attended[:, None, None] if self.boolean else attended.long()


def agree_on_padding(settings: Any, padding: int | None) -> None:
    """Makes the configuration of a classifier know the padding of the data, in place.

    Args:
        settings: The configuration.
        padding: The token id of the data's padding; None takes the model's own.

    Raises:
        ValueError: If nobody knows one, or the model has another one.
    """
    kind, fields = settings.model_type, settings.to_dict()
    if padding is not None and fields.get("pad_token_id") is None:
        settings.pad_token_id = padding
    known = settings.to_dict().get("pad_token_id", padding)
    if known is None and "pad_token_id" in fields:
        raise ValueError(
            f"Expected a {kind} classifier to know which token is padding, so that it finds the "
            "last one that is none. Set +model.config.pad_token_id=NUMBER."
        )
    if padding is not None and known != padding:
        raise ValueError(
            f"Expected a {kind} whose padding is that of the data, token {padding}, got {known}. "
            f"Use data of the model's own tokenizer, with data.padding={known}."
        )


def ignore_padding(model: Any) -> None:
    """Makes a new classifier of transformers attend to no padding, in place.

    A causal one sees none to its right, and finds the last token itself: it is left alone.

    Raises:
        ValueError: If the scores of a sequence change with its padding all the same.
    """
    settings = model.config
    padding = settings.to_dict().get("pad_token_id")
    if padding is None:
        return
    if not any(vars(module).get("is_causal") is True for module in model.modules()):
        boolean = settings._attn_implementation == "sdpa"
        hook = AttentionMask(padding, boolean)
        model.register_forward_pre_hook(hook, with_kwargs=True)
    _check_padding(model, padding)


def check_causal(model: Any) -> None:
    """Raises for a model whose predictions see what they predict.

    Raises:
        ValueError: If the last token has an influence on the scores before it.
    """
    kind = model.config.model_type
    ids = torch.zeros(2, 4, dtype=torch.long)
    ids[1, -1] = 1
    one, other = _scores(model, ids, f"next-token predictions with a {kind}")[:, :-1]
    if not _close(one, other, 1e-3):
        raise ValueError(
            f"Expected a causal model for head=causal_lm, got a {kind} whose predictions see the "
            "tokens that they predict: its perplexity would mean nothing. Choose a decoder, gpt2 "
            "or llama for example."
        )


def _check_padding(model: Any, padding: int) -> None:
    """Raises for a model whose scores of a sequence change with its padding."""
    kind = model.config.model_type
    short = torch.full((1, 2), 1 if padding == 0 else padding - 1)
    long = torch.cat([short, torch.full((1, 2), padding)], 1)
    one, other = (_scores(model, ids, f"a classifier of type {kind}") for ids in (short, long))
    if not _close(one, other, _ROUNDINGS * torch.finfo(one.dtype).eps):
        raise ValueError(
            f"Expected a classifier that can be kept from attending to padding, got a {kind} whose "
            "scores change with it. Choose another one, bert or roberta for example."
        )


def _scores(model: Any, ids: Tensor, wanted: str) -> Tensor:
    """The scores of a model without dropout; its mode and the random numbers stay as they were."""
    mode, state = model.training, torch.get_rng_state()
    try:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits
    except Exception as error:  # whatever the library says of a model that cannot do it
        words = " ".join(str(error).split())
        raise ValueError(f"Cannot make {wanted}: {type(error).__name__}: {words}") from error
    finally:
        model.train(mode)
        torch.set_rng_state(state)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.double(), other.double()
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance / 10 * float(one.abs().max()))
