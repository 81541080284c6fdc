"""Typed configuration: schema, loading, overrides, errors, generated help. Imports no torch."""
