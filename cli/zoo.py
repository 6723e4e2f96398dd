"""`md2 zoo`: the published recipes with their figures and commands."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.console import console

SHOWN = ("abs_rel", "rmse", "a1")


def zoo(name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None) -> None:
    """List the published recipes, their figures (the paper's), and the commands that train them."""
    from md2.config import recipes
    from md2.zoo import zoo as list_recipes
    from prep.packing.encode import ImageFormat
    from shards.errors import UsageError
    from shards.manifest import describe_encoding

    found = list_recipes()
    if name is None:
        width = max(len(recipe.train_command) for recipe in found)
        console.print(f"{'':{width}}  " + "  ".join(f"{key:>7}" for key in SHOWN), style="bold", soft_wrap=True)
        for recipe in found:
            figures = "  ".join(f"{recipe.published[key]:7.3f}" for key in SHOWN if recipe.published)
            told = figures or recipe.note
            console.print(f"{recipe.train_command:{width}}  {told}".rstrip(), highlight=False, soft_wrap=True)
        console.print(
            "\nFigures are the paper's (ICCV 2019 and its supplement). md2 zoo NAME shows one recipe with all of its "
            "figures, and how its data are packed.",
            soft_wrap=True,
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
    form = ImageFormat(None, "jpeg")
    packed = describe_encoding(form.codec, form.quality, form.jpeg)
    console.print(
        f"\nPacked like this, images are {packed}. "
        "The published models were trained from full-size JPEGs of quality 92, chroma 4:2:0, resized.",
        highlight=False,
        soft_wrap=True,
    )
