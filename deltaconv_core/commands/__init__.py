"""One module per command: add_arguments(parser), run(options) -> exit status."""
