"""Pure rules: names, codes, signatures, tokens, topics. Nothing here reads a clock, a socket or a file."""
