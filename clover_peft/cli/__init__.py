"""The `clover` command. `parsers` holds the options of every subcommand, and each subcommand has a module here."""
