"""The one chain from images to rows, for a shard of a run, for a single image and for evaluation."""
