"""The shapes world: pictures whose truth can be checked exactly (docs/shapes.md)."""
