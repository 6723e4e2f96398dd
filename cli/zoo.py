"""`md2 zoo`: the published recipes with their figures and commands."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.console import console

SHOWN = ("abs_rel", "rmse", "a1")
NAMES = 56
"""Width of the names' column, so that the table is 80 characters wide; figures after a longer name get a new line."""


def zoo(name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one recipe in full.")] = None) -> None:
    """List the published recipes, with the paper's figures. They are configurations, not trained weights."""
    from md2.config import recipe_hint, recipes
    from md2.zoo import zoo as list_recipes
    from prep.packing.encode import ImageFormat
    from shards.errors import UsageError
    from shards.manifest import describe_encoding

    found = list_recipes()
    if name is None:
        console.print(f"{'recipe':{NAMES}}" + "".join(f"{key:>8}" for key in SHOWN), style="bold", soft_wrap=True)
        for recipe in found:
            figures = "".join(f"{recipe.published[key]:8.3f}" for key in SHOWN if recipe.published)
            text = f"{recipe.name:{NAMES}}{figures}".rstrip()
            if figures and len(recipe.name) > NAMES:
                text = f"{recipe.name}\n{'':{NAMES}}{figures}"
            if recipe.note:
                text += f"\n    {recipe.note}"
            console.print(text, highlight=False, soft_wrap=True)
        console.print(
            "\nmd2 train NAME trains a recipe; md2 zoo NAME shows all of its figures and how to pack its data. The "
            "figures are the paper's (ICCV 2019 and its supplement). There are no trained weights of md2 yet; "
            "docs/prediction.md says where the official ones are.",
            highlight=False,
        )
        return
    chosen = next((recipe for recipe in found if recipe.name == name), None)
    if chosen is None:
        raise UsageError(f"no recipe {name!r}{recipe_hint(name)}")
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
