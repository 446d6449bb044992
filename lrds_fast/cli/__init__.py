"""The command line: lrds-fast, also python -m lrds_fast. Each command is a module with add_parser() and run()."""
