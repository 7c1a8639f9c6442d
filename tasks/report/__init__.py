"""Reports that need nothing else: one HTML page each, and the model card."""
