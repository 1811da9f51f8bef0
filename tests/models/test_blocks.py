"""The repeated blocks of models."""

import pytest
import torch
from torch import nn

from dpsgd import models
from dpsgd.models.blocks import blocks_of


def paths(model):
    names = {id(module): path for path, module in model.named_modules()}
    return [names[id(block)] for block in blocks_of(model)]


def perceptron():
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))


class Two(nn.Module):
    """Two children, called what they are given as."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Block(nn.Sequential):
    pass


def stages():
    return nn.Sequential(*(nn.Sequential(perceptron(), perceptron()) for _ in range(2)))


CASES = {
    "a transformer": (
        lambda: models.Transformer((4, 3), 2, width=4, heads=2, depth=3),
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "one block": (lambda: models.Transformer((4, 3), 2, width=4, heads=2, depth=1), ["blocks.0"]),
    "a residual network": (
        lambda: models.WideResNet((1, 8, 8), 2, depth=10, width=1),
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "a convolutional network": (
        lambda: models.CNN((1, 8, 8), 2),
        ["features.0", "features.2"],
    ),
    "a perceptron": (lambda: models.MLP((5,), 2), ["hidden.0", "hidden.3"]),
    "layers in a row": (perceptron, ["0", "2"]),
    "no containers": (lambda: models.LSTM((4, 3), 2), ["lstm", "head"]),
    "one layer": (lambda: models.Linear((5,), 2), ["head"]),
    "a layer": (lambda: nn.Linear(2, 2), []),
    "without parameters": (lambda: nn.Sequential(nn.Tanh(), nn.Flatten()), []),
    "stages of blocks": (stages, ["0.0", "0.1", "1.0", "1.1"]),
    "a list of blocks": (
        lambda: Two(body=nn.ModuleList([perceptron(), perceptron()]), head=nn.Linear(2, 2)),
        ["body.0", "body.1"],
    ),
    "blocks that hold blocks": (
        lambda: nn.Sequential(*(Two(inner=nn.ModuleList([Block(perceptron()) for _ in "ab"]),
                                    out=nn.Linear(2, 2)) for _ in "ab")),
        ["0", "1"],
    ),
    "a whole model in a row with its head": (
        lambda: nn.Sequential(models.Transformer((4, 3), 2, width=4, heads=2), nn.Linear(2, 2)),
        ["0.blocks.0", "0.blocks.1"],
    ),
    "encoder and decoder": (
        lambda: Two(encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 2),
                    decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 2)),
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_blocks_of(name):
    build, expected = CASES[name]
    assert paths(build()) == expected


def test_a_block_that_is_used_twice_is_one():
    block = perceptron()
    assert len(blocks_of(Two(body=nn.ModuleList([block, block, perceptron()])))) == 2


@pytest.mark.parametrize("name", CASES)
def test_no_block_contains_another(name):
    blocks = blocks_of(CASES[name][0]())
    inside = {id(module) for block in blocks for module in list(block.modules())[1:]}
    assert not inside & {id(block) for block in blocks}


def test_looking_changes_nothing():
    model = models.Transformer((4, 3), 2, width=4, heads=2)
    before = repr([vars(module) for module in model.modules()])
    blocks_of(model)
    assert repr([vars(module) for module in model.modules()]) == before


@pytest.mark.hf
def test_hugging_face_models():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    tiny = GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    gpt2 = GPT2LMHeadModel(tiny)
    assert paths(gpt2) == [f"transformer.h.{i}" for i in range(3)]
    lora = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert paths(lora) == [f"base_model.model.transformer.h.{i}" for i in range(3)]
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertForSequenceClassification(BertConfig(**small, intermediate_size=8, vocab_size=9))
    assert paths(bert) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_they_are_modules_of_the_model():
    model = models.Transformer((4, 3), 2, width=4, heads=2)
    with torch.no_grad():
        blocks_of(model)[0].qkv.weight.zero_()
    assert not model.blocks[0].qkv.weight.any()
