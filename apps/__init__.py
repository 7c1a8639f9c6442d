"""What people touch: the command line. The only place that configures logging."""
