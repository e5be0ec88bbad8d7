"""Drawn faces: an Aff-Wild2-shaped data set whose truth is known."""
