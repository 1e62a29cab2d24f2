"""Adapters: the package's verbs in the words of others: NBD, a command line. Translation only."""
