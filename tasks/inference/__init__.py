"""The one chain from images to rows: for a shard of a run and for a single image."""
