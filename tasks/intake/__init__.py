"""From what has arrived to a frozen plan: inbox, manifest, patient key, plan, the opening of a run, preflight."""
