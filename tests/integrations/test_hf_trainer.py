"""The trainer of Hugging Face: the same weights as a plain loop, and what is refused."""

import math

import pytest
import torch
from loops import NOISE, plan_of, trained_by_hand

from dpsgd import losses, noise
from dpsgd.integrations import PrivateRun

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpsgd.integrations.huggingface import PrivateTrainer, synthetic_tokens  # noqa: E402

IDS = torch.randint(20, (40, 6))
RECORDS = [{"input_ids": ids, "labels": ids} for ids in IDS]


class Counted(torch.utils.data.Dataset):
    """Records that nobody may look at."""

    def __len__(self):
        return 40

    def __getitem__(self, position):
        raise AssertionError("a record was used")


def model_of(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(**sizes, **rates, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).double()


def run_of(plan=None, loss_fn=losses.causal_lm, **options):
    plan = plan_of(num_steps=4) if plan is None else plan
    return PrivateRun(plan, loss_fn, noise=noise.Gaussian(NOISE), **options)


def arguments_of(tmp_path, **settings):
    settings = {"max_steps": 4, "max_grad_norm": 0, "learning_rate": 0.1, **settings}
    settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, **settings}
    return transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, dataloader_pin_memory=False, **settings
    )


def trainer_of(tmp_path, run=None, records=RECORDS, model=None, *, eval_dataset=None, **settings):
    return PrivateTrainer(
        model_of() if model is None else model,
        arguments_of(tmp_path, **settings),
        run_of() if run is None else run,
        records,
        eval_dataset=eval_dataset,
    )


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("max_steps=4 as in the privacy plan, got -1", {"max_steps": -1}),
        ("max_grad_norm=0, got 1.0", {"max_grad_norm": 1.0}),
        ("gradient_accumulation_steps=1, got 2", {"gradient_accumulation_steps": 2}),
        ("bf16=False, got True.*Autocast", {"bf16": True}),
        ("torch_compile=False", {"torch_compile": True}),
        ("label_smoothing_factor=0, got 0.1", {"label_smoothing_factor": 0.1}),
        ("auto_find_batch_size=False", {"auto_find_batch_size": True}),
        ("neftune_noise_alpha=None, got 5", {"neftune_noise_alpha": 5.0}),
        ("train_sampling_strategy='random'", {"train_sampling_strategy": "group_by_length"}),
        ("include_num_input_tokens_seen='no'", {"include_num_input_tokens_seen": "all"}),
        ("skip_memory_metrics=True", {"skip_memory_metrics": False}),
        ("dataloader_drop_last=False", {"dataloader_drop_last": True}),
        ("resume_from_checkpoint=None", {"resume_from_checkpoint": "here"}),
    ],
)
def test_settings_that_would_break_the_plan_are_refused(tmp_path, words, settings):
    run = run_of()
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, run, Counted(), **settings)
    assert run.steps_taken == 0


@pytest.mark.hf
@pytest.mark.parametrize("name", ["fp16", "deepspeed", "fsdp", "parallelism_config"])
def test_what_this_machine_cannot_make_is_refused_as_well(tmp_path, name):
    arguments = arguments_of(tmp_path)
    setattr(arguments, name, "something")
    with pytest.raises(ValueError, match=f"Expected {name}="):
        PrivateTrainer(model_of(), arguments, run_of(), Counted())


@pytest.mark.hf
def test_several_devices_are_refused(tmp_path):
    arguments = arguments_of(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"n_gpu=2.*parallel=ddp"):
        PrivateTrainer(model_of(), arguments, run_of(), Counted())


@pytest.mark.hf
@pytest.mark.parametrize("rows", [2, 100])
def test_it_equals_a_plain_loop(tmp_path, rows):
    model = model_of().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 4)
    batch = {"input_ids": IDS, "labels": IDS}
    plan = plan_of(num_steps=4)
    expected = trained_by_hand(plan, model, losses.causal_lm, batch, optimizer, scheduler)
    trainer = trainer_of(tmp_path, per_device_train_batch_size=rows)
    trainer.train()
    found = list(trainer.model.parameters())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.hf
def test_an_empty_draw_releases_noise_alone(tmp_path):
    plan = plan_of(num_steps=1, sample_rate=0.02, key=bytes(31) + b"\x01")
    assert not len(plan.sampler.sample(0, 40))
    run = run_of(plan)
    trainer = trainer_of(tmp_path, run, Counted(), max_steps=1)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert run.steps_taken == 1
    assert not torch.equal(before, trainer.model.lm_head.weight)


@pytest.mark.hf
def test_nothing_private_is_logged_and_epsilon_is(tmp_path):
    run = run_of()
    settings = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, run, eval_dataset=RECORDS[:6], **settings)
    output = trainer.train()
    names = {name for row in trainer.state.log_history for name in row}
    evaluated = {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    speed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert names == {"learning_rate", "epsilon", "epoch", "step"} | evaluated | speed
    assert set(output.metrics) == speed
    assert math.isnan(output.training_loss)
    assert trainer.state.total_flos == 0
    epsilons = [row["epsilon"] for row in trainer.state.log_history]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(run.plan.epsilon(), rel=1e-9)


@pytest.mark.hf
def test_the_true_number_of_records_is_not_told(tmp_path):
    trainer = trainer_of(tmp_path, run_of(plan_of(num_steps=4, size=41)))
    assert trainer.num_examples(trainer.get_train_dataloader()) == 41


@pytest.mark.hf
def test_the_budget_ends_it_and_a_second_training_raises(tmp_path):
    run = run_of()
    trainer = trainer_of(tmp_path, run)
    assert trainer.train().global_step == run.steps_taken == 4
    with pytest.raises(ValueError, match="4 of the 4 steps of its plan are spent"):
        trainer.train()


@pytest.mark.hf
def test_saving_and_evaluating_work_and_resuming_is_refused(tmp_path):
    run = run_of()
    trainer = trainer_of(tmp_path, run, eval_dataset=RECORDS[:6], save_strategy="steps")
    trainer.args.save_steps = 2
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path / "model"))
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved.state_dict(), trainer.model.state_dict(), check_dtype=False)
    again = trainer_of(tmp_path, run_of(), Counted())
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match="Expected a new run, got a checkpoint"):
            again.train(resume_from_checkpoint=checkpoint)


@pytest.mark.hf
def test_dropout_is_on_in_training(tmp_path):
    found = []

    def watched(model, batch):
        found.append(model.training if isinstance(model, torch.nn.Module) else True)
        return losses.causal_lm(model, batch)

    model = model_of(dropout=0.1)
    run = run_of(loss_fn=watched, synthetic_batch=synthetic_tokens(model))
    trainer = trainer_of(tmp_path, run, model=model.eval())
    trainer.train()
    assert all(found)
    assert trainer.model.training


@pytest.mark.hf
def test_a_model_that_mixes_the_samples_is_refused(tmp_path):
    model = model_of()
    model.transformer.ln_f = torch.nn.BatchNorm1d(6).double()
    run = run_of()
    with pytest.raises(ValueError, match="GroupNorm"):
        trainer_of(tmp_path, run, Counted(), model=model).train()
    assert run.steps_taken == 0


@pytest.mark.hf
def test_a_loss_of_ones_own_needs_a_synthetic_batch(tmp_path):
    run = run_of(loss_fn=lambda model, batch: losses.causal_lm(model, batch))
    with pytest.raises(ValueError, match="synthetic_batch"):
        trainer_of(tmp_path, run, Counted()).train()


@pytest.mark.hf
def test_a_collator_that_pads_and_a_data_set_of_the_hub_library_are_taken(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": ids[: 2 + n % 5].tolist(), "who": n} for n, ids in enumerate(IDS)]

    def padded(records):
        longest = max(len(record["input_ids"]) for record in records)
        ids = torch.zeros(len(records), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, record in enumerate(records):
            assert "who" not in record
            length = len(record["input_ids"])
            ids[row, :length] = torch.tensor(record["input_ids"])
            mask[row, :length] = 1
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})

    run = run_of()
    arguments = arguments_of(tmp_path, per_device_train_batch_size=3)
    records = datasets.Dataset.from_list(rows)
    PrivateTrainer(model_of(), arguments, run, records, data_collator=padded).train()
    assert run.steps_taken == 4
