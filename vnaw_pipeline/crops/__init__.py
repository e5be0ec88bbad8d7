"""Faces out of video, and crops back in: decode, detect, follow, align, read, and the stage that writes them."""

RECORD_NAME = "crops.json"
"""In a folder that `vnaw crop` wrote: how its crops were made; `crop_set` there names them in one word."""
