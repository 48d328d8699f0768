"""One module a subcommand of `em3`, each with a `main(arguments)`."""
