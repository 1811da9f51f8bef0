"""Data sets: records as tensors, under a schema that is declared and never read off the records."""

from dpsgd.data.base import Dataset
from dpsgd.data.digits import digits
from dpsgd.data.glyphs import glyphs
from dpsgd.data.hf import huggingface
from dpsgd.data.labelled_text import labelled_text
from dpsgd.data.schema import Schema
from dpsgd.data.stories import stories
from dpsgd.data.synthetic import synthetic
from dpsgd.data.tensors import tensors
from dpsgd.data.text import text
from dpsgd.data.users import Users

__all__ = [
    "Dataset",
    "Schema",
    "Users",
    "digits",
    "glyphs",
    "huggingface",
    "labelled_text",
    "stories",
    "synthetic",
    "tensors",
    "text",
]
