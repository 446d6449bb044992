"""lrds-fast recipes: lists the recipes of the library, or prints one. Does not import PyTorch."""

from __future__ import annotations

import argparse

from lrds_fast.cli.command import OK, Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        summary="list the recipes that come with the library, or show one",
        example="lrds-fast recipes show digits_kd",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action")
    actions.add_parser("list", help="print names and descriptions (default)")
    show = actions.add_parser("show", help="print the TOML of one recipe, or with --resolved all of its values")
    show.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name that `lrds-fast recipes` lists")
    show.add_argument("--resolved", action="store_true", help="print every value, defaults included, as JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the list or the recipe; returns the exit code."""
    from lrds_fast.recipe import names as grid
    from lrds_fast.recipe.recipe import builtin_recipes, load_recipe, recipe_text

    if options.action == "show":
        if options.resolved or grid.is_name(options.recipe):  # a composed name has no file
            print(load_recipe(options.recipe).to_json())
        else:
            print(recipe_text(options.recipe), end="")
        return OK
    names = builtin_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {load_recipe(name).description}")
    print(
        "\nPROTOCOL/MODEL trains a network alone, PROTOCOL/TEACHER-STUDENT/METHOD distils it. METHOD may end in +lr,"
        " +ds or +lr+ds."
    )
    for prefix, protocol in grid.PROTOCOLS.items():
        print(f"\n{prefix}, based on the recipe {protocol.base}")
        print(f"  pairs    {', '.join(protocol.pairs)}")
        print(f"  methods  {', '.join(protocol.methods)}")
    return OK
