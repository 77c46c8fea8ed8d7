"""Training, resuming and loading, in this process, on a network of a few thousand weights."""

import math

import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_same, steps_of, tiny, train

import cli
import pl_utils
from config import load_config
from dataset import Batch, with_facts
from diffusion_utils import from_uint8
from generation import SeedNoise, generate, make_denoiser
from model import at_precision
from pl_utils import DDPM, TRAIN
from training import ImageData
from training.datamodule import train_batches
from training.trainer import check_division, check_launcher
from weights import newest_checkpoint


class Watch(pl.Callback):
    """Notes the weights before each step and after the last."""

    def __init__(self):
        self.weights, self.ema, self.batches = [], [], []

    def note(self, module):
        self.weights.append([p.detach().clone() for p in module.unet.parameters()])
        self.ema.append([p.clone() for p in module.ema.parameters()])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.note(module)
        self.batches.append(batch.images.clone())

    def on_train_end(self, trainer, module):
        self.note(module)


# ---- a run is a function of its config


@pytest.mark.parametrize(
    "others",
    [
        (),
        ("evaluation.validate_every=2", "logging.preview_every=3", "logging.preview_images=2"),
        ("hardware.num_workers=2", "logging.save_every=1"),
        ("hardware.micro_batch_size=4",),
        ("hardware.precision=bf16-mixed",),
        ("dataset.labels=true", "dataset.image_size=[16, 8]", "hardware.micro_batch_size=4"),
        pytest.param(("hardware.compile=true",), marks=pytest.mark.slow),
    ],
)
def test_stopping_and_resuming_leaves_no_trace(tmp_path, others):
    same = [o for o in others if "every" not in o and "workers" not in o]
    straight, adam = train(tmp_path / "a", *same)
    train(tmp_path / "b", "training.max_steps=1", *same)
    for steps in (4, 6):
        last, _ = newest_checkpoint(tmp_path / "b")
        resumed, resumed_adam = train(
            tmp_path / "b", f"training.max_steps={steps}", *others, resume=last
        )
    assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))
    assert_same(adam, resumed_adam)


def test_micro_batches_are_the_same_step(tmp_path):
    whole, _ = train(tmp_path / "a", "model.dropout=0.0")
    parts, _ = train(tmp_path / "b", "model.dropout=0.0", "hardware.micro_batch_size=2")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_is_the_papers(tmp_path):
    """Adam, clipping, warm-up and EMA, written out from the same draws."""
    watch = Watch()
    ddpm, _ = train(
        tmp_path, "model.dropout=0.0", "training.gradient_clip_norm=0.5", callbacks=[watch]
    )
    net = DDPM(ddpm.config).unet.double()
    m = [torch.zeros_like(p) for p in net.parameters()]
    v = [torch.zeros_like(p) for p in net.parameters()]
    clipped = 0
    for step in range(6):
        for p, value in zip(net.parameters(), watch.weights[step], strict=True):
            p.data.copy_(value)
        t, eps, *_ = ddpm.draw(TRAIN, step, 8)
        x_0 = from_uint8(watch.batches[step]).double()
        a = ddpm.diffusion.alpha_bar(t).view(-1, 1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        loss = (net(x_t, t).double() - eps).square().mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        clipped += norm > 0.5
        rate = 1e-3 * min(step / 3, 1)  # the first update has 0
        for i, g in enumerate(gradients):
            g = g * min(1.0, 0.5 / norm)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g.square()
            m_hat, v_hat = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.999 ** (step + 1))
            expected = watch.weights[step][i] - rate * m_hat / (v_hat.sqrt() + 1e-8)
            torch.testing.assert_close(
                watch.weights[step + 1][i].double(), expected, rtol=1e-4, atol=2e-6
            )
    assert clipped
    for step in range(6):
        for before, after, weight in zip(
            watch.ema[step], watch.ema[step + 1], watch.weights[step + 1], strict=True
        ):
            torch.testing.assert_close(after, before + 0.005 * (weight - before))
    for weight, ema in zip(watch.weights[0], watch.ema[0], strict=True):
        assert torch.equal(weight, ema)  # it starts from the initial weights


def test_initial_weights_are_the_seeds():
    one, same, other = DDPM(tiny()), DDPM(tiny()), DDPM(tiny("training.seed=1"))
    assert_same(dict(one.state_dict()), dict(same.state_dict()))
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)


def test_warm_up():
    ddpm = DDPM(load_config("configs/cifar10.yml", ["model.base_channels=8"]))
    rates = [ddpm.learning_rate(step) for step in (0, 1, 2500, 5000, 800_000)]
    assert rates == pytest.approx([0, 4e-8, 1e-4, 2e-4, 2e-4])
    assert DDPM(tiny("training.warmup_steps=0")).learning_rate(0) == 1e-3


def test_flips_are_half_and_only_when_asked(tmp_path):
    seen = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            heads = module.draw(TRAIN, trainer.global_step, 64).mirrored
            x_0 = from_uint8(batch.images)
            seen.append((x_0, heads))

    def spy(ddpm):
        loss = ddpm.diffusion.training_loss
        ddpm.diffusion.training_loss = lambda model, x_0, *rest: (
            given.append(x_0),
            loss(model, x_0, *rest),
        )[1]
        return ddpm

    for flip in (True, False):
        given: list = []
        seen.clear()
        overrides = [f"dataset.random_flip={str(flip).lower()}", "training.batch_size=64"]
        train(tmp_path / str(flip), *overrides, callbacks=[See()], ddpm=spy(DDPM(tiny(*overrides))))
        flipped = 0
        for (x_0, heads), used in zip(seen, given, strict=True):
            for i in range(64):
                turned = flip and bool(heads[i])
                assert torch.equal(used[i], x_0[i].flip(-1) if turned else x_0[i])
                flipped += turned
        assert (130 < flipped < 254) if flip else flipped == 0


def test_the_network_is_told_all_labels_but_the_dropped_share(tmp_path):
    overrides = ["dataset.labels=true", "training.label_dropout=0.25", "training.batch_size=64"]
    told, wanted, dropped = [], [], 0

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            nonlocal dropped
            labelled = module.draw(TRAIN, trainer.global_step, 64).labelled
            assert batch.labels.sum(1).eq(1).all()
            wanted.append(batch.labels * labelled[:, None])
            dropped += int((~labelled).sum())

    ddpm = DDPM(with_facts(tiny(*overrides)))
    embed = ddpm.unet.embed
    ddpm.unet.embed = lambda t, labels: (told.append(labels), embed(t, labels))[1]
    train(tmp_path, *overrides, "hardware.micro_batch_size=16", callbacks=[See()], ddpm=ddpm)
    assert torch.equal(torch.cat(told), torch.cat(wanted))
    assert 60 < dropped < 132  # of 384: 96, 4 sigma


def test_draws_are_uniform_and_normal():
    ddpm = DDPM(tiny())
    t, eps, heads, labelled = ddpm.draw(TRAIN, 0, 20_000)
    assert torch.bincount(t, minlength=20).sub(1000).abs().max() < 160  # 5 sigma
    assert eps.mean().abs() < 0.005
    assert eps.std().sub(1).abs() < 0.005
    assert heads.float().mean().sub(0.5).abs() < 0.02
    assert labelled.float().mean().sub(0.9).abs() < 0.01
    other = ddpm.draw(TRAIN, 1, 20_000)
    assert not torch.equal(t, other[0])
    assert_same(list(ddpm.draw(TRAIN, 0, 20_000)), [t, eps, heads, labelled])


# ---- numbers that are none


class Poison(pl.Callback):
    """Makes the gradients of some steps infinite."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.unet.conv_out.bias._backward_hooks = None
        if trainer.global_step in self.steps:
            module.unet.conv_out.bias.register_hook(lambda g: g * math.inf)


BOTH = pytest.mark.parametrize("optimizer", ["adam", "muon"])


@BOTH
def test_a_bad_step_changes_nothing(tmp_path, optimizer):
    class Watched(Poison, Watch):
        def __init__(self, steps):
            Watch.__init__(self)
            self.steps = steps

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            Watch.on_train_batch_start(self, trainer, module, batch, batch_idx)
            Poison.on_train_batch_start(self, trainer, module, batch, batch_idx)

    watch = Watched({3})
    ddpm, state = train(tmp_path, f"training.optimizer={optimizer}", callbacks=[watch])
    for i, before in enumerate(watch.weights[3]):
        assert torch.equal(before, watch.weights[4][i])
    assert not all(torch.equal(a, b) for a, b in zip(*watch.weights[4:6], strict=True))
    moments = [s for s in state["state"].values() if "exp_avg_sq" in s]
    assert all(s["step"] == 5 for s in moments)
    for tensor in [*ddpm.parameters(), *(v for s in state["state"].values() for v in s.values())]:
        assert tensor.isfinite().all()


@BOTH
def test_without_found_inf_a_bad_step_changes_nothing_either(tmp_path, monkeypatch, optimizer):
    """MPS; on a CPU that is said to be one."""
    assert not pl_utils.skips_on_device(torch.device("mps"))
    runs = []
    for on_device in (True, False):
        monkeypatch.setattr(pl_utils, "skips_on_device", lambda _, answer=on_device: answer)
        how = f"training.optimizer={optimizer}"
        ddpm, state = train(tmp_path / str(on_device), how, callbacks=[Poison({2, 3})])
        runs.append([dict(ddpm.state_dict()), state])
        assert all(s["step"] == 4 for s in state["state"].values() if "exp_avg_sq" in s)
    assert_same(*runs)


def test_many_bad_steps_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"4 steps up to step 4"):
        train(tmp_path, "training.max_skipped_steps=3", callbacks=[Poison(set(range(9)))])


# ---- EMA, validation and sampling stand apart


def test_the_ema_never_drops_out():
    ddpm = DDPM(tiny("model.dropout=0.9"))
    with torch.no_grad():
        for p in ddpm.ema.parameters():
            p.normal_(std=0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 5])
    ddpm.train()
    assert torch.equal(ddpm.ema(x, t), ddpm.ema(x, t))
    assert not any(p.requires_grad for p in ddpm.ema.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_channels", [4, 32])
def test_images_belong_to_their_seeds(precision, base_channels):
    """Bit for bit, whatever is in the batch beside them."""
    ddpm = DDPM(tiny(f"model.base_channels={base_channels}")).eval()
    with torch.no_grad():
        for p in ddpm.ema.parameters():
            p.normal_(std=0.1)
    steps = steps_of(ddpm.diffusion)
    network = at_precision(ddpm.ema, precision)
    denoiser = make_denoiser(network, ddpm.diffusion, times=[step.t for step in steps])

    def draw(seeds, size=64):
        batches = generate(denoiser, steps, seeds, shape=(1, 8, 8), batch_size=size)
        return torch.cat([images for _, images in batches])

    together = draw([0, 1, 2, 3, 4])
    assert torch.equal(draw([3, 4]), together[3:])
    assert torch.equal(draw([2, 0, 1], size=2), together[[2, 0, 1]])
    assert len({image.numpy().tobytes() for image in together}) == 5


def test_noise_is_a_stream_per_seed():
    shape = (3, 40, 40)
    noise = SeedNoise([5, 6], shape, torch.device("cpu"))
    stream = torch.stack([noise() for _ in range(70)])  # past one refill
    alone = SeedNoise([6], shape, torch.device("cpu"))
    assert torch.equal(torch.stack([alone() for _ in range(70)])[:, 0], stream[:, 1])
    assert len({z.numpy().tobytes() for z in stream.flatten(0, 1)}) == 140
    assert stream.mean().abs() < 0.005
    assert stream.std().sub(1).abs() < 0.005


def test_validation_is_the_same_every_time(tmp_path):
    """The t and noise that the loss is given, on images that are never flipped."""
    seen = []
    overrides = [
        "evaluation.validate_every=2", "training.batch_size=100", "hardware.micro_batch_size=50",
        "dataset.random_flip=true",
    ]  # fmt: skip
    ddpm = DDPM(tiny(*overrides))
    loss = ddpm.diffusion.loss

    def spy(network, x_0, t, eps, weight=None):
        if network.func is ddpm.ema:  # validation; training asks `train_network`
            seen.append((x_0, t, eps))
        return loss(network, x_0, t, eps, weight)

    ddpm.diffusion.loss = spy
    train(tmp_path, *overrides, ddpm=ddpm)
    # validation images, then as many training images with the same t and noise
    assert [len(t) for _, t, _ in seen] == [50, 50, 50, 30] * 2 * 3
    for first, second, third in zip(seen[:8], seen[8:16], seen[16:], strict=True):
        assert_same(list(first), list(second))
        assert_same(list(first), list(third))
    for validation, training in zip(seen[:4], seen[4:8], strict=True):
        assert_same(list(validation[1:]), list(training[1:]))
    data = ImageData(ddpm.config)
    data.setup()
    images = from_uint8(data.images["validation"][list(range(180))].images)
    assert torch.equal(torch.cat([x_0 for x_0, _, _ in seen[:4]]), images)


def test_curves_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["evaluation.validate_every=3", "logging.preview_every=3"]
    train(tmp_path / "run", *overrides, "logging.logger=[tensorboard,csv]")
    (table,) = (tmp_path / "run").glob("csv/from-step-0/metrics.csv")
    columns = table.read_text().splitlines()[0].split(",")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("loss", "learning rate", "gradient norm", "images per second", "skipped steps"):
        assert scalars[f"train/{tag}"] == [2, 4, 6]
    assert scalars["val/loss"] == [3, 6]
    assert {*columns} == {*scalars, "step"}  # the same names in each
    assert sum(tag.startswith("val/loss by t/") for tag in scalars) == 4
    assert [e.value for e in events.Scalars("train/learning rate")] == pytest.approx(
        [1e-3 * min(1, step / 3) for step in (1, 3, 5)]
    )
    assert {"samples/ema", "samples/raw"} <= set(events.Tags()["images"])


# ---- hardware


def test_processes_that_nobody_asked_for(monkeypatch):
    check_launcher(4)
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    check_launcher(2)
    with pytest.raises(ValueError, match="2 processes were started"):
        check_launcher(1)


def test_division():
    check_division(64, 4, 8)
    with pytest.raises(ValueError, match=r"64 cannot be shared by 3 devices; try 63 or 66"):
        check_division(64, None, 3)
    with pytest.raises(ValueError, match=r"16 does not divide the 8 images .* 1, 2, 4, 8"):
        check_division(64, 16, 8)


class Unsendable:
    """A batch that cannot be handed over, as none can where /dev/shm is full."""

    def __len__(self):
        return 4

    def __getitem__(self, rows):
        return Batch(self)

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_batch_that_cannot_be_handed_over_ends_the_run():
    batches = train_batches(Unsendable(), tiny("hardware.num_workers=1"))
    with pytest.raises(RuntimeError) as failure:
        next(iter(batches))
    assert "/dev/shm" in cli.describe(failure.value)
    assert "try hardware.num_workers=0 (DataLoader worker" in cli.describe(failure.value)
