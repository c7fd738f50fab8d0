"""Typed results that one package writes and another reads."""
