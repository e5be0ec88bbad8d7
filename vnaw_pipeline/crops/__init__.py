"""Faces out of video, and crops back in: decode, detect, follow, align, read, and the stage that writes them."""
