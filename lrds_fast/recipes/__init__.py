"""Recipes that come with the library, one TOML file each; lrds_fast.recipe.recipe reads them."""
