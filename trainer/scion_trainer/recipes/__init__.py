"""The recipes: ways to turn feedback into an adapter. Each is one file and one line here.

This package's root does not import torch, so that the command line can list recipes quickly.
"""

from __future__ import annotations

from collections.abc import Mapping

from scion_trainer.recipes.distill import DistillRecipe
from scion_trainer.recipes.dpo import DpoRecipe
from scion_trainer.recipes.kto import KtoRecipe
from scion_trainer.recipes.ppo import PpoRecipe
from scion_trainer.recipes.recipe import Example, Recipe, RunContext
from scion_trainer.recipes.reward import RewardRecipe
from scion_trainer.recipes.sft import SftRecipe

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (SftRecipe(), KtoRecipe(), DpoRecipe(), RewardRecipe(), PpoRecipe(), DistillRecipe())
}

__all__ = ["RECIPES", "Example", "Recipe", "RunContext"]
