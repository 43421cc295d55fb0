"""The operator's door: management API, console, metrics."""
