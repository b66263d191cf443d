"""The recipes: ways to turn feedback into an adapter. Each is one file and one line here.

This package's root does not import torch, so that the command line can list recipes quickly.
"""

from __future__ import annotations

from collections.abc import Mapping

from scion_trainer.recipes.kto import KtoRecipe
from scion_trainer.recipes.recipe import Example, Recipe, RunContext
from scion_trainer.recipes.sft import SftRecipe

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (SftRecipe(), KtoRecipe())}

__all__ = ["RECIPES", "Example", "Recipe", "RunContext"]
