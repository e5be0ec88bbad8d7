"""Expressions of everyone in a video, an image or a camera, without a manifest."""
