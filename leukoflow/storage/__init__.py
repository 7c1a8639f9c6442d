"""Where results are kept: a local folder or an S3 prefix, under one contract."""
