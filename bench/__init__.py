"""Measures uplinkd beside nginx and beside the same protocol on FastAPI, in one run on one machine: `make bench`."""
