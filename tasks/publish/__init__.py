"""The end of a run: plan and parts reconciled, slides ranked, the manifest written last; and what a deadline gets."""
