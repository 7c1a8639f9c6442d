"""What people touch: command line, web application, notebook functions. The only place that configures logging."""
