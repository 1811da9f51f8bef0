"""Views of samples: what they are, and that a sample still has one gradient and one clip."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import worlds
from cases import ENGINES

from dpsgd import engines, losses
from dpsgd.augmentation import Affine, CropFlip, uniforms
from dpsgd.data import Dataset
from dpsgd.models import CNN, WideResNet
from dpsgd.recipe import Recipe
from dpsgd.sampling import UserPoisson
from dpsgd.trainer import Trainer

ALL = {"loop": engines.Loop, **ENGINES}
ROWS = torch.tensor([4, 0, 9])


NETWORKS = {
    "cnn": lambda: CNN((1, 8, 8), 3, [4], 3),
    "wide_resnet": lambda: WideResNet((1, 8, 8), 3, depth=10, width=1, groups=4),
}


def image_batch(k, dtype=torch.float64, size=4):
    torch.manual_seed(1)
    x, y = torch.randn(size, k, 1, 8, 8, dtype=dtype), torch.arange(size) % 3
    return x, y


def mean_of_views_by_hand(model, batch):
    x, y = batch
    return [sum(losses.cross_entropy(model, (v[None], y[i, None])) for v in x[i]) / x.shape[1]
            for i in range(len(x))]  # fmt: skip


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("engine", [n for n in ALL if n != "opacus-ghost"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_engine_averages_the_views_before_the_clip(engine, network, k):
    """Per-sample gradients are those of the mean loss over views, to 1e-10 in float64."""
    torch.manual_seed(0)
    model, batch = NETWORKS[network]().double(), image_batch(k)
    grads = ALL[engine](model, losses.MeanOfViews(losses.cross_entropy))(batch)
    for i, loss in enumerate(mean_of_views_by_hand(model, batch)):
        names = dict(model.named_parameters())
        expected = torch.autograd.grad(loss.squeeze(), list(names.values()))
        for (name, found), g in zip(grads.materialize().items(), expected):
            torch.testing.assert_close(found[i], g, rtol=1e-10, atol=1e-12, msg=name)
    whole = torch.cat([g.flatten(1) for g in grads.materialize().values()], 1)
    torch.testing.assert_close(grads.norms()[:, 0], whole.norm(dim=1), rtol=1e-10, atol=0)


def test_norms_of_rows_are_refused_where_a_sample_has_several():
    engine = engines.Opacus(
        CNN((1, 8, 8), 3, [4], 3).double(), losses.MeanOfViews(losses.cross_entropy), mode="ghost"
    )
    with pytest.raises(ValueError, match="a sample has several rows"):
        engine(image_batch(2))


def test_positions_first_is_not_taken_for_views_of_a_sample():
    """[T B] rows are no [B T] rows: the check of a random combination tells them apart."""
    linear = torch.nn.Linear(5, 3).double()

    def loss(model, x):
        return model(x.transpose(0, 1).flatten(0, 1)).square().view(-1, len(x), 3).sum((0, 2))

    with pytest.raises(ValueError, match="weight"):
        engines.Hooks(linear, loss)(torch.randn(4, 6, 5).double())


def test_a_crop_is_a_window_of_the_reflected_image_mirrored_or_not():
    made, x = CropFlip(6, padding=2, flip=True), torch.rand(3, 2, 5, 7)
    random = uniforms(0, 3, ROWS, 6 * 3).view(3, 6, 3)
    views, padded = made.views(x, random), F.pad(x, [2] * 4, mode="reflect")
    for i in range(3):
        for k in range(6):
            down, right = (random[i, k, :2] * 5).long().tolist()
            window = padded[i, :, down : down + 5, right : right + 7]
            window = window.flip(-1) if random[i, k, 2] < 0.5 else window
            assert torch.equal(views[i, k], window)


def test_without_distortion_a_view_is_the_image():
    x = torch.rand(3, 1, 8, 6)
    random = uniforms(0, 3, ROWS, 2 * 4).view(3, 2, 4)
    torch.testing.assert_close(Affine(2, 0.0, 0.0, 0.0).views(x, random)[:, 1], x)
    assert torch.equal(CropFlip(2, padding=0, flip=False).views(x, random[..., :3])[:, 0], x)


@pytest.mark.parametrize("shape", [(8, 8), (8, 6)])
def test_a_turn_turns(shape):
    """By 90 degrees a square image is its own rotation; [H, W] is taken as well as [C, H, W]."""
    x = torch.rand(1, *shape)
    random = torch.tensor([[[1.0, 0.5, 0.5, 0.5]]])  # the largest angle, nothing else
    view = Affine(1, 90.0, 0.0, 0.0).views(x, random)
    assert view.shape == (1, 1, *shape)
    if shape == (8, 8):
        torch.testing.assert_close(view[0, 0], torch.rot90(x[0], 1), atol=1e-5, rtol=0)


def test_random_numbers_depend_on_seed_step_and_record_alone():
    whole = uniforms(7, 2, torch.arange(20), 5)
    assert torch.equal(uniforms(7, 2, torch.tensor([3, 11]), 5), whole[[3, 11]])
    for other in (uniforms(8, 2, torch.arange(20), 5), uniforms(7, 3, torch.arange(20), 5)):
        assert not torch.isin(whole, other).any()


def test_random_numbers_are_uniform_and_independent():
    """Moments within six standard deviations, over records, numbers and steps."""
    n = 20000
    drawn = torch.stack([uniforms(0, step, torch.arange(n), 3) for step in range(3)])
    flat = drawn.permute(1, 0, 2).reshape(n, -1).double()
    assert (flat.mean(0) - 0.5).abs().max() < 6 / math.sqrt(12 * n)
    correlation = flat.T.corrcoef() - torch.eye(9).double()
    assert correlation.abs().max() < 6 / math.sqrt(n)
    assert flat.min() >= 0
    assert flat.max() < 1
    counts = (flat * 16).long().flatten().bincount(minlength=16).double()
    assert ((counts - 9 * n / 16) ** 2 / (9 * n / 16)).sum() < 60  # chi-squared of 15


class Pairs(torch.nn.Module):
    """Sees the first of all pairs, and then the second ones; its head starts at zero."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, x):
        one, other = self.body(torch.cat([x[:, 0], x[:, 1]])).tanh().chunk(2)
        return self.head(one * other + one)


@pytest.mark.parametrize("name", ["hooks", "opacus-hooks", "opacus-functorch"])
def test_a_layer_that_starts_at_zero_hides_no_wrong_order(name):
    """No gradient reaches the body at first: rows given to the wrong sample would look right."""
    torch.manual_seed(0)
    model, batch = Pairs(), (torch.randn(6, 2, 5), torch.arange(6) % 3)
    before = {n: (p.clone(), p._version) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="wrong per-sample gradients for 'body"):
        ALL[name](model, losses.cross_entropy)(batch)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p._version == before[n][1]


def with_views(physical, engine=engines.Ghost, users=None, seed=0, sampler=None):
    """A trainer over images with three views each, and its noise."""
    plain, noise = worlds.trainer(worlds.images, engines.Loop, torch.float64, rate=0.6, steps=3)
    plan, (x, y) = plain.plan, plain.data.train
    data = Dataset(
        (x.double(), y), None, public_size=len(x), input_shape=(1, 6, 6), num_classes=4, users=users
    )
    loss = losses.MeanOfViews(losses.cross_entropy)
    if sampler is not None:
        plan, loss = dataclasses.replace(plan, sampler=sampler), losses.PerUser(loss)
    model = plain.step.engine.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = plan.private_step(engine(model, loss), optimizer, noise)
    recipe = Recipe(augmentation=CropFlip(3, padding=1, flip=True))
    made = Trainer(step, data, plan, physical_batch_size=physical, seed=seed, recipe=recipe)
    return made, noise


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap, engines.Loop])
def test_the_result_depends_on_neither_engine_nor_physical_batch(engine):
    found = []
    for physical, kind in ((5, engine), (2, engines.Loop)):
        trainer, _ = with_views(physical, kind)
        list(trainer.run())
        found.append([p.detach() for p in trainer.step.engine.model.parameters()])
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_other_seeds_see_other_views():
    first, second = (next(with_views(5, seed=s)[0].run()).private["train_loss"] for s in (0, 1))
    assert first != second


def test_users_have_views_too():
    users = torch.arange(worlds.SIZE) // 2
    sampler = UserPoisson(sample_rate=0.6, public_size=6, records_per_user=2, key=worlds.KEY)
    found = []
    for physical, engine in ((4, engines.Ghost), (3, engines.Loop)):
        trainer, _ = with_views(physical, engine, users, sampler=sampler)
        trainer.warm_up()
        list(trainer.run())
        found.append([p.detach() for p in trainer.step.engine.model.parameters()])
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_record_with_views_moves_a_sum_by_the_clip_norm_at_most():
    """T1: the others' views stay what they are when a record is added."""
    sums = []
    for extra in (0, 1):
        trainer, noise = with_views(5)
        x, y = trainer.data.train
        more = torch.full((extra, 1, 6, 6), 50.0).double()
        object.__setattr__(trainer.data, "train", (torch.cat([x, more]), torch.cat([y, y[:extra]])))
        list(trainer.run(until=1))
        sums.append(noise.released[0])
    assert worlds.moved(*sums) <= 1 + 1e-9


def test_loss_and_augmentation_belong_together():
    trainer, _ = worlds.trainer(worlds.images, engines.Ghost, torch.float32)
    with pytest.raises(ValueError, match="MeanOfViews"):
        Trainer(trainer.step, trainer.data, trainer.plan, physical_batch_size=5,
                recipe=Recipe(augmentation=CropFlip(2, 1, False)))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CropFlip(0, 1, True), "multiplicity"),
        (lambda: CropFlip(2, -1, True), "padding"),
        (lambda: Affine(2, 200.0, 0.0, 0.0), "degrees"),
        (lambda: Affine(2, 0.0, 0.7, 0.0), "scale"),
        (lambda: Affine(2, 0.0, 0.0, float("inf")), "shift"),
        (lambda: CropFlip(2, 1, True)((torch.rand(3, 5),), 0, 0, ROWS), "images"),
        (lambda: CropFlip(2, 1, True)((torch.ones(3, 4, 4).long(),), 0, 0, ROWS), "int64"),
        (lambda: CropFlip(2, 4, True)((torch.rand(3, 4, 4),), 0, 0, ROWS), "padding=4"),
        (lambda: Recipe(augmentation="crop"), "Augmentation"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("made", [CropFlip(2, 1, True), Affine(2, 10.0, 0.1, 0.5)], ids=str)
def test_views_keep_the_precision_of_the_inputs(made, dtype):
    (views,) = made((torch.rand(3, 1, 6, 6).to(dtype),), 0, 0, ROWS)
    assert views.shape == (3, 2, 1, 6, 6)
    assert views.dtype == dtype
