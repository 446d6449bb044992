"""Recipes that come with the library, and the data that recipes are composed of: protocols, ablations, accuracies."""
