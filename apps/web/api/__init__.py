"""The JSON API, its errors, and its description of itself."""
