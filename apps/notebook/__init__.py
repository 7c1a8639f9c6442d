"""What a notebook or a program imports: one image diagnosed, a run opened, a run started. Reached as `leukoflow.*`."""
