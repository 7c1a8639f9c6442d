"""What was handed over: recognise it, list its members, read one member."""
