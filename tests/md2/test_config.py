"""The configuration: overrides, errors that help, impossible combinations."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import md2.config as config_module
from md2.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    known_keys,
    load_config,
    recipes,
)
from shards.errors import UsageError

SECTIONS = {section.__name__: section for section in (DataConfig, ModelConfig, LossConfig, TrainConfig)}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_nothing_else_moves(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {url: here, stereo: true}\ntrain: {batch_size: 3}\n")
    config = load_config(path, ["train.batch_size=5", "data.frames=[0]", "train.learning_rate=1e-3"])
    assert (config.data.url, config.data.stereo, config.data.frames) == ("here", True, [0])
    assert (config.train.batch_size, config.train.learning_rate) == (5, 1e-3)
    assert config.model == Config().model


def test_defaults_are_the_papers() -> None:
    config = load_config(None)
    assert (config.train.learning_rate, config.train.epochs, config.train.batch_size) == (1e-4, 20, 12)
    assert (config.train.lr_step_epochs, config.train.lr_gamma) == (15, 0.1)
    assert (config.data.width, config.data.height, config.data.frames) == (640, 192, [0, -1, 1])
    assert (config.model.min_depth, config.model.max_depth, config.model.scales) == (0.1, 100.0, [0, 1, 2, 3])
    assert config.loss.disparity_smoothness == 1e-3


def test_text_is_taken_as_it_is_and_a_list_says_how_it_is_written() -> None:
    for url in ("2024-11-28", "20241128", "set #1/d", "a: b", "[x]", "no"):
        assert load_config(None, [f"data.url={url}"]).data.url == url
    with pytest.raises(UsageError, match=r"a list is written data\.frames=\[0,-1,1\]$"):
        load_config(None, ["data.frames=0,-1,1"])


def test_every_key_is_described_in_the_code() -> None:
    """The text after a field, which editors show."""
    tree = ast.parse(inspect.getsource(config_module))
    undescribed = []
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in SECTIONS):
        for field, after in pairwise([*section.body, ast.Pass()]):
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not described:
                undescribed.append(f"{section.name}.{ast.unparse(field.target)}")
    assert not undescribed
    assert len(list(known_keys())) - len(SECTIONS) == sum(len(s.model_fields) for s in SECTIONS.values())


def test_a_part_of_a_name_finds_the_recipes_that_have_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\d+ recipes have it in their name, such as monodepth2_\w+: `md2 zoo`"):
        load_config("monodepth2")
    with pytest.raises(UsageError, match=r"config\.yaml, line 2, column \d+: not YAML: [^\n]+$"):
        load_config(write(tmp_path, "data:\n  url: a: b\n"))


def test_resolved_yaml_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["data.stereo=true", "model.scales=[0,2]", "train.val_batches=7"])
    assert load_config(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=4", "did you mean 'train.batch_size'"),
        ("batch_size=4", "did you mean 'train.batch_size'"),
        ("loss.automasking=false", "did you mean 'loss.disable_automasking'"),
        ("train.batch_size=many", "train.batch_size = 'many'"),
        ("train.batch_size=0", "train.batch_size = 0"),
        ("train.seed=-1", "train.seed = -1"),
        ("train.seed=2147483648", "less than 2147483648"),
        ("data.width=650", "multiple of 32"),
        ("data.height=100", "multiple of 32"),
        ("data.frames=0", "valid list"),
        ("data.frames=[]", "comes first"),
        ("data.intrinsics=measured", "'calibrated', 'nominal' or 'learned'"),
        ("loss.disparity_smoothness=-1", "disparity_smoothness = -1"),
        ("train.learning_rate=.nan", "learning_rate = nan"),
        ("train.batch_size", "key.sub=value"),
        ("train.batch_size.x=1", "train"),
        ("train.learning_rate=.inf", "learning_rate = inf"),
        ("data.frames=[", "not YAML"),
        ("train.seed=2011-09-31", "not YAML"),
        ("data.frames=[0]", "no source image"),
        ("data.crop=[0.9,0.7]", "0 < least <= largest <= 1"),
        ("data.crop=[0.5,1.2]", "0 < least <= largest <= 1"),
        ("data.crop=0.7", "valid list"),
        ("data.frames=[-1,0]", "comes first"),
        ("data.frames=[0,1,1]", "twice"),
        ("model.scales=[1,2]", "0, which evaluation reads"),
        ("model.min_depth=200", "must be below"),
        ("loss.predictive_mask=true", "disable_automasking=true"),
        ("model.encoder=resnet19", "model.encoder 'resnet19': one of resnet18, "),
        ("model.pose_encoder=timm/a/b", "model.pose_encoder 'timm/a/b': one of"),
    ],
)
def test_a_mistake_gets_one_line_that_helps(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.frames=[0]", "data.stereo=true", "model.pose_network=posecnn"],
        ["data.frames=[0]", "data.stereo=true", "model.pose_input=all"],
        ["data.frames=[0]", "data.stereo=true", "model.pose_encoder=resnet34"],
        ["model.pose_network=shared", "model.pose_encoder=resnet34"],
        ["data.stereo=false", "data.baseline=metres"],
        ["train.device=cpu", "data.device=gpu"],
    ],
)
def test_impossible_combinations_are_refused_whatever_their_order(overrides: list[str]) -> None:
    with pytest.raises(UsageError):
        load_config(None, overrides)
    with pytest.raises(UsageError):
        load_config(None, overrides[::-1])


def test_a_combination_is_judged_after_all_overrides() -> None:
    config = load_config(None, ["loss.predictive_mask=true", "loss.disable_automasking=true"])
    assert config.loss.predictive_mask


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections"),
        ("a: [\n", "not YAML"),
        ("a: 2011-09-31\n", "not YAML"),
        ("dta: {}\n", "'data'"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, text))


def test_former_keys_of_run_folders_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "data:\n  shuffle_buffer: 9\ntrain:\n  sinks: [wandb]\n")
    assert load_config(path).train.loggers == ["wandb"]
    assert "data.shuffle_buffer is ignored" in caplog.text
    assert load_config(path, ["train.loggers=[mlflow]"]).train.loggers == ["mlflow"], "the new name wins"
    assert "sinks" not in load_config(path).to_yaml()


def test_an_empty_section_is_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\ntrain:\n  epochs: 3\n")
    config = load_config(path, ["data.url=here"])
    assert (config.data.url, config.train.epochs, config.data.frames) == ("here", 3, [0, -1, 1])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match=r"weights\.pth: not a configuration file"):
        load_config(tmp_path / "weights.pth")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean the recipe mono_stereo"):
        load_config("mono_stero")
    with pytest.raises(UsageError, match=r"7 recipes have it in their name, such as \S+mono_stereo_640x192"):
        load_config("mono_stereo_kitti_640")


def test_every_recipe_loads_and_says_nothing_twice() -> None:
    assert {"mono", "stereo", "mono_stereo"} <= set(recipes())
    for name, text in recipes().items():
        load_config(name)
        tree = yaml.safe_load(text)
        assert set(tree) <= set(Config.model_fields), name


def test_every_key_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    keys = {f"{name}.{key}" for name, section in Config() for key in type(section).model_fields}
    assert len(keys) > 40
    assert not {key for key in keys if f"`{key}`" not in text}


BASELINE = {"v1_multiscale", "avg_reprojection", "disable_automasking"}


@pytest.mark.parametrize(
    ("name", "split", "options", "epochs"),
    [
        ("mono_640x192", "eigen_zhou", set(), 20),
        ("stereo_640x192", "eigen_full", set(), 20),
        ("mono_stereo_640x192", "eigen_zhou", set(), 20),
        ("mono_no_pretraining_640x192", "eigen_zhou", set(), 30),
        ("stereo_no_pretraining_640x192", "eigen_full", set(), 30),
        ("mono_stereo_no_pretraining_640x192", "eigen_zhou", set(), 30),
        ("odometry_mono_640x192", "odom", set(), 30),
        ("odometry_mono_stereo_640x192", "odom", set(), 30),
        ("mono_1024x320", "eigen_zhou_1024x320", set(), 5),
        ("stereo_1024x320", "eigen_full_1024x320", set(), 5),
        ("mono_stereo_1024x320", "eigen_zhou_1024x320", set(), 5),
        ("mono_416x128", "eigen_zhou_416x128", set(), 20),
        ("mono_baseline_640x192", "eigen_zhou", BASELINE, 20),
        ("mono_baseline_minimum_reprojection_640x192", "eigen_zhou", BASELINE - {"avg_reprojection"}, 20),
        ("mono_baseline_automasking_640x192", "eigen_zhou", BASELINE - {"disable_automasking"}, 20),
        ("mono_baseline_full_resolution_multiscale_640x192", "eigen_zhou", BASELINE - {"v1_multiscale"}, 20),
        ("mono_no_minimum_reprojection_640x192", "eigen_zhou", {"avg_reprojection"}, 20),
        ("mono_no_automasking_640x192", "eigen_zhou", {"disable_automasking"}, 20),
        ("mono_no_full_resolution_multiscale_640x192", "eigen_zhou", {"v1_multiscale"}, 20),
        ("mono_predictive_mask_640x192", "eigen_zhou", {"predictive_mask", "disable_automasking"}, 20),
        ("mono_eigen_full_640x192", "eigen_full", set(), 20),
        ("mono_baseline_eigen_full_640x192", "eigen_full", BASELINE, 20),
    ],
)
def test_published_recipes_train_what_their_names_say(name: str, split: str, options: set[str], epochs: int) -> None:
    config = load_config(f"monodepth2_resnet18_kitti_{name}")
    assert config.data.url == f"kitti_shards/{split}"
    size = name.rsplit("_", 1)[-1]
    assert f"{config.data.width}x{config.data.height}" == size
    mode = name.removeprefix("odometry_")
    assert config.data.frames == ([0] if mode.startswith("stereo") else [0, -1, 1])
    assert config.data.stereo == mode.startswith(("stereo", "mono_stereo"))
    assert config.data.intrinsics == "nominal"
    assert {key for key, value in config.loss if value is True} == options
    assert config.train.epochs == epochs
    assert config.train.learning_rate == (1e-5 if size == "1024x320" else 1e-4)
    # 1024x320 starts from the model of 640x192, the others from ImageNet or from nothing.
    start = f"runs/monodepth2_resnet18_kitti_{name.replace('1024x320', '640x192')}"
    assert config.model.weights == {"1024x320": start}.get(size, "scratch" if "no_pretraining" in name else "imagenet")
    rest = {"epochs", "learning_rate"}
    assert config.train.model_dump(exclude=rest) == Config().train.model_dump(exclude=rest)


def test_units_of_predicted_depth() -> None:
    assert load_config("mono").metres_per_unit is None
    assert load_config("stereo").metres_per_unit == 5.4
    assert load_config("mono_stereo", ["data.baseline=metres"]).metres_per_unit == 1.0


def test_keys_are_listed_with_their_sections() -> None:
    keys = set(known_keys())
    assert {"data", "data.url", "loss.no_ssim", "train.on_nan"} <= keys


@pytest.mark.parametrize(
    "word", ["data.threads=100000", "data.prefetch=100000000", "data.width=64000", "data.height=6400000"]
)
def test_numbers_at_which_dali_hangs_or_ends_the_process_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=word.partition("=")[0].replace(".", r"\.")):
        load_config("mono", [word])
