"""Recipes: a training run as data. Options, files, names of the literature's experiments. Imports no torch."""
