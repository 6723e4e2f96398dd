"""Recipes for other papers' encoders, decoders and augmentation: each trains, and says that it is not reproduced."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_data import losses, train

from md2.zoo import zoo

NEW = {recipe.name: recipe for recipe in zoo() if "not reproduced" in recipe.note}


def test_every_such_recipe_has_a_published_figure_and_its_source_beside_it() -> None:
    assert len(NEW) == 7
    for recipe in NEW.values():
        assert "0." in recipe.note and "20" in recipe.note and not recipe.published
        assert recipe.summary.endswith("Not reproduced by md2.")


@pytest.mark.parametrize("name", sorted(name for name in NEW if "velocity" not in name))
def test_a_recipe_trains(name: str, dataset: Path, tmp_path: Path) -> None:
    extra = ["train.max_steps=2", "train.val_batches=1", "train.batch_size=1", "model.pose_network=posecnn"]
    train(dataset, tmp_path / "run", name, extra)
    assert len(losses(tmp_path / "run")) == 2
