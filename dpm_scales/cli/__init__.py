"""The command line: arguments in, one line of error out."""
