"""Recipes: strict YAML in, frozen dataclasses out, every mistake at once."""

from pcq.recipe.recipe import Recipe, load_recipe, parse_recipe
from pcq.recipe.schema import json_schema
from pcq.rules import Match, Rule
from pcq.shipped import shipped_recipes, shipped_text

__all__ = [
    "Match",
    "Recipe",
    "Rule",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "shipped_text",
]
