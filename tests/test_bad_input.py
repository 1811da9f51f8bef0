"""Bad input through the real command line: one readable message, nothing written, nothing hung.

Each row is a mistake that somebody makes, and the words that must be in the message: the setting
that is wrong, and the way out.
"""

import re
import zipfile

import numpy as np
import pytest
import torch
from command_line import command
from safetensors.torch import save_file

SECRET = 0.123456789
FILE = (
    "data=tensors", "data.input_shape=[4]", "data.num_classes=3", "data.public_size=40",
    "model=linear", "trainer.num_steps=2",
)  # fmt: skip


def table(path, **changes):
    """A file of forty records, with something wrong about it; None leaves a tensor out."""
    generator = np.random.default_rng(0)
    arrays = {
        "x": generator.random((40, 4), dtype=np.float32),
        "y": generator.integers(0, 3, 40),
        "x_test": generator.random((9, 4), dtype=np.float32),
        "y_test": generator.integers(0, 3, 9),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def records(value, dtype=np.float32):
    x = np.full((40, 4), SECRET, dtype=np.float32).astype(dtype)
    x[7, 2] = value
    return x


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that are bad in one way each."""
    folder = tmp_path_factory.mktemp("bad fïles")
    table(folder / "good.npz")
    table(folder / "nan.npz", x=records(np.nan))
    table(folder / "inf.npz", x=records(np.inf))
    table(folder / "nan_test.npz", x_test=records(np.nan)[:9])
    table(folder / "labels.npz", y=np.full(40, 3))
    table(folder / "negative.npz", y=np.full(40, -1))
    table(folder / "float_labels.npz", y=np.full(40, 1.5))
    table(folder / "integers.npz", x=np.ones((40, 4), dtype=np.int64))
    table(folder / "short.npz", y=np.zeros(39, dtype=np.int64))
    table(folder / "empty.npz", x=np.zeros((0, 4), np.float32), y=np.zeros(0, np.int64))
    table(folder / "scalar.npz", x=np.float32(1), y=np.int64(0))
    table(folder / "shape.npz", x=np.zeros((40, 5), np.float32))
    table(folder / "complex.npz", x=records(1j, np.complex64))
    table(folder / "no_x.npz", x=None)
    table(folder / "half_a_test_set.npz", y_test=None)
    table(folder / "strings.npz", y=np.array(["a"] * 40))
    table(folder / "objects.npz", x=np.array([[SECRET], [1, 2]], dtype=object))
    table(folder / "users.npz", users=np.zeros(7, dtype=np.int64))
    whole = (folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.npz").write_bytes(b"")
    (folder / "text.npz").write_text("x,y\n1,2\n")
    with zipfile.ZipFile(folder / "zip.npz", "w") as archive:
        archive.writestr("x.txt", "no array")
    torch.save({"x": torch.ones(3)}, folder / "pickle.npz")
    torch.save(torch.ones(3), folder / "pickle.safetensors")
    save_file({"x": torch.ones(40, 4)}, folder / "only_x.safetensors")
    (folder / "bits.safetensors").write_bytes(b"\xff" * 100)
    (folder / "data.csv").write_text("x,y\n1,2\n")
    (folder / "folder.npz").mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "weights.safetensors").write_bytes(b"\0" * 9)
    save_file({"other": torch.ones(3)}, folder / "other.safetensors")
    (folder / "a_file").write_text("")
    (folder / "a_run").mkdir()
    (folder / "a_run" / "config.yaml").write_text("a: 1\n")
    (folder / "edited.jsonl").write_text('{"kind":"plan"}\n')
    return folder


MINE = '''
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Batch(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.norm = nn.BatchNorm1d(4)
    def forward(self, x):
        return self.layer(self.norm(x))

class Disguised(Base):
    """Statistics of the batch without a module of that name."""
    def forward(self, x):
        return self.layer((x - x.mean(0)) / (x.std(0) + 1))

class Instance(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
    def forward(self, x):
        return self.layer(self.norm(x[:, :, None].expand(-1, -1, 2))[:, :, 0])

class Functional(Base):
    def forward(self, x):
        return self.layer(F.batch_norm(x, None, None, training=True))

class Counting(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.register_buffer("seen", torch.zeros(4))
    def forward(self, x):
        with torch.no_grad():
            self.seen += x.sum(0)
        return self.layer(x)

class Frozen(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.requires_grad_(False)

class Evaluating(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.eval()

class Detached(Base):
    def forward(self, x):
        return self.layer(x).detach()

class Crashing(Base):
    def forward(self, x):
        raise RuntimeError("out of ideas")

class Wide(Base):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.layer = nn.Linear(5, 3)

class Lost(Base):
    def __init__(self, input_shape, num_classes):
        raise KeyError("lost")

def no_module(input_shape, num_classes):
    return 3

def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])

def coupled_loss(model, batch):
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses - losses.mean()

def contrastive(model, batch):
    z = model(batch[0])
    return (z @ z.T).logsumexp(1)

def nan_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * float("nan")

def loss(model, batch, which):
    losses = {"mean": mean_loss, "coupled": coupled_loss, "contrastive": contrastive,
              "nan": nan_loss}
    return losses[which](model, batch)

def stray(parameters, lr=0.1):
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=lr)

def nothing(**anything):
    return None
'''

SETTINGS = [
    ("privacy.noise_multiplier=0", "noise_multiplier > 0"),
    ("privacy.noise_multiplier=-1", "noise_multiplier > 0"),
    ("privacy.noise_multiplier=nan", "noise_multiplier"),
    ("privacy.noise_multiplier=inf", "noise_multiplier"),
    ("privacy.noise_multiplier=much", "noise_multiplier.*Float"),
    ("privacy.noise_multiplier=1001", "noise_multiplier <= 1000"),
    ("privacy.noise_multiplier=[1,2]", "noise_multiplier"),
    ("privacy.noise_multiplier=1e-9", "noise_multiplier"),
    ("privacy.target_epsilon=0", "target_epsilon > 0"),
    ("privacy.target_epsilon=-3", "target_epsilon > 0"),
    ("privacy.target_epsilon=nan", "target_epsilon"),
    ("privacy.target_epsilon=inf", "target_epsilon"),
    ("privacy.target_epsilon=1e-6", "target_epsilon|epsilon"),
    ("privacy.target_epsilon=x", "target_epsilon"),
    ("privacy.target_epsilon=null", "target_epsilon or noise_multiplier"),
    ("privacy.target_epsilon=3 privacy.noise_multiplier=1", "exclude each other"),
    ("privacy.target_delta=0", "delta"),
    ("privacy.target_delta=1", "delta"),
    ("privacy.target_delta=-1e-5", "delta"),
    ("privacy.target_delta=0.01", r"delta < 1 / public size"),
    ("privacy.target_delta=nan", "delta"),
    ("privacy.adjacency=add", "add_remove or replace_one"),
    ("privacy.adjacency=replace_one accountant=rdp", "accountant=pld"),
    ("privacy.key=abc", "64 hexadecimal"),
    ("privacy.key=00", "64 hexadecimal|privacy.key"),
    ("privacy.sigma=1", "noise_multiplier"),
    ("privacy.noise_schedule={0:0}", "schedule|factor"),
    ("privacy.noise_schedule={5:1}", "schedule|step 0"),
    ("privacy.noise_schedule=3", "schedule"),
    ("clipping.max_grad_norm=0", "max_grad_norm"),
    ("clipping.max_grad_norm=-1", "max_grad_norm"),
    ("clipping.max_grad_norm=nan", "max_grad_norm"),
    ("clipping.max_grad_norm=inf", "max_grad_norm"),
    ("clipping.max_grad_norm=one", "max_grad_norm"),
    ("clipping.max_norm=1", "max_grad_norm"),
    ("clipping=flatt", "flat"),
    ("clipping=adaptive clipping.quantile=1", "quantile"),
    ("clipping=grouped", r"no default: clipping\.patterns"),
    ("sampler.sample_rate=0", "sample_rate"),
    ("sampler.sample_rate=1.5", "sample_rate"),
    ("sampler.sample_rate=-0.1", "sample_rate"),
    ("sampler.sample_rate=nan", "sample_rate"),
    ("sampler.sample_rate=often", "sample_rate"),
    ("sampler.expected_batch_size=1438", "expected_batch_size <= public_size"),
    ("sampler.expected_batch_size=0", "expected_batch_size"),
    ("sampler.sample_rate=0.1 sampler.expected_batch_size=100", "exclude each other"),
    ("sampler=poison", "poisson"),
    ("sampler=shuffled", "replace_one"),
    ("sampler=user_poisson", "users|public_size|records_per_user"),
    ("sampler=truncated_poisson sampler.max_batch_size=0", "max_batch_size"),
    ("trainer.num_steps=0", "num_steps >= 1"),
    ("trainer.num_steps=-5", "num_steps >= 1"),
    ("trainer.num_steps=1.5", "num_steps"),
    ("trainer.num_steps=many", "num_steps"),
    ("trainer.num_steps=null", "num_steps or trainer.epochs"),
    ("trainer.epochs=0", "epochs"),
    ("trainer.epochs=nan", "epochs"),
    ("trainer.epochs=1 trainer.num_steps=1", "exclude each other"),
    ("trainer.physical_batch_size=0", "physical_batch_size >= 1"),
    ("trainer.physical_batch_size=-1", "physical_batch_size >= 1"),
    ("trainer.physical_batch_size=many", "physical_batch_size >= 1, a whole number, or auto"),
    ("trainer.physical_batch_size=2.5", "physical_batch_size >= 1, a whole number, or auto"),
    ("trainer.physical_batch_size=true", "physical_batch_size >= 1, a whole number, or auto"),
    ("trainer.activation_checkpointing=perhaps", "activation_checkpointing"),
    ("trainer.activation_checkpointing=true engine=vmap", "Use engine=ghost"),
    ("trainer.activation_checkpointing=true engine=opacus", "Use engine=ghost"),
    ("autocast=float16", "losses to be scaled. Use autocast=bfloat16"),
    ("autocast=half", "autocast=bfloat16 or null"),
    ("autocast=bfloat16 dtype=bfloat16", "dtype=float32 with autocast"),
    ("autocast=bfloat16 engine=opacus engine.mode=ghost", "exceed the clip norm"),
    ("trainer.evaluate_every=0", "evaluate_every >= 1"),
    ("trainer.steps=3", "num_steps"),
    ("checkpoint.every=0", "checkpoint.every >= 1"),
    ("checkpoint.every=-2", "checkpoint.every >= 1"),
    ("checkpoint.evry=2", "checkpoint.every"),
    ("engine=gost", "ghost"),
    ("engine=vmapp", "vmap"),
    ("engine.chunk=3", "engine"),
    ("engine.strategy=quickest", "fastest"),
    ("engine=vmap engine.chunk_size=0", "chunk_size"),
    ("engine=opacus engine.mode=magic", "mode"),
    ("model=resnet50", "wide_resnet"),
    ("model=mlp model.hidden=[0]", "hidden|positive"),
    ("model=mlp model.dropout=1", "dropout"),
    ("model._target_=dpsgd.models.MPL", "MLP"),
    ("model._target_=os.system", "os.system"),
    ("model._target_=nowhere.Model", "nowhere"),
    ("model.init_from=missing.safetensors", "missing.safetensors"),
    ("loss=l2", "mse"),
    ("loss=mse", "one output per target"),
    ("optimizer.lr=-1", "lr|learning rate"),
    ("optimizer.lr=nan", "lr|learning rate"),
    ("optimizer.lr=abc", "optimizer.lr to be float"),
    ("optimizer.momentun=0.9", "momentum"),
    ("optimizer=lion", "adam"),
    ("optimizer._target_=torch.optim.LBFGS", "LBFGS.*Use SGD or Adam"),
    ("optimizer._target_=torch.optim.SparseAdam", "SparseAdam|takes no"),
    ("optimizer._target_=torch.optim.Sdg", "SGD"),
    ("device=cuda", "cuda|CUDA"),
    ("device=gpu", "cpu, cuda"),
    ("device=cuda:x", "cuda"),
    ("dtype=float16", "bfloat16"),
    ("dtype=double", "float64"),
    ("seed=-1", "seed"),
    ("seed=1.5", "seed"),
    ("seed=4294967296", "seed"),
    ("debug=perhaps", "debug"),
    ("logger.diagnostics=perhaps", "diagnostics"),
    ("accountant=prv", "pld"),
    ("accountant.name=prv", "pld or rdp"),
    ("data=digitz", "digits"),
    ("data.public_size=0", "public_size"),
    ("data.public_size=-3", "public_size"),
    ("data.num_classes=9", "num_classes|labels"),
    ("data.std=0", "std"),
    ("data.input_shape=[1,8,9]", "input_shape"),
    ("learning_rate=0.1", "lr|There is no setting"),
    ("nonsense", "nonsense"),
    ("engine=", "engine"),
    ("privacy=3", r"settings privacy\."),
    ("resume=nowhere", "nowhere"),
    ("resume=a_run", "a_run"),
    ("resume=a_run run.dir=b", "exclude each other"),
    ("run.dir=a_run", "a run that has ended"),
    ("run.dir=a_file/run", "a_file"),
    ("run.dir=/proc/nothing", "/proc/nothing"),
    ("sweep=random_stopping", "sweep.over"),
    ("sweep=randomly", "random_stopping"),
]

DATA = [
    ("nan.npz", "finite training inputs"),
    ("inf.npz", "finite training inputs"),
    ("nan_test.npz", "finite test inputs"),
    ("labels.npz", "num_classes"),
    ("negative.npz", "labels within 0"),
    ("float_labels.npz", "labels"),
    ("short.npz", "one target per input"),
    ("empty.npz", "at least one record"),
    ("scalar.npz", "input_shape"),
    ("shape.npz", "input_shape"),
    ("complex.npz", "real values"),
    ("no_x.npz", "Add x"),
    ("half_a_test_set.npz", "leave out the test set"),
    ("strings.npz", "without objects or strings"),
    ("objects.npz", "without objects or strings"),
    ("users.npz", "one int64 per training record"),
    ("truncated.npz", "complete .npz"),
    ("nothing.npz", "complete .npz"),
    ("text.npz", "complete .npz"),
    ("zip.npz", "complete .npz|tensors x and y"),
    ("pickle.npz", "complete .npz"),
    ("pickle.safetensors", "complete .safetensors"),
    ("only_x.safetensors", "Add y"),
    ("bits.safetensors", "complete .safetensors"),
    ("data.csv", "ending in .npz"),
    ("missing.npz", "Expected a file"),
    ("folder.npz", r"tensors x and y"),
    ("'a b.npz'", "Expected a file"),
]

OWN = [
    ("model._target_=mine.Batch", "GroupNorm"),
    ("model._target_=mine.Disguised", "sample"),
    ("model._target_=mine.Functional", "sample|batch"),
    ("model._target_=mine.Instance", "GroupNorm|leave the model as it is"),
    ("model._target_=mine.Counting", "leave the model as it is"),
    ("model._target_=mine.Frozen", "trainable parameters"),
    ("model._target_=mine.Evaluating", "train mode"),
    ("model._target_=mine.Detached", "depend on the parameters|gradient"),
    ("model._target_=mine.Crashing", "out of ideas"),
    ("model._target_=mine.Wide", "run on a batch"),
    ("model._target_=mine.Lost", "lost"),
    ("model._target_=mine.no_module", "nn.Module"),
    ("loss._target_=mine.loss +loss.which=mean", "one loss per sample"),
    ("loss._target_=mine.loss +loss.which=coupled", "sample"),
    ("loss._target_=mine.loss +loss.which=contrastive", "sample"),
    ("loss._target_=mine.loss +loss.which=nan", "finite|NaN|nan"),
    ("loss._target_=mine.nothing", "loss"),
    ("optimizer._target_=mine.stray", "optimizer to own"),
    ("optimizer._target_=mine.nothing", "build optimizer"),
    ("noise._target_=mine.nothing", "Gaussian"),
    ("sampler._target_=mine.nothing", "sampler"),
    ("clipping._target_=mine.nothing", "Clipping"),
    ("data._target_=mine.nothing", "data"),
    ("engine._target_=mine.nothing", "engine"),
    ("model.init_from=weights.safetensors", "weights.safetensors"),
    ("model.init_from=other.safetensors", "other.safetensors"),
]

PROGRAMS = [
    ("dpsgd.account", "ledger=nowhere", "nowhere"),
    ("dpsgd.account", "ledger=edited.jsonl", "ledger"),
    ("dpsgd.account", "account.solve=noise", "num_steps or sample_rate"),
    ("dpsgd.audit", "audit.runs=0", "audit.runs"),
    ("dpsgd.audit", "audit.confidence=2", "confidence"),
    ("dpsgd.bench", "bench.engines=[gost]", "ghost"),
    ("dpsgd.bench", "bench.repetitions=0", "repetitions"),
]


def refused(arguments, folder, module="dpsgd.train"):
    before = sorted(folder.rglob("*"))
    done = command(*arguments, cwd=folder, module=module, check=False)
    text = done.stderr
    assert done.returncode == 2, done.stdout + text
    assert text.startswith("Error: "), text
    assert "Traceback" not in text + done.stdout
    assert len(text) < 1500, text
    assert done.seconds < 5
    for value in (str(SECRET), "1234567"):
        assert value not in text + done.stdout, "a private value is shown"
    after = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]
    return " ".join(text.split())


def check(arguments, words, folder, module="dpsgd.train"):
    text = refused(arguments, folder, module)
    assert re.search(words, text), text


@pytest.mark.parametrize(("arguments", "words"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_settings(arguments, words, files):
    check(arguments.split(" "), words, files)


@pytest.mark.parametrize(("name", "words"), DATA, ids=[row[0] for row in DATA])
def test_data(name, words, files):
    check([*FILE, f"data.path={name}"], words, files)


@pytest.mark.parametrize(("arguments", "words"), OWN, ids=[row[0] for row in OWN])
def test_a_strangers_components(arguments, words, files):
    check([*FILE, "data.path=good.npz", *arguments.split(" ")], words, files)


@pytest.mark.parametrize(
    ("module", "arguments", "words"), PROGRAMS, ids=[row[1] for row in PROGRAMS]
)
def test_other_programs(module, arguments, words, files):
    check(arguments.split(" "), words, files, module)


def test_there_are_enough_of_them():
    assert len(SETTINGS) + len(DATA) + len(OWN) + len(PROGRAMS) >= 100


def test_debug_shows_where_it_went_wrong(files):
    done = command("debug=true", "seed=-1", cwd=files, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
