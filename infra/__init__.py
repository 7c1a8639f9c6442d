"""What leukoflow runs on: the stack as plain processes on one machine, and the files for containers and systemd."""
