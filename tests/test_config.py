import inspect
import re
from pathlib import Path

import pytest
import yaml

from cli import check_sampling
from config import Config, TrainingConfig, check_config, load_config
from dataset import load_images
from diffusion_utils import GaussianDiffusion
from files import differences, parse_yaml, to_yaml
from generation import Guidance, make_steps
from model import UNet

CONFIGS = sorted(Path("configs").glob("*.yml"))
DIGITS = "configs/digits.yml"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_shipped_configs_hold(path):
    config = load_config(path)
    assert check_config(yaml.safe_load(to_yaml(config)), source="") == config  # there and back


def test_the_papers_settings():
    cifar, celeba = load_config("configs/cifar10.yml"), load_config("configs/celeba.yml")
    for config in (cifar, celeba):
        diffusion, training = config.diffusion, config.training
        assert (diffusion.timesteps, diffusion.beta_schedule) == (1000, "linear")
        assert (diffusion.beta_start, diffusion.beta_end) == (1e-4, 0.02)
        assert (training.warmup_steps, training.gradient_clip_norm) == (5000, 1.0)
        assert training.ema_decay == 0.9999
        assert config.dataset.random_flip
        assert config.dataset.channels == 3
        assert (config.model.base_channels, config.model.num_res_blocks) == (128, 2)
        assert config.model.attention_resolutions == [16]
        assert (config.sampling.sampler, config.sampling.timesteps) == ("ddpm", None)
    church = load_config("configs/lsun_church.yml")
    for config in (cifar, celeba, church):  # no knob of later papers is turned
        of_the_paper = {"batch_size", "max_steps", "learning_rate", "warmup_steps", "ema_decay"}
        turned = config.training.model_fields_set - of_the_paper
        assert all(
            getattr(config.training, key) == TrainingConfig.model_fields[key].default
            for key in turned
        )
        assert (config.diffusion.prediction, config.diffusion.learned_variance) == ("eps", False)
        assert config.training.optimizer == "adam"
        assert (config.model.num_heads, config.model.variant) == (1, "ddpm")
    assert (cifar.training.batch_size, celeba.training.batch_size) == (128, 64)
    assert (cifar.training.learning_rate, celeba.training.learning_rate) == (2e-4, 2e-5)
    assert (cifar.training.max_steps, celeba.training.max_steps) == (800_000, 500_000)
    assert (cifar.model.dropout, celeba.model.dropout) == (0.1, 0.0)
    assert cifar.model.channel_multipliers == [1, 2, 2, 2]
    assert celeba.model.channel_multipliers == [1, 1, 2, 2, 4, 4]
    assert (cifar.dataset.image_size, celeba.dataset.image_size) == (32, 256)
    assert (cifar.sampling.variance, celeba.sampling.variance) == ("large", "small")
    assert celeba.dataset.validation_fraction == 0  # the paper trains on all 30,000


def test_a_section_is_a_constructor():
    """Its keys are the constructor's keywords, less facts of the data; no second defaults."""
    config = load_config(DIGITS)
    data = {"image_size", "channels", "out_channels", "classes", "null_label"}
    for section, function, less in (
        (config.model, UNet, data),
        (config.diffusion, GaussianDiffusion, set()),
        (config.sampling, make_steps, set()),
        (config.guidance, Guidance, set()),
        (config.dataset, load_images, set()),
    ):
        parameters = inspect.signature(function).parameters.values()
        named = function is Guidance  # a NamedTuple has no keywords alone
        keywords = {p.name for p in parameters if named or p.kind == p.KEYWORD_ONLY}
        keys = set(type(section).model_fields)
        assert keywords - less - {"progress"} == keys - {"random_flip"}
        assert named or all(p.default is p.empty for p in parameters if p.name in keys)


def test_overrides_win():
    config = load_config(
        DIGITS, ["training.batch_size=4", "model.channel_multipliers=[2]", "hardware.devices=auto",
                 "model.attention_resolutions=[]", "training.learning_rate=1e-5",
                 "training.gradient_clip_norm=null"],
    )  # fmt: skip
    assert config.training.batch_size == 4
    assert config.model.channel_multipliers == [2]
    assert config.training.learning_rate == 1e-5
    assert config.training.gradient_clip_norm is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.batchsize=4", "training.batchsize: no such key; did you mean batch_size?"),
        ("trainig.batch_size=4", "trainig: no such key; did you mean training?"),
        ("training.batch_size=many", "training.batch_size: 'many'"),
        ("training.batch_size=2.5", "training.batch_size: 2.5"),
        ("training.batch_size=true", "training.batch_size: True"),
        ("training.batch_size=0", "training.batch_size: 0"),
        ("training.learning_rate=-1", "training.learning_rate: -1"),
        ("training.learning_rate=.inf", "training.learning_rate: inf"),
        ("training.learning_rate=.nan", "training.learning_rate: nan"),
        (
            "training.max_steps=null",
            "training: give one of max_steps and max_epochs; none is given",
        ),
        ("training.max_epochs=0", "training.max_epochs: 0: input should be greater than 0"),
        ("hardware.devices=0", "hardware.devices: 0: input should be"),
        (
            "hardware.micro_batch_size=3",
            "micro_batch_size 3 does not divide training.batch_size 32",
        ),
        ("model.base_channels=2", "model.base_channels: 2"),
        ("diffusion.prediction=noise", "diffusion.prediction: 'noise'"),
        ("training", "section.key=value"),
        ("training.=1", "section.key=value"),
        ("a.b.c=1", "section.key=value"),
        ("training.batch_size=[", "not a YAML value"),
        ("training.batch_size=!!bool foo", "not a YAML value"),
        ("training.batch_size=!!map [1]", "not a YAML value"),
        ("training.batch_size=" + "[" * 5000, "not a YAML value"),
        ("training.batch_size=1000000007", "training.batch_size: 1000000007"),
        ("dataset.name=" + "x" * 5000, "xxx...xxx"),
        ("dataset.image_size=9", "cannot be halved 1 times"),
        ("dataset.image_size=[8,9]", "dataset.image_size 9 cannot be halved 1 times"),
        ("dataset.image_size=[8,8,8]", "image_size: [8, 8, 8] is neither a side of 4"),
        (
            "dataset.image_size=2",
            "image_size: 2 is neither a side of 4 ... 16384 pixels nor [height, width]",
        ),
        ("dataset.classes=[a,a]", "has one name twice"),
        ("dataset.name=cifar", "dataset.name: 'cifar'"),
        ("model.attention_resolutions=[16]", "[8, 4]"),
        ("model.channel_multipliers=[1,0]", "channel_multipliers.1: 0"),
        ("diffusion.beta_schedule=linaer", "'linear'"),
        ("dataset.fit=stretch", "'crop' or 'pad'"),
        ("sampling.timesteps=1001", "sampling.timesteps 1001"),
    ],
)
def test_faults_name_the_key_the_value_and_the_rule(override, says, tmp_path):
    path = tmp_path / "run.yml"
    tree = yaml.safe_load(Path(DIGITS).read_text())
    tree["training"]["batch_size"] = 32
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(path, [override])
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "flowers102"])
def test_a_test_set_is_the_validation_set(name):
    with pytest.raises(ValueError, match=f"fraction is 0.1; {name} validates on its own test set"):
        load_config(DIGITS, [f"dataset.name={name}"])
    assert load_config(DIGITS, [f"dataset.name={name}", "dataset.validation_fraction=0"])
    assert load_config(DIGITS, [f"dataset.name={name}", "dataset.split=all"])
    with pytest.raises(ValueError, match="split=all adds a test set, and digits has none"):
        load_config(DIGITS, ["dataset.split=all"])


@pytest.mark.parametrize("name", ["sprites", "flowers"])
def test_betas_of_others_leave_what_the_comment_says(name):
    text = Path(f"configs/{name}.yml").read_text()
    start, end, theirs, ours = map(float, re.search(
        r"beta_start: (\S+), beta_end: (\S+), with alpha_bar_T (\S+) in place of (\S+)", text
    ).groups())  # fmt: skip
    config = load_config(f"configs/{name}.yml").diffusion
    literal = config.model_copy(update={"beta_start": start, "beta_end": end})
    last = config.timesteps - 1
    left = [GaussianDiffusion(**c.model_dump()).alpha_bar(last) for c in (literal, config)]
    assert left == [pytest.approx(theirs, rel=0.02), pytest.approx(ours, rel=0.2)]


def test_steps_or_epochs(tmp_path):
    """Both or none are refused; what is said on the line replaces the file's, and the last wins."""
    lengths = lambda *said: [
        getattr(load_config(tmp_path / "a.yml", said).training, f"max_{key}")
        for key in ("steps", "epochs")
    ]
    text = Path(DIGITS).read_text()
    for key, says in (("", "none is"), ("max_epochs: 2\n  max_steps: 5", "both are")):
        (tmp_path / "a.yml").write_text(text.replace("max_steps: 1400", key))
        with pytest.raises(ValueError, match=f"one of max_steps and max_epochs; {says} given"):
            lengths()
    (tmp_path / "a.yml").write_text(text)
    assert lengths("training.max_epochs=0.5") == [None, 0.5]
    assert lengths("training.max_epochs=0.5", "training.max_steps=7") == [7, None]
    assert lengths("training.max_epochs=null") == [1400, None]
    (tmp_path / "a.yml").write_text(text.replace("max_steps: 1400", "max_epochs: 2"))
    assert lengths() == [None, 2]
    assert lengths("training.max_steps=7") == [7, None]
    printed = to_yaml(load_config(tmp_path / "a.yml"))  # as given
    assert "max_steps: null " in printed and "max_epochs: 2.0 " in printed


def test_epochs_become_steps():
    some = (1, 320, 10), (1, 321, 11), (0.5, 321, 6), (3, 7, 1), (2, 321, 21)
    for epochs, images, steps in some:
        given = load_config(DIGITS, [f"training.max_epochs={epochs}"])
        assert given.with_steps(images) == load_config(DIGITS, [f"training.max_steps={steps}"])
    assert load_config(DIGITS).with_steps(5) == load_config(DIGITS)
    best = [*("training.max_epochs=1", "training.keep_best=validation")]
    with pytest.raises(
        ValueError, match=r"max_epochs=1 of 320 images:\n.*validate_every in 1 \.\.\. 10"
    ):
        load_config(DIGITS, best).with_steps(320)  # digits.yml validates at step 200


def test_older_files_load_and_say_what_moved(capsys):
    tree = load_config(DIGITS).model_dump(mode="json")
    del tree["dataset"]["fit"], tree["model"]["num_heads"], tree["training"]["ema"]
    for section in ("hardware", "logging", "evaluation"):
        tree["training"] |= tree.pop(section)
    assert check_config(tree, source="old.yml") == load_config(DIGITS)
    assert capsys.readouterr().err.startswith("old.yml: moved from training to 20 keys of")
    assert load_config(DIGITS, ["training.devices=2"]).hardware.devices == 2
    assert (
        capsys.readouterr().err == "configs/digits.yml: moved from training to hardware.devices\n"
    )
    with pytest.raises(ValueError, match=r"training\.devices: no such key"):
        load_config(DIGITS, ["training.devices=2", "hardware.devices=2"])


def test_a_new_key_may_not_change_when_a_run_continues():
    """What is free is named, key by key; the rest is learned."""
    free = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key, info in field.annotation.model_fields.items()
        if info.json_schema_extra
    }
    whole = {"hardware", "logging", "evaluation", "sampling", "guidance"}
    some = {"dataset.root", "dataset.cache"}
    some |= {f"training.{key}" for key in ("max_steps", "max_epochs", "max_skipped_steps")}
    some.add("training.keep_best")
    assert {name for name in free if name.partition(".")[0] not in whole} == some
    for section in whole:
        keys = Config.model_fields[section].annotation.model_fields
        assert {f"{section}.{key}" for key in keys} <= free


def test_sampling_overrides():
    assert check_sampling(["sampling.eta=0.5", "sampling.timesteps=7"]) == {
        "eta": 0.5,
        "timesteps": 7,
    }
    for wrong, says in (("sampling.eta=2", "sampling.eta: 2"), ("training.seed=1", "here only")):
        with pytest.raises(ValueError, match=says):
            check_sampling([wrong])


def test_all_faults_at_once():
    with pytest.raises(ValueError, match=r"names(.|\n)*seed(.|\n)*batchsize"):
        load_config(DIGITS, ["dataset.names=x", "training.batchsize=1", "training.seed=-1"])


@pytest.mark.parametrize("text", ["dataset: [", "- a", "", "dataset: {name: digits}", "a: 1\na: 2"])
def test_bad_files(text, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yml"):
        load_config(path)


def test_missing_file_names_a_near_one():
    with pytest.raises(FileNotFoundError, match=r"did you mean configs/cifar10\.yml"):
        load_config("configs/cifar.yml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2E+4", 2e4), ("1.5", 1.5), ("-1e3", -1e3), ("1_000", 1000), ("3", 3),
     ("1_000.5", 1000.5), ("1e4x", "1e4x"), ("1.2.3", "1.2.3"), (".5", 0.5), ("e5", "e5")],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_differences():
    old = load_config(DIGITS)
    new = load_config(DIGITS, ["training.seed=1", "training.max_steps=7"])
    assert differences(old, old) == []
    assert differences(old, new, learned=True) == ["training.seed: 0 -> 1"]
    assert len(differences(old, new)) == 2


def test_config_is_plain_and_frozen():
    config = load_config(DIGITS)
    assert Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3


def test_folders_are_taken_as_they_stand():
    for text in ("my #1 images", "2024-02-03", "123", "a: b", "yes"):
        assert load_config(DIGITS, [f"dataset.root={text}"]).dataset.root == text
    assert load_config(DIGITS, ['dataset.root=" a #b"']).dataset.root == " a #b"
    home = load_config(DIGITS, ["logging.results_folder=~/runs"]).logging.results_folder
    assert home == str(Path.home() / "runs")


def test_merge_keys(tmp_path):
    text = Path(DIGITS).read_text().replace("training:", "training: &t\n  seed: 4", 1)
    (tmp_path / "a.yml").write_text(text)
    assert load_config(tmp_path / "a.yml").training.seed == 4
    merged = "\nsampling:\n  <<: {eta: 0.5}\n  sampler: ddim\n"
    (tmp_path / "b.yml").write_text(Path(DIGITS).read_text().partition("\nsampling:")[0] + merged)
    assert load_config(tmp_path / "b.yml").sampling.eta == 0.5
