"""Alembic's revisions of the registry, one module each in `versions`; `registry.sql` runs them when a registry is opened."""
