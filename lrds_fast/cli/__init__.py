"""The command line: lrds-fast, also python -m lrds_fast. A module a command."""
