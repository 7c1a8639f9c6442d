"""Training of a bundle, phase by phase."""
