"""Single images diagnosed in processes that can be killed and replaced."""
