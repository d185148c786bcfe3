"""Doors, a small file for each thing that a person does: it parses flags and calls the library, and may import everything but
convert.
"""
