"""Errors, the one registry, files that are whole or not there, strict JSON and checked fields; it loads no JAX and imports no
other room.
"""
