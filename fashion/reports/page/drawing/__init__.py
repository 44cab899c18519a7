"""Draws the figures of `content.py`: for the page, and as PNG files."""
