"""Labels and images that are not square, in and out; what is older than they are."""

import json
import re

import pytest
import torch
from helpers import PROJECT, invoke, steps_of, wake
from hub import HUB_TINY, diffusers, same_eps, save_hub, their_net
from safetensors import safe_open

from config import load_config
from generation import Guidance, make_denoiser, reverse
from model import build_network
from weights import Model, ModelFiles, copy_tensors, load_model, read_checkpoint, starting_weights
from weights import write_checkpoint as write
from weights.card import model_card
from weights.export import export_model, import_model, write_diffusers

CLASSES = ["dataset.labels=true", "dataset.classes=[cat, dog, frog]"]
WIDE = [*CLASSES, "dataset.image_size=[16,24]", "model.attention_resolutions=[8]"]


def model_of(*overrides, seed=0):
    config = load_config("configs/smoke.yml", overrides)
    network = wake(build_network(config), seed).eval().requires_grad_(False)
    return Model(network, config, weights="ema", step=3, notes=[])


def files_of(model):
    state = model.network.state_dict()
    return ModelFiles(PROJECT / "here", model.config, state, state, 3, [], None)


@pytest.fixture
def wide(tmp_path):
    """A checkpoint of a labelled model of wide images."""
    model = model_of(*WIDE)
    state = torch.nn.ModuleDict({"unet": model.network, "ema": model.network}).state_dict()
    tree = model.config.model_dump(mode="json")
    path = tmp_path / "wide.ckpt"
    write({"hyper_parameters": tree, "state_dict": state, "global_step": 3}, path)
    return path


@pytest.mark.parametrize(
    ("size", "rows"), [(8, 4), ([96, 64], None), ([8, 16], 1), ([96, 64], 3), ([8, 8], None)]
)
def test_their_labels_and_shapes_become_ours_and_go_back(size, rows, tmp_path):
    """eps of each label to 1e-5, and every tensor, bit for bit, under its name."""
    config = HUB_TINY | {"sample_size": size, "num_class_embeds": rows}
    theirs = their_net(config)
    ours = load_model(save_hub(tmp_path / "hub", config, theirs.state_dict()))
    assert ours.config.dataset.size == (tuple(size) if isinstance(size, list) else (size, size))
    assert ours.config.dataset.classes == [str(i) for i in range(rows or 0)]
    assert ours.config.model.attention_resolutions == [min(ours.config.dataset.size) // 2]
    assert any("each a class" in note for note in ours.notes) == bool(rows)
    for label in range(rows) if rows else [None]:
        same_eps(ours, theirs, [0, 500], label, label)
    write_diffusers(ours, tmp_path / "back", "mit")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "back/unet")
    assert back.config.num_class_embeds == rows
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    again = load_model(tmp_path / "back")
    assert again.config == ours.config and not again.notes


@pytest.mark.parametrize("names", [[], ["dataset.classes=[cat, dog, frog]"]])
def test_the_last_of_their_labels_can_be_none(names, tmp_path):
    config = HUB_TINY | {"num_class_embeds": 4}
    theirs = their_net(config)
    folder = save_hub(tmp_path / "hub", config, theirs.state_dict())
    told = import_model(folder, tmp_path / "o.ckpt", ["training.label_dropout=0.1", *names])
    assert ("the last of them no label" in told) == (not names)
    ours = load_model(tmp_path / "o.ckpt")
    assert ours.config.dataset.classes == (["cat", "dog", "frog"] if names else ["0", "1", "2"])
    for label, row in ((None, 3), (0, 0), (2, 2)):
        same_eps(ours, theirs, [0, 500], label, row)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_our_labels_become_theirs(dropout, tmp_path):
    ours = model_of(*WIDE, f"training.label_dropout={dropout}")
    write_diffusers(ours, tmp_path / "out", "mit")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out/unet").eval()
    assert theirs.config.num_class_embeds == 3 + (dropout > 0)
    for label in range(3):
        same_eps(ours, theirs, [0, 19], label, label)
    if dropout:
        same_eps(ours, theirs, [0, 19], None, 3)
    card = (tmp_path / "out/README.md").read_text()
    assert "classes: [cat, dog, frog]" in card and "class-conditional-image-generation" in card
    assert ("3 is no label" in card) == ("no label for none" not in card) == (dropout > 0)
    assert "unconditional-image" not in card
    assert "tags: [ddpm, diffusers, unconditional-image" in model_card(model_of(), "mit")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_snippet_of_the_card_draws_our_image(dropout, tmp_path):
    ours = model_of(*WIDE, f"training.label_dropout={dropout}")
    ours.network.conv_out.weight *= 0.3  # so that not every pixel ends clipped
    write_diffusers(ours, tmp_path / "out", "mit")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S)
    there: dict = {}
    torch.manual_seed(1)
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")), there)
    torch.manual_seed(1)
    x_T, label = torch.randn(1, *ours.shape), torch.tensor([1.0, 0, 0])
    guidance = Guidance(2.0 if dropout else 1.0)
    denoiser = make_denoiser(ours.network, ours.diffusion, label=label, guidance=guidance)
    steps = steps_of(ours.diffusion, "ddim", n=20)
    *_, (_, x, _) = reverse(denoiser, x_T, steps, lambda _: torch.zeros_like(x_T))
    image = (x / 2 + 0.5).clamp(0, 1)
    assert image.std() > 0.1
    torch.testing.assert_close(there["image"], image, rtol=0, atol=1e-3)


@pytest.mark.parametrize("format", ["diffusers", "safetensors"])
def test_a_labelled_wide_model_goes_out_and_comes_back(format, wide, tmp_path):
    before = load_model(wide)
    assert "1x16x24, 3 classes" in export_model(wide, tmp_path / "out", format, "ema", "mit")
    out = tmp_path / "out" if format == "diffusers" else tmp_path / "out/model.safetensors"
    import_model(out, tmp_path / "back.ckpt", [])
    for source in (out, tmp_path / "back.ckpt"):
        after = load_model(source)
        assert after.config == before.config and after.digest() == before.digest()


@pytest.mark.slow
def test_onnx_takes_labels(wide, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_model(wide, tmp_path / "out.onnx", "onnx", "ema", "mit")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    assert [i.name for i in session.get_inputs()] == ["x", "t", "labels"]
    model = load_model(wide)
    x, t = torch.randn(5, *model.shape), torch.tensor([0, 1, 2, 3, 9])
    labels = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1.0]])
    inputs = {"x": x, "t": t, "labels": labels}
    (eps,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(eps), model(x, t, labels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["temb.label.weight", "label_emb.weight"])
def test_a_table_of_labels_shows_in_a_state_dict(name, tmp_path):
    """Under our name, and under that of improved-diffusion."""
    model = model_of(*WIDE)
    state = model.network.state_dict()
    state[name] = state.pop("temb.label.weight")
    torch.save(state, tmp_path / "plain.pt")
    overrides = ["dataset.image_size=[16,24]", "training.label_dropout=0.1"]
    told = import_model(tmp_path / "plain.pt", tmp_path / "o.ckpt", overrides)
    assert "assumed: images of 16x24, " in told and "assumed: 4 labels, the last" in told
    back = load_model(tmp_path / "o.ckpt")
    assert back.config.dataset.classes == ["0", "1", "2"] and back.shape == model.shape
    assert back.config.model.attention_resolutions == [8]
    for layer, value in model.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[layer], value)
    with pytest.raises(ValueError, match=r"dataset\.image_size: wide is neither"):
        import_model(tmp_path / "plain.pt", tmp_path / "p.ckpt", ["dataset.image_size=wide"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], CLASSES),
        (CLASSES, []),
        ([*CLASSES, "training.label_dropout=0"], []),
        (CLASSES, ["dataset.labels=true", "dataset.classes=[red, green]"]),
    ],
)
def test_with_other_labels_fine_tuning_begins_as_the_model_without(before, after):
    theirs, config = model_of(*before), load_config("configs/smoke.yml", after)
    network = wake(build_network(config), 1).eval()
    copy_tensors(network, starting_weights(files_of(theirs), config), "here")
    x, t = torch.randn(1, *theirs.shape), torch.tensor([5])
    wanted = theirs(x, t)
    labels = [torch.eye(network.classes)[i : i + 1] for i in range(network.classes)]
    for label in [None, *labels]:
        torch.testing.assert_close(network(x, t, label), wanted, rtol=1e-5, atol=1e-5)
    if not before:
        assert torch.equal(network(x, t, labels[0]), wanted)


def test_with_the_same_labels_fine_tuning_keeps_them():
    files = files_of(model_of(*CLASSES))
    other = [*CLASSES, "training.label_dropout=0.3", "training.max_steps=9"]
    assert starting_weights(files, load_config("configs/smoke.yml", other)) is files.ema


@pytest.mark.parametrize(("before", "after"), [([], True), (CLASSES, False)])
def test_the_command_says_that_labels_are_others(before, after, tmp_path, monkeypatch):
    export = PROJECT / "configs"
    (tmp_path / "configs").symlink_to(export)
    write_diffusers(model_of(*before), tmp_path / "folder", "mit")
    command = "train.py configs/smoke.yml training.max_steps=1 training.learning_rate=1e-30"
    command += f" training.warmup_steps=0 dataset.labels={str(after).lower()}"
    output = invoke(f"{command} --checkpoint-path folder --run-name r", tmp_path, monkeypatch, 0)
    assert "not as where they come from: dataset.classes: [" in output
    assert "other labels: it begins as the model is without one" in output
    state = read_checkpoint(tmp_path / "lightning_logs/r/checkpoints/last.ckpt")["state_dict"]
    assert (state.get("unet.temb.label.weight", torch.ones(1)).abs().max() < 1e-20) == after


def test_what_is_older_than_labels_loads_and_keeps_its_digest():
    path = PROJECT / "pretrained/digits.safetensors"
    with safe_open(path, framework="pt") as file:
        assert not {"labels", "classes"} & json.loads(file.metadata()["config"])["dataset"].keys()
    assert load_model(path).digest() == "a0f056a0eeb11e40"
    digests = {model_of(*o).digest() for o in ([], CLASSES, [*CLASSES, "training.label_dropout=0"])}
    assert len(digests) == 3
