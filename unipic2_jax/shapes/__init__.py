"""The toy world, which registers itself everywhere and which nothing in the library imports; it imports evaluation, serving and
what is below them.
"""
