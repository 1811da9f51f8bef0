"""Hugging Face architectures as they come: the ghost engine against `Loop`, 1e-10 in float64."""

import pytest
import torch
from cases import HUGGING_FACE, LIKE_LLAMA, Case, hugging_face, next_tokens, tokens
from test_agreement import ROUTES, check

from dpsgd import checks
from dpsgd.engines import Ghost

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("case", HUGGING_FACE, ids=lambda case: case.name)
def test_ghost_agrees_with_loop(case):
    check(Ghost, case, torch.float64)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", HUGGING_FACE, ids=lambda case: case.name)
def test_every_route_agrees(case, route, monkeypatch):
    kept, gram, piece = ROUTES[route]
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", kept)
    monkeypatch.setattr("dpsgd.rules.rows.GRAM_SHARE", gram)
    monkeypatch.setattr("dpsgd.rules.rows.CHUNK_BYTES", piece)
    check(Ghost, case, torch.float64)


@pytest.mark.parametrize("case", HUGGING_FACE, ids=lambda case: case.name)
def test_they_pass_preflight(case):
    model, loss, batch = case.build(torch.float64)
    checks.preflight(Ghost(model, loss), batch)


def mixtral(**options):
    config = {**LIKE_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, **options}
    return Case("mixtral", hugging_face("MixtralForCausalLM", **config), tokens, next_tokens)


def test_a_mixture_of_experts_agrees_in_float32():
    check(Ghost, mixtral(), torch.float32)


def test_experts_that_pick_tokens_by_their_values_are_refused_by_name():
    model, loss, batch = mixtral(experts_implementation="eager").build(torch.float32)
    with pytest.raises(ValueError, match=r"cannot run nonzero in 'model\.layers\.0.*engine=loop"):
        Ghost(model, loss)(batch)


def test_generate_and_saving_work_afterwards(tmp_path):
    case = HUGGING_FACE[0]
    model, loss, batch = case.build(torch.float32)
    Ghost(model, loss)(batch).norms()
    model.eval().generate(batch["input_ids"][:1], max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(tmp_path)
