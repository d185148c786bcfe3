"""Reading, resizing and laying out pictures; it imports core."""
