"""What a shard leaves and how it is committed: its job, arrays, facts, tables, markers; and what a slide is."""
