"""Reports of one HTML file that needs nothing else, made from templates with one palette; and the model card."""
