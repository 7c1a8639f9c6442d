"""What a file says of itself: its kind, how its pixels are stored, and whether it shows a field at all.

Pure functions over bytes that nobody vouches for. They read headers only, never pixels, follow no offset out of the
file, and import nothing of an image library. What they do not understand they leave to the decoder.
"""
