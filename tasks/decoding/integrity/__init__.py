"""What a picture's file says of its own wholeness: checksums, lengths, a decoder's complaints, and seams in its pixels.

Decoders for viewing show what they can of a damaged file: grey or black where data are missing, the rest displaced or
in other colours. A diagnosis of that misleads, so whatever can tell is asked here. Nothing in these modules needs more
than bytes or pixels. Functions raise `MissingError` where data of the picture are missing or wrong, and return remarks
where something is odd but the picture is complete.
"""
