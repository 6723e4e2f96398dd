"""`md2 zoo`: the published recipes with their figures and commands."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from cli.console import console


def zoo(name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None) -> None:
    """List the published recipes, their figures (the paper's), and the commands that train them."""
    from md2.config import recipes
    from md2.zoo import zoo as list_recipes
    from shards.errors import UsageError

    found = list_recipes()
    if name is None:
        table = Table(
            Column("recipe (md2 train NAME)", no_wrap=True, min_width=max(len(r.name) for r in found)),
            "abs_rel",
            "rmse",
            "a1",
            box=None,
            pad_edge=False,
            header_style="bold",
        )
        for recipe in found:
            figures = [f"{recipe.published[key]:.3f}" if recipe.published else "" for key in ("abs_rel", "rmse", "a1")]
            table.add_row(recipe.name, *figures)
        console.print(table)
        console.print(
            "\nFigures are the paper's (ICCV 2019, Tables 1 and 2). md2 zoo NAME shows one with its commands."
        )
        return
    chosen = next((recipe for recipe in found if recipe.name == name), None)
    if chosen is None:
        raise UsageError(f"no recipe {name!r}: md2 zoo lists them")
    console.print(recipes()[name].rstrip(), highlight=False, markup=False, soft_wrap=True)
    if chosen.published:
        row = "  ".join(f"{key} {value:.3f}" for key, value in chosen.published.items())
        console.print(f"\npublished: {row}", highlight=False, soft_wrap=True)
    if chosen.note:
        console.print(f"published: {chosen.note}", highlight=False)
    console.print(f"\n{chosen.prep_command}\n{chosen.train_command}", highlight=False, soft_wrap=True)
