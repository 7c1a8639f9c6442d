"""Arrays in, arrays out: quality, normalisation, segmentation, features, classification. No files, no storage."""
