"""Drawings that need no other program: SVG figures and HTML pages."""
