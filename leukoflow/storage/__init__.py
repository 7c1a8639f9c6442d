"""Where results are kept: a local folder or an S3 prefix, siblings under one contract."""
