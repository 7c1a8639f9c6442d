"""Pictures of fields, and exports of a single field as PNG, PDF or JSON."""
